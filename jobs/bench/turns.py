"""Several commands take turns on the machine: while one runs, the others are stopped.

A machine's speed changes from one minute to the next, by more than the differences that are of interest
here. In turns of some seconds all commands meet the same machine.
"""

import json
import os
import signal
import subprocess
import sys
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
    with _paused(ways) as processes:
        # Forwards and back, so that a machine that slows down slows all of them.
        for turn in range(max(2, round(seconds / TURN_S))):
            for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
                _signal(processes[name], signal.SIGCONT)
                time.sleep(min(TURN_S, seconds))
                _signal(processes[name], signal.SIGSTOP)
                _check_runs(processes[name], ways[name])
    return {name: _uninterrupted(_lines(way.log)[WARM_UP_LINES:]) for name, way in ways.items()}


def rate_of(lines: Sequence[Line]) -> float:
    """Mean steps/s of lines of equally many steps."""
    return len(lines) / sum(1 / line["steps_per_s"] for line in lines)


@contextmanager
def _paused(ways: Mapping[str, Way]) -> "Iterator[dict[str, subprocess.Popen[bytes]]]":
    """All of them started, warm and stopped; killed at the end."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, way in ways.items():
            processes[name] = _start(way)
            _signal(processes[name], signal.SIGSTOP)
        yield processes
    finally:
        for process in processes.values():
            _signal(process, signal.SIGKILL)
            process.wait()


def _start(way: Way) -> "subprocess.Popen[bytes]":
    way.log.parent.mkdir(parents=True, exist_ok=True)
    with _errors_of(way).open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, *way.arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **way.environment},
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(_lines(way.log)) < WARM_UP_LINES:
        _check_runs(process, way)
        if time.monotonic() > deadline:
            _signal(process, signal.SIGKILL)
            raise RuntimeError(f"{' '.join(way.arguments)} did not begin within {START_TIMEOUT_S:.0f} s")
        time.sleep(0.2)
    return process


def _check_runs(process: "subprocess.Popen[bytes]", way: Way) -> None:
    if process.poll() is not None:
        end = _errors_of(way).read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(way.arguments)} ended by itself:\n{end}")


def _errors_of(way: Way) -> Path:
    return way.log.with_suffix(".stderr")


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """To the process and to everything that it started."""
    try:
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _lines(log: Path) -> list[Line]:
    if not log.exists():
        return []
    whole, _, _ = log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _uninterrupted(lines: Sequence[Line]) -> list[Line]:
    usual = median(line["steps_per_s"] for line in lines)
    return [line for line in lines if line["steps_per_s"] > usual / INTERRUPTED]
