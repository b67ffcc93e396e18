"""One writer per dataset: whoever holds the lease may write, and everybody else is told who does.

    writers/<generation>.json    who holds, or last held, the lease; the highest generation counts

A lease is taken over by creating the next generation, which the store lets only one process do. A
single file that is deleted and made again could not do this: of two processes that find it expired,
the slower one would delete the lease that the faster one has just made.
"""

import contextlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Event, Thread

from fsspec import AbstractFileSystem
from pydantic import BaseModel, ConfigDict, ValidationError

from ldm.errors import UserError
from pipelines.process import Process, is_dead, this_process
from pipelines.publish import create, publish

__all__ = ["Lease", "LeaseTiming", "writer_lease"]

TRIES = 20


@dataclass(frozen=True)
class LeaseTiming:
    """A lease is renewed every renew_s, and free when nobody renewed it for expire_s, in seconds."""

    renew_s: float = 5.0
    expire_s: float = 30.0


class _Holder(BaseModel):
    """``writers/<generation>.json``. ``renewed_at`` is the holder's clock: for people, and to change."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    run: str
    process: Process
    since: str
    renewed_at: str
    renewals: int = 0
    released: bool = False


class Lease:
    """A lease that is held; `check` it between units."""

    def __init__(self, folder: "_Folder", generation: int, holder: _Holder, timing: LeaseTiming) -> None:
        self._folder, self._generation, self._holder, self._timing = folder, generation, holder, timing
        self._renewed_s = time.monotonic()
        self._taken, self._ending = Event(), Event()
        self._thread = Thread(target=self._renew_until_end, name="writer-lease", daemon=True)
        self._thread.start()

    @property
    def is_held(self) -> bool:
        """False once another process may write: it took the lease, or ours is too old to be sure."""
        age_s = time.monotonic() - self._renewed_s
        return not self._taken.is_set() and age_s < self._timing.expire_s

    def check(self) -> None:
        """UserError where the lease is lost. Looks at nothing but memory: call it as often as you like."""
        if not self.is_held:
            raise UserError(
                f"{self._folder.what}: this run lost the right to write, because it could not renew it "
                f"for {self._timing.expire_s:g} s or another run took over",
                do="see that one run writes, and start again: what is committed stays",
            )

    def _renew_until_end(self) -> None:
        while not self._ending.wait(self._timing.renew_s) and not self._taken.is_set():
            # A store that fails for a while is no reason to stop; the age of the last renewal is.
            with contextlib.suppress(OSError, UserError):
                self._renew()

    def _renew(self) -> None:
        started_s = time.monotonic()
        if self._folder.latest_generation() != self._generation:
            self._taken.set()
            return
        renewals = {"renewed_at": _now(), "renewals": self._holder.renewals + 1}
        self._holder = self._holder.model_copy(update=renewals)
        self._folder.write(self._generation, self._holder)
        self._renewed_s = started_s

    def _end(self) -> None:
        self._ending.set()
        self._thread.join(self._timing.expire_s)
        if self.is_held and not self._thread.is_alive():
            # Unreleased, it is still free when its process is dead or it expires.
            with contextlib.suppress(OSError, UserError):
                released = self._holder.model_copy(update={"released": True})
                self._folder.write(self._generation, released)


@contextlib.contextmanager
def writer_lease(
    filesystem: AbstractFileSystem, root: str, what: str, timing: LeaseTiming | None = None
) -> Iterator[Lease]:
    """Hold the one right to write below ``root``, a folder on ``filesystem``.

    what: how an error names the folder. UserError where another process holds the right, at once if
    that runs on this machine, else as soon as it renews; where the right was lost, at the latest at
    the end of the block. Of a dead process on this machine the right is taken over at once, of
    another machine after `LeaseTiming.expire_s` without a sign of life, by this machine's clock.
    """
    timing = timing or LeaseTiming()
    lease = _acquire(_Folder(filesystem, f"{root}/writers", what), timing)
    try:
        yield lease
        lease.check()
    finally:
        lease._end()


@dataclass(frozen=True)
class _Folder:
    filesystem: AbstractFileSystem
    path: str
    what: str

    def generations(self) -> list[int]:
        """Ascending. A missing folder has none."""
        self.filesystem.invalidate_cache(self.path)
        try:
            names = [path.rsplit("/", 1)[-1] for path in self.filesystem.ls(self.path, detail=False)]
        except FileNotFoundError:
            return []
        stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def latest_generation(self) -> int:
        """0 where there has been no lease yet."""
        return max(self.generations(), default=0)

    def file(self, generation: int) -> str:
        return f"{self.path}/{generation:08d}.json"

    def read(self, generation: int) -> _Holder | None:
        """None where it is gone, because a later generation removed it."""
        try:
            return _Holder.model_validate_json(self.filesystem.cat_file(self.file(generation)))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            do = "remove it if no job writes there"
            raise UserError(f"{self.file(generation)} is no lease that this version reads", do=do) from error

    def write(self, generation: int, holder: _Holder) -> None:
        publish(self.filesystem, self.file(generation), _json(holder))

    def remove(self, generations: list[int]) -> None:
        for generation in generations:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(self.file(generation))


def _acquire(folder: _Folder, timing: LeaseTiming) -> Lease:
    for _ in range(TRIES):
        latest = folder.latest_generation()
        if latest:
            _wait_until_free(folder, latest, timing)
        holder = _Holder(run=uuid.uuid4().hex, process=this_process(), since=_now(), renewed_at=_now())
        if create(folder.filesystem, folder.file(latest + 1), _json(holder)):
            *older, newest = folder.generations()
            if newest == latest + 1:
                folder.remove(older)
                return Lease(folder, newest, holder, timing)
            # Between our look and our file, others came and went: theirs is the count that holds.
            folder.remove([latest + 1])
    raise UserError(f"{folder.what}: too many runs want to write at once", do="start one of them only")


def _wait_until_free(folder: _Folder, generation: int, timing: LeaseTiming) -> None:
    """Return when nobody holds this generation any more; UserError as soon as somebody surely does."""
    first = folder.read(generation)
    deadline_s = time.monotonic() + timing.expire_s
    while True:
        holder = folder.read(generation)
        if holder is None or holder.released or is_dead(holder.process):
            return
        # The holder's clock may be wrong, so its times are not compared with ours, only seen to change.
        if holder != first or holder.process.is_here():
            raise _refusal(folder.what, holder)
        if time.monotonic() > deadline_s:
            return
        time.sleep(min(1.0, timing.renew_s / 5))


def _refusal(what: str, holder: _Holder) -> UserError:
    process = holder.process
    return UserError(
        f"{what} is being written by process {process.pid} on {process.host} since {holder.since}",
        do="wait for that run to end, or stop it",
    )


def _json(holder: _Holder) -> bytes:
    return f"{holder.model_dump_json(indent=1)}\n".encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
