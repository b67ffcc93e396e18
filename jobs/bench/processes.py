"""Memory of a command and of everything that it starts."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Measured", "run_measured"]

INTERVAL_S = 0.2


@dataclass(frozen=True)
class Measured:
    """output: of standard output; peak_mb: highest sum of the proportional set sizes of all processes.

    The proportional set size divides a page by the number of processes that share it, so that shared
    memory and libraries count once.
    """

    output: str
    seconds: float
    peak_mb: float
    started_at: float


def run_measured(
    arguments: Sequence[str], *, with_memory: bool = False, environment: Mapping[str, str] | None = None
) -> Measured:
    """Run ``python`` with these arguments; RuntimeError with the end of its log where it fails.

    with_memory: else peak_mb is 0. Looking at it costs the command some of its time. environment: beside
    that of this process.
    """
    started_at = time.time()
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as process:
        peaks = [0.0]
        if with_memory:
            threading.Thread(target=_watch, args=(process, peaks), daemon=True).start()
        output, log = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{log[-2000:]}")
    return Measured(output, time.time() - started_at, peaks[0], started_at)


def _watch(process: "subprocess.Popen[str]", peaks: list[float]) -> None:
    while process.poll() is None:
        peaks[0] = max(peaks[0], _tree_mb(process.pid))
        time.sleep(INTERVAL_S)


def _tree_mb(pid: int) -> float:
    try:
        family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(_pss_kb(member) for member in family) / 1024


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
