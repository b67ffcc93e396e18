"""Jobs as folders, on any fsspec file system: which record counts, what is listed, what is removed first.

    <id>/job.json     how far it is; its runner writes it
    <id>/done.json    how it ended; made once, and from then on it counts instead of job.json
    <id>/…            what `pipelines.serve.job_store` puts there

After a network split two runners may work on one job. job.json is then of the one or the other. done.json
is made by `pipelines.publish.create`: exactly one of them ends the job, and nothing that is written to
job.json later is seen.

Removal takes done.json last. Half removed, a job is still one that has ended and has expired, which nobody
is shown. It never looks unfinished, so that no runner takes it up.
"""

import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from ldm.storage import filesystem
from pipelines.publish import create, publish
from pipelines.serve.job_record import JOB_ID, JobNotFound, JobRecord

__all__ = ["CONCURRENT_FILES", "JobFolders"]

PROGRESS, DONE = "job.json", "done.json"
CONCURRENT_FILES = 16
DAMAGED_TTL_S = 86400.0
MAX_CACHED = 1024


class JobFolders:
    """The jobs below ``url``, a local folder or any fsspec URL. Safe in threads and processes."""

    def __init__(self, url: str) -> None:
        self.files, self._root = filesystem(url)
        # What has ended never changes, so that a listing reads the unfinished and what is new.
        self._ended = lru_cache(MAX_CACHED)(self._read_ended)

    def path(self, job_id: str, name: str = "") -> str:
        """The only place where an id becomes part of a path. `JobNotFound` where it has another form."""
        if not JOB_ID.fullmatch(job_id):
            raise JobNotFound(job_id)
        return f"{self._root}/{job_id}/{name}".rstrip("/")

    def store(self, record: JobRecord) -> None:
        """How far it is."""
        publish(self.files, self.path(record.id, PROGRESS), record.json_bytes())

    def end(self, record: JobRecord) -> bool:
        """How it ended; False where it had ended already."""
        return create(self.files, self.path(record.id, DONE), record.json_bytes())

    def load(self, job_id: str) -> JobRecord:
        """The record that counts; one that has failed in place of a damaged one. `JobNotFound`."""
        for read in (self._ended, self._read_progress):
            with suppress(FileNotFoundError):
                return read(job_id)
        raise JobNotFound(job_id)

    def all(self) -> list[JobRecord]:
        """Oldest first, expired or not."""
        self.files.invalidate_cache(self._root)
        try:
            paths = self.files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
        with ThreadPoolExecutor(CONCURRENT_FILES) as pool:
            records = [*pool.map(self._load_if_there, filter(JOB_ID.fullmatch, names))]
        there = [record for record in records if record is not None]
        return sorted(there, key=lambda record: (record.created_at, record.id))

    def content(self, job_id: str, name: str) -> bytes:
        """A file of the job. `JobNotFound` where there is none."""
        try:
            return bytes(self.files.cat_file(self.path(job_id, name)))
        except FileNotFoundError as error:
            raise JobNotFound(job_id) from error

    def put_file(self, job_id: str, name: str, file: Path) -> None:
        """As `publish`, of a local file that need not fit into memory, for a job that is there.

        To S3 in parts of 50 MiB, or at once below 100 MiB. Parts of an upload that is killed are in no
        listing: a bucket wants a rule that removes them.
        """
        path = self.path(job_id, name)
        if not isinstance(self.files, LocalFileSystem):
            self.files.put_file(str(file), path)
            return
        partial = Path(path).with_name(f".{name}.{uuid.uuid4().hex}.partial")
        try:
            shutil.copyfile(file, partial)
            _sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def remove(self, job_id: str) -> bool:
        """One that has ended; whether all of it went. Killed on the way, it is to be called again."""
        folder, records = self.path(job_id), [self.path(job_id, name) for name in (PROGRESS, DONE)]
        # Another process may be removing the same: what it took is not found.
        with suppress(FileNotFoundError):
            for path in self._entries(folder).difference(records):
                self.files.rm(path, recursive=True)
            # S3's removal of many is silent about those that it failed to remove.
            if self._entries(folder).difference(records):
                return False
        for path in records:
            with suppress(FileNotFoundError):
                self.files.rm_file(path)
        with suppress(FileNotFoundError):
            self.files.rm(folder, recursive=True)
        self._ended.cache_clear()
        return True

    def _entries(self, folder: str) -> set[str]:
        self.files.invalidate_cache(folder)
        return {path.rstrip("/") for path in self.files.ls(folder, detail=False)}

    def _read_ended(self, job_id: str) -> JobRecord:
        return self._read(job_id, DONE)

    def _read_progress(self, job_id: str) -> JobRecord:
        return self._read(job_id, PROGRESS)

    def _read(self, job_id: str, name: str) -> JobRecord:
        """FileNotFoundError where there is no such file."""
        path = self.path(job_id, name)
        data = self.files.cat_file(path)
        with suppress(ValueError):
            record = JobRecord.model_validate_json(data)
            if record.id == job_id and record.is_finished == (name == DONE):
                return record
        return _damaged(job_id, self.files.modified(path).timestamp())

    def _load_if_there(self, job_id: str) -> JobRecord | None:
        with suppress(JobNotFound):
            return self.load(job_id)
        return None


def _damaged(job_id: str, modified_at: float) -> JobRecord:
    """In place of a record that cannot be read."""
    return JobRecord(
        id=job_id,
        created_at=modified_at,
        updated_at=modified_at,
        expires_at=modified_at + DAMAGED_TTL_S,
        ttl_s=DAMAGED_TTL_S,
        principal=None,
        request={},
        seed=0,
        status="failed",
        error="the record of this job is damaged",
    )


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
