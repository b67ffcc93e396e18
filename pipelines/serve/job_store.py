"""The store of long jobs: what outlives every process of the server, and who may see what of it.

    <id>/job.json, done.json  how far it is, and how it ended (`pipelines.serve.job_folders`)
    <id>/cancel               empty: somebody wants it to end; so clients never write what runners write
    <id>/preview.png, result.<png|jpeg|webp>
    <id>/tiles.dzi, tiles_files/<level>/<x>_<y>.jpg

Of two runners on one job the first that ends it wins; the other is told by `JobFinished`. The files may be
of either: each appears whole, and both made it from the same request and seed.
"""

import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

from pydantic import JsonValue

from pipelines.publish import create, publish
from pipelines.serve.job_folders import CONCURRENT_FILES, JobFolders
from pipelines.serve.job_record import ContentType, JobFinished, JobNotFound, JobRecord, Status, TooManyJobs

__all__ = ["JobFinished", "JobNotFound", "JobRecord", "JobStore", "Result", "TooManyJobs"]

CANCEL, PREVIEW, DZI = "cancel", "preview.png", "tiles.dzi"
# Larger coordinates are of no tile, and would end as names that are too long.
MAX_COORDINATE = 2**20


class Result(NamedTuple):
    """An image file; close ``stream``."""

    stream: IO[bytes]
    size_bytes: int
    content_type: ContentType


class JobStore:
    """The jobs below one folder; safe in threads, and in any number of processes.

    url: a local folder or ``s3://``. max_jobs: unfinished ones of a principal, max_unfinished: of all. Both
    are exact in one process; several that create at the same moment may exceed them by one each. clock:
    seconds since 1970.

    Methods with a ``principal`` are for clients: another's job, an expired one and an id that cannot be
    raise `JobNotFound`. Those without are for runners.
    """

    def __init__(
        self,
        url: str,
        *,
        max_jobs: int = 20,
        max_unfinished: int = 200,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folders = JobFolders(url)
        self.max_jobs, self.max_unfinished, self._clock = max_jobs, max_unfinished, clock
        self._creating = threading.Lock()

    def create(self, request: dict[str, JsonValue], principal: str, seed: int, ttl_s: float) -> JobRecord:
        """A queued job. Raises `TooManyJobs`."""
        now = self._clock()
        record = JobRecord(
            id=uuid.uuid4().hex,
            created_at=now,
            updated_at=now,
            ttl_s=ttl_s,
            principal=principal,
            request=request,
            seed=seed,
        )
        with self._creating:
            self._check_room(principal)
            self._folders.store(record)
        return record

    def read(self, job_id: str, principal: str) -> JobRecord:
        """A damaged one has failed, and is shown to whoever knows its id."""
        record = self._folders.load(job_id)
        if record.principal not in (None, principal) or record.has_expired(self._clock()):
            raise JobNotFound(job_id)
        return record

    def update(self, record: JobRecord) -> JobRecord:
        """Store it, with the times set. Raises `JobFinished`, also for the second one that ends a job.

        Raises `JobNotFound` where it ended so long ago that it was removed.
        """
        self._check_unfinished(record.id)
        now = self._clock()
        if not record.is_finished:
            stored = record.revised(updated_at=now)
            self._folders.store(stored)
            return stored
        stored = record.revised(updated_at=now, expires_at=now + record.ttl_s)
        if not self._folders.end(stored):
            raise JobFinished(record.id)
        return stored

    def list(self, principal: str) -> Sequence[JobRecord]:
        """Newest first."""
        now = self._clock()
        jobs = reversed(self._folders.all())
        return [job for job in jobs if job.principal == principal and not job.has_expired(now)]

    def unfinished(self) -> Sequence[JobRecord]:
        """Oldest first: what a runner takes up when it starts."""
        return [job for job in self._folders.all() if not job.is_finished]

    def counts(self) -> Counter[Status]:
        """Jobs by status, expired ones too as long as they are there."""
        return Counter(job.status for job in self._folders.all())

    def cancel(self, job_id: str, principal: str) -> JobRecord:
        """Ask its runner to end it, unless it has ended; the job as it is now."""
        record = self.read(job_id, principal)
        if not record.is_finished:
            create(self._folders.files, self._folders.path(job_id, CANCEL), b"")
        return record

    def is_cancelled(self, job_id: str) -> bool:
        """Whether somebody asked for its end."""
        return bool(self._folders.files.exists(self._folders.path(job_id, CANCEL)))

    def put_preview(self, job_id: str, png: bytes) -> None:
        """Replaces the one before. Raises `JobFinished`."""
        self._put(job_id, PREVIEW, png)

    def preview(self, job_id: str, principal: str) -> bytes | None:
        """A PNG file, or None where there is none yet."""
        self.read(job_id, principal)
        try:
            return self._folders.content(job_id, PREVIEW)
        except JobNotFound:
            return None

    def put_result(self, job_id: str, image: bytes | Path, content_type: ContentType) -> None:
        """An image file, or the path of a local one, which need not fit into memory. Raises `JobFinished`."""
        if isinstance(image, bytes):
            self._put(job_id, _result_name(content_type), image)
        else:
            self._check_unfinished(job_id)
            self._folders.put_file(job_id, _result_name(content_type), image)

    def open_result(self, job_id: str, principal: str) -> Result:
        """The image of a completed job, else `JobNotFound`."""
        content_type = self._completed(job_id, principal).content_type
        if content_type is None:
            raise JobNotFound(job_id)
        try:
            stream = self._folders.files.open(self._folders.path(job_id, _result_name(content_type)), "rb")
        except FileNotFoundError as error:
            raise JobNotFound(job_id) from error
        size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        return Result(stream, size_bytes, content_type)

    def put_tiles(self, job_id: str, folder: Path) -> None:
        """What `pipelines.serve.deep_zoom.write_tiles` made, ``tiles.dzi`` last. Raises `JobFinished`."""
        self._check_unfinished(job_id)

        def put(tile: Path) -> None:
            path = self._folders.path(job_id, tile.relative_to(folder).as_posix())
            publish(self._folders.files, path, tile.read_bytes())

        with ThreadPoolExecutor(CONCURRENT_FILES) as pool:
            for _ in pool.map(put, folder.glob("tiles_files/*/*.jpg")):
                pass
        put(folder / DZI)

    def dzi(self, job_id: str, principal: str) -> bytes:
        """The XML that describes the tiles of a completed job, else `JobNotFound`."""
        self._completed(job_id, principal)
        return self._folders.content(job_id, DZI)

    def tile(self, job_id: str, principal: str, level: int, x: int, y: int) -> bytes:
        """A JPEG file of a completed job, else `JobNotFound`."""
        self._completed(job_id, principal)
        if not all(0 <= number < MAX_COORDINATE for number in (level, x, y)):
            raise JobNotFound(job_id)
        return self._folders.content(job_id, f"tiles_files/{level:d}/{x:d}_{y:d}.jpg")

    def expire(self, now: float) -> int:
        """Remove what has ended and expired at ``now``; how many, of which others may count some too."""
        expired = [job.id for job in self._folders.all() if job.has_expired(now)]
        return sum(self._folders.remove(job_id) for job_id in expired)

    def _check_room(self, principal: str) -> None:
        principals = [job.principal for job in self.unfinished()]
        if principals.count(principal) >= self.max_jobs:
            raise TooManyJobs("principal", self.max_jobs)
        if len(principals) >= self.max_unfinished:
            raise TooManyJobs("server", self.max_unfinished)

    def _check_unfinished(self, job_id: str) -> None:
        if self._folders.load(job_id).is_finished:
            raise JobFinished(job_id)

    def _put(self, job_id: str, name: str, data: bytes) -> None:
        self._check_unfinished(job_id)
        publish(self._folders.files, self._folders.path(job_id, name), data)

    def _completed(self, job_id: str, principal: str) -> JobRecord:
        record = self.read(job_id, principal)
        if record.status != "completed":
            raise JobNotFound(job_id)
        return record


def _result_name(content_type: ContentType) -> str:
    return content_type.replace("image/", "result.")
