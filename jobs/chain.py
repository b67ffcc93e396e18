"""``ldm chain``: jobs in order, each once; again after any interruption to do what is missing."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.chain_file import Stage, read_chain
from jobs.config import JobConfig
from jobs.job_server import JobServer
from jobs.stage_record import StageRecords, stage_digest
from jobs.submit import show_log
from ldm.errors import LdmError

if TYPE_CHECKING:
    from jobs.job_client import JobClient

__all__ = ["ChainJob", "StageError"]

DIGEST_KEY = "ldm-stage"  # of a submitted job's metadata
STOP_S = 30.0


class StageError(LdmError):
    """A stage on this machine that did not end well. ``exit_status``: its own."""

    def __init__(self, stage: Stage, exit_status: int) -> None:
        self.exit_status = exit_status if exit_status > 0 else 128 - exit_status
        super().__init__(
            f"stage {stage.name} ended with status {self.exit_status}; run the chain again to go on"
        )


class ChainJob(JobServer, JobConfig):
    """Run the stages of the YAML file CHAIN in order, and skip those that are complete.

    A stage is complete if it ended well with the same options on the same input, and what it left is still
    there. Run it again after any interruption. With --address every stage is submitted to that cluster, else
    each runs here. docs/jobs.md describes the file.
    """

    chain: CliPositionalArg[Path] = Field(description="YAML file of stages")

    def run(self) -> dict[str, object]:
        """stage → complete (it was before), done, or running, of one that runs until it is stopped."""
        from ldm import storage
        from pipelines.lease import writer_lease

        on_cluster = self.address is not None
        chain = read_chain(self.chain)
        configs = chain.check(self.chain, on_cluster=on_cluster)
        client = self.connect() if on_cluster else None
        filesystem, root = storage.filesystem(chain.state)
        states: dict[str, str] = {}
        left: list[str] = []
        with writer_lease(filesystem, root, f"chain {self.chain}") as lease:
            for stage, config in zip(chain.stages, configs, strict=True):
                lease.check()
                digest = stage_digest(stage, config, left)
                states[stage.name], found = advance(
                    stage, digest, stage.records(config), StageRecords(filesystem, root), client
                )
                print(f"{stage.name}: {states[stage.name]}", flush=True)
                left += found
        return {"stages": states}


def advance(
    stage: Stage, digest: str, paths: Sequence[str], records: StageRecords, client: "JobClient | None"
) -> tuple[str, list[str]]:
    """Run a stage unless it is complete; returns its state, and fingerprints of what it left.

    LdmError where it does not end well.
    """
    found = records.left_by(stage, digest)
    if found is not None:
        return "complete", found
    if not records.was_published(stage, digest, paths):
        records.begin(stage, digest, paths)
        if client is None:
            run_here(stage)
        else:
            run_there(stage, digest, client, show_log)
    if stage.is_endless:
        return "done" if client is None else "running", []
    return "done", records.complete(stage, digest, paths)


def run_here(stage: Stage) -> None:
    """As ``ldm COMMAND``, in a process of its own on this machine."""
    print(f"{stage.name}: ldm {stage.command}", flush=True)
    command = [sys.executable, "-m", "jobs.cli", *stage.command.split(), "--config", "/dev/stdin"]
    with _sigterm_as_interrupt(), subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        try:
            process.communicate(yaml.safe_dump(stage.options))
        finally:
            # It is still there after an interruption only, and must not outlive the chain.
            if process.poll() is None:
                _end(process)
    if process.returncode:
        raise StageError(stage, process.returncode)


def run_there(stage: Stage, digest: str, client: "JobClient", show: Callable[[str], None]) -> None:
    """As a submitted job. One that an earlier run of the chain left running is followed, not doubled."""
    running = [
        details.submission_id
        for details in client.jobs()
        if (details.metadata or {}).get(DIGEST_KEY) == digest and not details.status.is_terminal()
    ]
    job_id = running[-1] if running else client.submit(stage, {"name": stage.name, DIGEST_KEY: digest})
    assert job_id is not None  # `jobs` lists those that have one
    print(f"{stage.name}: {'found' if running else 'submitted'} {job_id}", flush=True)
    if not stage.is_endless:
        client.follow(job_id, show)
        client.wait_for_success(job_id)


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
