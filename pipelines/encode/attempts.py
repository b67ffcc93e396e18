"""Which input killed its worker: marks that outlive a process, and a register of attempts at units.

Ray runs a unit again when its worker dies, without end and without saying why. So a worker marks, in
a file mapped into memory, which item it is about to touch; a store of eight bytes costs nothing and
survives SIGKILL. The next attempt at the unit asks the register (one Ray actor for each run) where the
last one ran, reads its mark on that node, and leaves out what was marked at two deaths. The death of a
whole node leaves no mark to read, so it accuses nobody.
"""

import mmap
import os
import struct
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ldm.errors import LdmError

__all__ = [
    "DEATHS_TO_CONVICT",
    "Attempt",
    "Attempts",
    "Mark",
    "Register",
    "UnitKillsWorkersError",
    "attempt",
    "start_register",
]

DEATHS_TO_CONVICT = 2
# Dying before the first item, again and again, is no input's fault: too little memory, a broken node.
MAX_DEATHS_OF_UNIT = 20
READ_MARK_TIMEOUT_S = 30.0
NOTHING = -1


class UnitKillsWorkersError(LdmError):
    """A unit's workers die and no input of it can be named."""


class Mark:
    """Eight bytes in a file: the item that its process is at, or `NOTHING`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(struct.pack("q", NOTHING))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)

    def at(self, item: int) -> None:
        """The process is about to touch this item."""
        struct.pack_into("q", self._map, 0, item)

    def close(self) -> None:
        """The attempt is over; the file goes."""
        self._map.close()
        self.path.unlink(missing_ok=True)

    @staticmethod
    def read(path: Path) -> int:
        """The item that a process died at; `NOTHING` where that cannot be known."""
        try:
            (item,) = struct.unpack("q", path.read_bytes())
        except (OSError, struct.error):
            return NOTHING
        path.unlink(missing_ok=True)
        return int(item)


@dataclass
class _Record:
    """Of one (stage, unit): where the running attempt's mark lies, deaths by item."""

    node: str = ""
    path: str = ""
    deaths: Counter[int] = field(default_factory=Counter)


class Attempts:
    """The register: one actor for each run. An attempt that began and did not end is a death."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], _Record] = defaultdict(_Record)

    def begin(self, stage: str, unit: str, node: str, path: str) -> tuple[str, str]:
        """Register an attempt; returns (node, mark) of one that did not end, or empty strings."""
        record = self._records[stage, unit]
        last = record.node, record.path
        record.node, record.path = node, path
        return last

    def died(self, stage: str, unit: str, item: int) -> dict[int, int]:
        """Count a death at ``item``; returns the unit's deaths by item."""
        record = self._records[stage, unit]
        record.deaths[item] += 1
        return dict(record.deaths)

    def done(self, stage: str, unit: str) -> None:
        """The attempt ended, well or with an exception."""
        self._records.pop((stage, unit), None)


# Ray types a handle's methods by the class; mypy loses the tuple that one of them returns.
Register: TypeAlias = Any


def start_register() -> Register:
    """The actor of a run, on its driver's node: it ends with the driver, and with no other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind: Any = ray.remote(Attempts)  # Ray's types know no such strategy
    return kind.options(num_cpus=0, scheduling_strategy=here).remote()


@dataclass(frozen=True)
class Attempt:
    """This attempt at a unit: how often its workers died at which item, and the mark to keep."""

    deaths: dict[int, int]
    mark: Mark

    def is_convicted(self, item: int) -> bool:
        """Whether ``item`` is to be left out."""
        return self.deaths.get(item, 0) >= DEATHS_TO_CONVICT


@contextmanager
def attempt(register: Register | None, stage: str, unit: str) -> Iterator[Attempt]:
    """Register an attempt at a unit for as long as the block runs; without a register, only mark.

    UnitKillsWorkersError where its workers died `MAX_DEATHS_OF_UNIT` times.
    """
    mark = Mark(_mark_path(stage, unit))
    try:
        yield Attempt(_deaths(register, stage, unit, mark) if register else {}, mark)
    finally:
        mark.close()
        if register:
            ray.get(register.done.remote(stage, unit))


def _deaths(register: Register, stage: str, unit: str, mark: Mark) -> dict[int, int]:
    here = ray.get_runtime_context().get_node_id()
    node, path = ray.get(register.begin.remote(stage, unit, here, str(mark.path)))
    if not path:
        return {}
    item = Mark.read(Path(path)) if node == here else _read_elsewhere(node, path)
    deaths: dict[int, int] = ray.get(register.died.remote(stage, unit, item))
    if sum(deaths.values()) > MAX_DEATHS_OF_UNIT:
        raise UnitKillsWorkersError(
            f"unit {unit} has killed {MAX_DEATHS_OF_UNIT} {stage} workers, and not at one input; "
            f"look for out-of-memory kills in Ray's logs"
        )
    return deaths


def _read_elsewhere(node: str, path: str) -> int:
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    with suppress(RayError):  # the node is gone, and its mark with it
        reading = ray.remote(Mark.read).options(num_cpus=0, scheduling_strategy=where).remote(Path(path))
        return int(ray.get(reading, timeout=READ_MARK_TIMEOUT_S))
    return NOTHING


def _mark_path(stage: str, unit: str) -> Path:
    """A name of this attempt's own: two may overlap, when Ray takes a slow worker for dead."""
    folder = Path(tempfile.gettempdir()) / f"ldm-marks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix=f"{stage}-{unit[-40:]}-", dir=folder)
    os.close(descriptor)
    return Path(path)
