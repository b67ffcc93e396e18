"""The latent dataset: the folder in which ENCODE and TRAIN meet.

    dataset.json                   what the latents are: written first, never changed
    data/<bucket>/<unit>.parquet   posterior moments (pipelines.latent_table)
    quarantine/<unit>.parquet      inputs that could not be encoded
    commits/<unit>.json            written last: a row exists if and only if its unit is committed
    stats.json, manifest.parquet   derived from the commits; `write_derived` rebuilds them

The folder may lie on any fsspec file system. Files are never listed to find rows: commits are.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from pydantic import BaseModel, ConfigDict, ValidationError

from ldm.errors import UserError
from ldm.images import Preprocess
from pipelines.publish import publish

if TYPE_CHECKING:
    from ldm.latents import LatentStats

__all__ = ["Commit", "DataFile", "DatasetHeader", "LatentDataset", "StoredStats"]

FORMAT_VERSION: Final = 1
COMMITS_PER_READ = 1000


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def json_bytes(self) -> bytes:
        """UTF-8 JSON that depends on the values alone."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, indent=1)
        return f"{text}\n".encode()


class DatasetHeader(_Record):
    """``dataset.json``: everything that the stored bytes depend on, apart from the images.

    ``vae`` says where the VAE was loaded from. It is for people: the fingerprint is what counts.
    """

    format_version: Literal[1] = FORMAT_VERSION
    vae: str
    vae_fingerprint: str
    f: int
    channels: int
    dtype: Literal["float16"] = "float16"
    stored: Literal["moments"] = "moments"
    preprocess: Preprocess
    unit_size: int
    class_names: tuple[str, ...] | None = None

    def differences(self, other: "DatasetHeader") -> list[str]:
        """``name: mine, not theirs`` for every field in which the two differ, nested ones too."""
        mine, theirs = _flat(self.model_dump(exclude={"vae"})), _flat(other.model_dump(exclude={"vae"}))
        names = sorted(mine.keys() | theirs.keys())
        return [f"{n}: {mine.get(n)}, not {theirs.get(n)}" for n in names if mine.get(n) != theirs.get(n)]


class StoredStats(_Record):
    """`ldm.latents.LatentStats` as JSON: per-channel mean and sum of squared deviations."""

    count: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]


class DataFile(_Record):
    """A file of one unit: path inside the dataset, size, digest, rows."""

    path: str
    bytes: int
    sha256: str
    rows: int


class Commit(_Record):
    """``commits/<unit>.json``: what one unit gave. rows + quarantined = inputs.

    stats is None where the unit has no row; quarantined counts inputs by reason.
    """

    unit: str
    shard: str
    shard_version: str
    index: int
    is_final: bool
    num_inputs: int
    num_rows: int
    num_quarantined: int
    quarantined: dict[str, int]
    files: tuple[DataFile, ...]
    quarantine_file: DataFile | None
    stats: StoredStats | None


class Totals(NamedTuple):
    """Sums over commits; ``bytes`` counts data files only."""

    units: int
    inputs: int
    rows: int
    bytes: int
    quarantined: dict[str, int]


class LatentDataset:
    """A latent dataset folder. Get one from `create_or_check` (to write) or `open` (to read)."""

    def __init__(self, url: str, header: DatasetHeader) -> None:
        self.filesystem, self.root = _folder(url)
        self.url: str = self.filesystem.unstrip_protocol(self.root)
        self.header = header

    @classmethod
    def create_or_check(cls, url: str | Path, header: DatasetHeader) -> "LatentDataset":
        """The dataset at ``url``, made if it is not there.

        UserError where there is one with another VAE, preprocessing or unit size: rows of two
        kinds in one dataset would never be noticed again.
        """
        dataset = cls(str(url), header)
        stored = read_header(dataset.filesystem, dataset.root)
        if stored is None:
            publish(dataset.filesystem, dataset.path("dataset.json"), header.json_bytes())
        elif differences := stored.differences(header):
            raise UserError(
                f"{url} holds latents of another kind ({'; '.join(differences)})",
                do="encode into another folder, or with the settings of this one",
            )
        return dataset

    @classmethod
    def open(cls, url: str | Path) -> "LatentDataset":
        """The dataset at ``url``. UserError where there is none, or nothing is committed in it."""
        filesystem, root = _folder(str(url))
        if not filesystem.exists(root):
            raise UserError(f"no such latent dataset: {url}", do="make one with ldm encode")
        header = read_header(filesystem, root)
        if header is None:
            raise UserError(
                f"{url} is no latent dataset: it has no dataset.json", do="make one with ldm encode"
            )
        dataset = cls(str(url), header)
        if not dataset.committed_units():
            raise UserError(f"latent dataset {url} is empty: nothing is committed", do="run ldm encode again")
        return dataset

    def path(self, *parts: str) -> str:
        """Path of something in the folder, as the file system wants it."""
        return "/".join((self.root, *parts))

    def publish(self, path: str, data: bytes, rows: int) -> DataFile:
        """Write one file of a unit, ``path`` inside the dataset; it counts once a commit names it."""
        publish(self.filesystem, self.path(path), data)
        return DataFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)

    def commit(self, commit: Commit) -> None:
        """Make a unit's rows exist. Its files must be published already."""
        publish(self.filesystem, self.path("commits", f"{commit.unit}.json"), commit.json_bytes())

    def committed_units(self) -> list[str]:
        """Ids of all committed units, sorted. One listing; no commit is read."""
        folder = self.path("commits")
        self.filesystem.invalidate_cache(folder)
        if not self.filesystem.exists(folder):
            return []
        names = (path.rsplit("/", 1)[-1] for path in self.filesystem.ls(folder, detail=False))
        return sorted(name[: -len(".json")] for name in names if name.endswith(".json") and name[0] != ".")

    def commits(self, units: Sequence[str] | None = None) -> Iterator[Commit]:
        """The commits of these units (default: of all, sorted by unit), a bounded number at a time."""
        names = self.committed_units() if units is None else units
        for start in range(0, len(names), COMMITS_PER_READ):
            paths = [self.path("commits", f"{unit}.json") for unit in names[start : start + COMMITS_PER_READ]]
            # cat_ranges reads in parallel where the store can, and takes names as they are: cat expands "[".
            for content in self.filesystem.cat_ranges(paths, None, None, on_error="return"):
                if isinstance(content, Exception):
                    raise content
                yield Commit.model_validate_json(content)

    def totals(self) -> Totals:
        """Units, inputs, rows, bytes and quarantined inputs by reason, over all commits."""
        units = inputs = rows = size = 0
        quarantined: Counter[str] = Counter()
        for commit in self.commits():
            units, inputs, rows = units + 1, inputs + commit.num_inputs, rows + commit.num_rows
            size += sum(file.bytes for file in commit.files)
            quarantined.update(commit.quarantined)
        return Totals(units, inputs, rows, size, dict(sorted(quarantined.items())))

    def stats(self) -> "LatentStats | None":
        """Statistics of all committed rows, merged in unit order; None where there is no row."""
        # The stages that only write import no torch.
        from ldm.latents import LatentStats

        stored = (commit.stats for commit in self.commits())
        parts = [LatentStats(s.count, s.mean, s.m2) for s in stored if s is not None]
        return LatentStats.merge_all(parts) if parts else None

    def manifest(self) -> pa.Table:
        """One row per committed data file, in unit order: unit, shard, bucket, path, rows, bytes, sha256."""
        rows = [
            {"unit": c.unit, "shard": c.shard, "bucket": file.path.split("/")[1], **file.model_dump()}
            for c in self.commits()
            for file in c.files
        ]
        text = ("unit", "shard", "bucket", "path", "sha256")
        schema = pa.schema([*((n, pa.string()) for n in text), ("rows", pa.int64()), ("bytes", pa.int64())])
        return pa.Table.from_pylist(rows, schema=schema)

    def write_derived(self) -> None:
        """Rebuild ``stats.json`` and ``manifest.parquet`` from the commits."""
        totals, stats = self.totals(), self.stats()
        summary: dict[str, object] = totals._asdict()
        if stats is not None:
            summary |= {"count": stats.count, "mean": stats.mean_C, "std": stats.std_C, "m2": stats.m2_C}
            summary["scaling_factor"] = stats.scaling_factor
        text = json.dumps(summary, sort_keys=True, indent=1)
        publish(self.filesystem, self.path("stats.json"), f"{text}\n".encode())
        buffer = io.BytesIO()
        pq.write_table(self.manifest(), buffer, compression="zstd", write_page_checksum=True)
        publish(self.filesystem, self.path("manifest.parquet"), buffer.getvalue())


def read_header(filesystem: AbstractFileSystem, root: str) -> DatasetHeader | None:
    """The ``dataset.json`` of a folder, or None. UserError where it cannot be understood."""
    path = f"{root}/dataset.json"
    if not filesystem.exists(path):
        return None
    try:
        return DatasetHeader.model_validate_json(filesystem.cat_file(path))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "JSON"
        raise UserError(
            f"{path} is not a dataset.json that this version reads ({where}: {error.errors()[0]['msg']})",
            allowed=f"format version {FORMAT_VERSION}",
        ) from error


def _folder(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        filesystem, root = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot use {url} as a folder: {error}") from error
    return filesystem, root.rstrip("/")


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
