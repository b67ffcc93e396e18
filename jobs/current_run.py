"""The run that this process is: recorded around the job, and told of the cluster when there is one.

A record must never be why a job fails: what goes wrong with it is a line on stderr.
"""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from jobs import run_facts
from jobs.artifacts import absolute, identify, identify_vae
from jobs.config import JobConfig
from jobs.run_record import Artifact, Machine, RunRecord, new_run_id, write_record
from jobs.run_stages import STAGES, RunStage, values_at
from ldm.errors import LdmError
from pipelines.json_logs import RUN_ID, STAGE
from pipelines.process import this_process

__all__ = ["CurrentRun", "cluster_is_there", "recorded"]

LOG = logging.getLogger("ldm.run")
Result = TypeVar("Result")

_current: "CurrentRun | None" = None


class CurrentRun:
    """A run with a record. `begin` once it has begun to work, `end` in any case."""

    def __init__(self, command: str, arguments: Sequence[str], config: JobConfig) -> None:
        self._config, self._stage, self._has_begun = config, STAGES[command], False
        self._started_s, self._secrets = time.monotonic(), run_facts.secrets_of(config)
        (output,) = values_at(config, self._stage.output)
        self.record = RunRecord(
            run=new_run_id(),
            command=command,
            line=shlex.join(["ldm", *command.split(), *(self._masked(each) for each in arguments)]),
            config={
                name: run_facts.without_secrets(value, self._secrets)
                for name, value in config.model_dump(mode="json").items()
            },
            versions=run_facts.versions(),
            commit=run_facts.commit(),
            process=this_process(),
            machine=run_facts.machine(),
            started=_now(),
            output=absolute(output),
        )

    def begin(self, machine: Machine) -> None:
        """It works, on ``machine``: from here on there is a record. Again: the machine may have grown."""
        if self._has_begun:
            self._change(machine=self.record.machine.at_most(machine))
            return
        self._change(machine=machine, inputs=tuple(_inputs(self._config, self._stage)))
        self._has_begun = True
        LOG.info("%s begins on %d nodes", self.record.command, machine.nodes)
        write_record(self.record)

    def end(self, result: Mapping[str, object], failure: BaseException | None) -> None:
        """Record how it ended. A mistake that was found before any work was done leaves no record."""
        from jobs.failures import find_user_error, summary

        user_error = None if failure is None else find_user_error(failure)
        if user_error is not None and not self._has_begun:
            return
        changes: dict[str, object] = {
            "status": _status(failure),
            "error": None if failure is None else self._masked(str(user_error or summary(failure))),
            "ended": _now(),
            "seconds": round(time.monotonic() - self._started_s, 3),
            "figures": run_facts.figures(result),
        }
        if not self._has_begun:  # as one without a cluster
            inputs = tuple(_inputs(self._config, self._stage))
            self._change(machine=run_facts.machine(), inputs=inputs)
        if failure is None:  # else whoever waits for the end need not wait for a store that may be gone
            changes["outputs"] = tuple(_found([self.record.output], identify))
        self._change(**changes)
        LOG.info("%s is %s after %.1f s", self.record.command, self.record.status, self.record.seconds)
        write_record(self.record)

    def _masked(self, text: str) -> str:
        return str(run_facts.without_secrets(text, self._secrets))

    def _change(self, **changes: object) -> None:
        self.record = self.record.model_copy(update=changes)


@contextmanager
def recorded(
    command: str, arguments: Sequence[str], config: JobConfig
) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Record the run inside the block, whose result is for the function that this yields.

    Nothing is recorded of a command that leaves nothing behind.
    """
    global _current  # noqa: PLW0603 - one process is one run
    result: dict[str, object] = {}
    if command not in STAGES:
        yield result.update
        return
    run = _tried(lambda: CurrentRun(command, arguments, config))
    failure: BaseException | None = None
    _current = run
    with _in_environment(run):
        try:
            yield result.update
        except BaseException as error:
            failure = error
            raise
        finally:
            _current = None
            if run is not None:
                _tried(partial(run.end, result, failure))


def cluster_is_there() -> None:
    """Ray is connected: what this process is a run of has begun."""
    run = _current
    if run is not None:
        _tried(lambda: run.begin(run_facts.cluster()))  # of which asking may fail, too


@contextmanager
def _in_environment(run: CurrentRun | None) -> Iterator[None]:
    """Workers of a cluster that the run starts inherit it."""
    if run is None:
        yield
        return
    before = {name: os.environ.pop(name) for name in (RUN_ID, STAGE) if name in os.environ}
    os.environ |= {RUN_ID: run.record.run, STAGE: run.record.command}
    try:
        yield
    finally:
        for name in (RUN_ID, STAGE):
            del os.environ[name]
        os.environ |= before


def _tried(call: Callable[[], Result]) -> Result | None:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - told, and the job goes on
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"ldm: this run's record is not kept: {said}", file=sys.stderr)
        return None


def _inputs(config: JobConfig, stage: RunStage) -> Iterator[Artifact]:
    for path in stage.inputs:
        yield from _found(values_at(config, path), identify)
    for path in stage.vaes:
        yield from _found(values_at(config, path), identify_vae)


def _found(sources: Sequence[str], identified: Callable[[str], Artifact | None]) -> Iterator[Artifact]:
    for source in sources:
        found = None
        # The job itself tells what it cannot read.
        with suppress(LdmError, OSError, ValueError, KeyError, TypeError):
            found = identified(source)
        if found is not None:
            yield found.model_copy(update={"url": str(run_facts.without_secrets(found.url))})


def _status(failure: BaseException | None) -> str:
    if failure is None:
        return "done"
    return "interrupted" if isinstance(failure, KeyboardInterrupt) else "failed"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
