"""Which process is this, and is that one still alive? Numbers of processes are used again."""

import os
import socket
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

__all__ = ["Process", "is_dead", "this_process"]


class Process(BaseModel):
    """A process, told apart from every other one on any machine.

    ``space`` is the machine's boot and the container in which ``pid`` counts: containers may share
    a host name, and not their process ids. Empty where the system does not say (no ``/proc``).
    ``started`` is in clock ticks after the boot.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str
    space: str
    pid: int
    started: int

    def is_here(self) -> bool:
        """Whether its process id means something in this process."""
        return bool(self.space) and self.space == _space()


def this_process() -> Process:
    """The calling process."""
    pid = os.getpid()
    return Process(host=socket.gethostname(), space=_space(), pid=pid, started=_started(pid) or 0)


def is_dead(process: Process) -> bool:
    """True if it surely runs no more. False too for a process of another machine or container."""
    return process.is_here() and _started(process.pid) != process.started


@cache
def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Start time in ticks; None where no such process runs, or is dead and its parent has not noticed."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # man proc_pid_stat: "pid (name) state ...", the start is field 22, a name may hold spaces and brackets.
    state, *fields = stat.rsplit(")", 1)[1].split()
    return None if state in "ZX" else int(fields[18])
