"""Several commands take turns on the machine: while one runs, the others are stopped.

A machine's speed changes from one minute to the next, by more than the differences that are of interest
here. In turns of some seconds all commands meet the same machine.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

__all__ = ["Line", "Way", "rate_of", "take_turns"]

TURN_S = 10.0
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0
# Of a start: allocators, caches and the Ray cluster settle.
WARM_UP_LINES = 4
# A piece of work during which the command was stopped seems to last this many times as long, or more.
INTERRUPTED = 3.0

Line = Mapping[str, float]


@dataclass(frozen=True)
class Way:
    """A command (arguments of ``python``) that appends a JSON line to ``log`` for every few steps.

    Each line has ``steps_per_s``; all are of equally many steps, and of much less time than a turn.
    """

    arguments: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def take_turns(ways: Mapping[str, Way], seconds: float) -> dict[str, list[Line]]:
    """Run each way for ``seconds`` in turns; returns its lines without warm-up and interrupted ones.

    RuntimeError with the end of its log where a command ends by itself.
    """
    with _paused(ways) as running:
        # Forwards and back, so that a machine that slows down slows all of them.
        for turn in range(max(2, round(seconds / TURN_S))):
            for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
                running[name].signal(signal.SIGCONT)
                time.sleep(min(TURN_S, seconds))
                running[name].signal(signal.SIGSTOP)
                running[name].check()
    return {name: _uninterrupted(_lines(way.log)[WARM_UP_LINES:]) for name, way in ways.items()}


def rate_of(lines: Sequence[Line]) -> float:
    """Mean steps/s of lines of equally many steps."""
    return len(lines) / sum(1 / line["steps_per_s"] for line in lines)


class _Running:
    """A way at work, with what it printed on standard error."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, *way.arguments],
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            env={**os.environ, **way.environment},
        )

    def wait_until_warm(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(_lines(self.way.log)) < WARM_UP_LINES:
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self} did not begin within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.2)

    def check(self) -> None:
        if self.process.poll() is not None:
            self.errors.seek(0)
            end = self.errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{self} ended by itself:\n{end}")

    def signal(self, number: signal.Signals) -> list[psutil.Process]:
        return _signal(self.process.pid, number)

    def end(self) -> None:
        family = self.signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(family, timeout=END_TIMEOUT_S)
        self.errors.close()

    def __str__(self) -> str:
        return " ".join(self.way.arguments)


@contextmanager
def _paused(ways: Mapping[str, Way]) -> Iterator[dict[str, _Running]]:
    """All of them started, warm and stopped; killed at the end."""
    running: dict[str, _Running] = {}
    try:
        for name, way in ways.items():
            running[name] = _Running(way)
            running[name].wait_until_warm()
            running[name].signal(signal.SIGSTOP)
        yield running
    finally:
        for one in running.values():
            one.end()


def _signal(pid: int, number: signal.Signals) -> list[psutil.Process]:
    """To the process and to everything that it started; returns these."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    for member in family:
        try:
            member.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    return family


def _lines(log: Path) -> list[Line]:
    if not log.exists():
        return []
    whole, _, _ = log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _uninterrupted(lines: Sequence[Line]) -> list[Line]:
    usual = median(line["steps_per_s"] for line in lines)
    return [line for line in lines if line["steps_per_s"] > usual / INTERRUPTED]
