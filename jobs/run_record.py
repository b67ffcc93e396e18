"""The record of a run: what ran, with what, on which inputs, and what came of it.

    OUTPUT.runs/<run id>.json    beside the output, never in it

Inside, it would change what an output is checked for: that a folder is new, the bytes of a dataset, what a
chain takes for complete. A run writes its own file and no other.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias
from uuid import uuid4

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, ValidationError

from ldm import storage
from ldm.errors import UserError
from pipelines.process import Process, is_dead
from pipelines.publish import publish

__all__ = [
    "RECORDS_SUFFIX",
    "Artifact",
    "Figure",
    "Machine",
    "RunRecord",
    "Status",
    "is_of_a_run",
    "new_run_id",
    "read_records",
    "records_folder",
    "write_record",
]

RECORDS_SUFFIX = ".runs"
FORMAT_VERSION: Final = 1
Status = Literal["running", "done", "failed", "interrupted"]
Figure: TypeAlias = int | float | str


class _Part(BaseModel):
    # What a later version adds is left out, so that old and new records stand in one table.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Artifact(_Part):
    """What a run read or made, by its fingerprint (`jobs.artifacts`).

    made_of: kind → fingerprint, as the files themselves say it: a dataset of its VAE, a checkpoint of its
    dataset and VAE.
    """

    kind: str
    url: str
    fingerprint: str
    made_of: dict[str, str] = {}


class Machine(_Part):
    """Where it ran: of a cluster, what that had at most while the run was connected."""

    host: str
    nodes: int = 1
    cpus: float = 0
    gpus: float = 0

    def at_most(self, later: "Machine") -> "Machine":
        """The larger of each."""
        most = {name: max(getattr(self, name), getattr(later, name)) for name in ("nodes", "cpus", "gpus")}
        return self.model_copy(update=most)


class RunRecord(_Part):
    """One run. line: as it was typed; config: every option, secrets masked; seconds: it took.

    commit: of the working tree that the code came from, with ``-dirty`` where that was changed.
    """

    format_version: Literal[1] = FORMAT_VERSION
    run: str
    command: str
    line: str
    config: dict[str, object]
    versions: dict[str, str]
    commit: str | None
    process: Process
    machine: Machine
    started: str
    ended: str | None = None
    seconds: float | None = None
    status: Status = "running"
    error: str | None = None
    inputs: tuple[Artifact, ...] = ()
    outputs: tuple[Artifact, ...] = ()
    output: str
    figures: dict[str, Figure] = {}

    @property
    def shown_status(self) -> str:
        """``killed`` where no end was recorded and the process, of this machine, is gone."""
        return "killed" if self.status == "running" and is_dead(self.process) else self.status


def new_run_id(now: datetime | None = None) -> str:
    """Sorts by time; two runs of one moment differ in the digits after it."""
    return f"{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid4().hex[:8]}"


def records_folder(output: str) -> tuple[AbstractFileSystem, str]:
    """Where the records of an output are, on its file system."""
    filesystem, path = storage.filesystem(output)
    if isinstance(filesystem, LocalFileSystem) or "/" in path.strip("/"):
        return filesystem, f"{path}{RECORDS_SUFFIX}"
    return filesystem, f"{path}/{RECORDS_SUFFIX}"  # a bucket has nothing beside it


def is_of_a_run(path: str) -> bool:
    """Whether a path inside of a folder is a record's, and no part of an output."""
    return any(part.endswith(RECORDS_SUFFIX) for part in path.split("/"))


def write_record(record: RunRecord) -> None:
    """Publish it beside its output, in place of what the same run has written before."""
    filesystem, folder = records_folder(record.output)
    data = f"{record.model_dump_json(indent=1)}\n".encode()
    publish(filesystem, f"{folder}/{record.run}.json", data)


def read_records(place: str) -> list[RunRecord]:
    """Those of an output, or of the outputs in a folder, by their start. UserError for a damaged one.

    place: an output, a folder that outputs are in, or a folder of records. A folder is not searched deeper.
    """
    filesystem, path = storage.filesystem(place)
    filesystem.invalidate_cache()
    found = [_read(filesystem, file) for file in _files(filesystem, path, records_folder(place)[1])]
    return sorted(found, key=lambda record: (record.started, record.run))


def _files(filesystem: AbstractFileSystem, path: str, beside: str) -> Iterator[str]:
    folders = [beside, path] if path.endswith(RECORDS_SUFFIX) else [beside]
    inside = [entry["name"].rstrip("/") for entry in _listed(filesystem, path)]
    folders += [name for name in inside if name.endswith(RECORDS_SUFFIX)]
    for folder in dict.fromkeys(folders):
        for entry in _listed(filesystem, folder):
            name = entry["name"].rpartition("/")[2]
            if name.endswith(".json") and not name.startswith("."):
                yield entry["name"]


def _listed(filesystem: AbstractFileSystem, folder: str) -> list[Mapping[str, str]]:
    """Nothing of what is not there, or is a file."""
    if not filesystem.isdir(folder):
        return []
    return list(filesystem.ls(folder, detail=True))


def _read(filesystem: AbstractFileSystem, path: str) -> RunRecord:
    try:
        return RunRecord.model_validate_json(filesystem.cat_file(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "JSON"
        said = f"{path} is no run record that this version reads ({where}: {problem['msg']})"
        raise UserError(said, do="remove it, or use the version that wrote it") from error
