"""The latent dataset: the folder in which ENCODE and TRAIN meet.

    dataset.json                   what the latents are: written first, never changed
    data/<bucket>/<unit>.parquet   posterior moments (pipelines.latent_table)
    quarantine/<unit>.parquet      inputs that could not be encoded
    commits/<unit>.json            written last: a row exists if and only if its unit is committed
    versions/<shard>.json          for a shard that was edited: which version's units count
    text/<unit>.parquet            embeddings of its captions (pipelines.text_table)
    stats.json, manifest.parquet   derived from the commits; `write_derived` rebuilds them

The folder may lie on any fsspec file system. Files are never listed to find rows: commits are.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from pydantic import ValidationError

from ldm import storage
from ldm.errors import UserError
from pipelines.dataset_records import FORMAT_VERSION, Commit, DataFile, DatasetHeader
from pipelines.derived import Derived, derive, units_sha256
from pipelines.publish import create, publish
from pipelines.unit_ids import parse_unit_id

__all__ = ["LatentDataset", "read_header"]

FILES_PER_READ = 1000


class LatentDataset:
    """A latent dataset folder. Get one from `create_or_check` (to write) or `open` (to read)."""

    def __init__(self, url: str, header: DatasetHeader) -> None:
        self.filesystem, self.root = storage.filesystem(url)
        self.url: str = self.filesystem.unstrip_protocol(self.root)
        self.header = header

    @classmethod
    def check(cls, url: str | Path, header: DatasetHeader) -> "LatentDataset":
        """The dataset at ``url`` as a job with this header would write it; nothing is made.

        UserError where there is one with another VAE, preprocessing or unit size: rows of two
        kinds in one dataset would never be noticed again.
        """
        dataset = cls(str(url), header)
        stored = read_header(dataset.filesystem, dataset.root)
        if stored is not None and (differences := stored.differences(header)):
            raise UserError(
                f"{url} holds latents of another kind ({'; '.join(differences)})",
                do="encode into another folder, or with the settings of this one",
            )
        return dataset

    @classmethod
    def create_or_check(cls, url: str | Path, header: DatasetHeader) -> "LatentDataset":
        """As `check`, and the dataset is made if it is not there."""
        dataset = cls(str(url), header)
        path = dataset.path("dataset.json")
        # Of two jobs that find no dataset at the same time, one makes it and the other reads what it is.
        if not dataset.filesystem.exists(path):
            create(dataset.filesystem, path, header.json_bytes())
        return cls.check(url, header)

    @classmethod
    def open(cls, url: str | Path) -> "LatentDataset":
        """The dataset at ``url``. UserError where there is none, or nothing is committed in it."""
        filesystem, root = storage.filesystem(str(url))
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
        """Ids of all committed units, sorted, those of retired shard versions too. One listing."""
        return self._names("commits")

    def current_families(self) -> dict[str, str]:
        """Shard name → unit family whose rows count, for every shard that has had several versions."""
        names = self._names("versions")
        contents = self._read_all([self.path("versions", f"{name}.json") for name in names])
        return {
            name: str(json.loads(content)["family"]) for name, content in zip(names, contents, strict=True)
        }

    def set_current_family(self, shard_name: str, family: str) -> None:
        """In one step, let one version's units count, and retire those of every other version."""
        data = json.dumps({"family": family}).encode()
        publish(self.filesystem, self.path("versions", f"{shard_name}.json"), data)

    def units(self) -> list[str]:
        """Ids of the units whose rows exist, sorted: committed, and of their shard's current version."""
        current = self.current_families()
        committed = self.committed_units()
        if not current:
            return committed
        parsed = ((unit, *parse_unit_id(unit)[:2]) for unit in committed)
        return [unit for unit, name, family in parsed if current.get(name, family) == family]

    def commits(self, units: Sequence[str] | None = None) -> Iterator[Commit]:
        """The commits of these units (default: `units`), a bounded number at a time."""
        names = self.units() if units is None else units
        for content in self._read_all([self.path("commits", f"{unit}.json") for unit in names]):
            yield Commit.model_validate_json(content)

    def derived(self) -> Derived:
        """Totals, statistics and manifest, from the commits themselves."""
        return derive(self.commits())

    def is_derived_current(self) -> bool:
        """Whether the derived files are of just the units that count: two listings, no commit is read."""
        try:
            stored = json.loads(self.filesystem.cat_file(self.path("stats.json")))
        except FileNotFoundError:
            return False
        return bool(stored.get("units_sha256") == units_sha256(self.units()))

    def stored_summary(self) -> dict[str, object]:
        """``stats.json``. UserError where it is not there, or not of the units that count."""
        if not self.is_derived_current():
            raise UserError(
                f"the manifest of {self.url} is not of its commits: encoding has not ended there",
                do="run ldm encode again, or ldm verify --repair",
            )
        summary: dict[str, object] = json.loads(self.filesystem.cat_file(self.path("stats.json")))
        return summary

    def manifest(self) -> pa.Table:
        """``manifest.parquet``, and every file that it names is there, with its size.

        Costs a listing for each bucket; no commit is read and no data file opened. UserError where the
        manifest is damaged or not of the units that count, or where a file is missing or cut short.
        """
        expected = self.stored_summary().get("manifest_sha256")
        data = b""
        with suppress(FileNotFoundError):
            data = self.filesystem.cat_file(self.path("manifest.parquet"))
        if hashlib.sha256(data).hexdigest() != expected:
            raise UserError(
                f"manifest.parquet of {self.url} is missing or damaged: stats.json has another SHA-256",
                do="run ldm verify --repair",
            )
        manifest = pq.read_table(io.BytesIO(data))
        self._check_files(manifest)
        return manifest

    def _check_files(self, manifest: pa.Table) -> None:
        present: dict[str, int] = {}
        for bucket in set(manifest["bucket"].to_pylist()):
            folder = self.path("data", bucket)
            self.filesystem.invalidate_cache(folder)
            if self.filesystem.exists(folder):
                listed = self.filesystem.ls(folder, detail=True)
                present |= {f"data/{bucket}/{e['name'].rsplit('/', 1)[-1]}": int(e["size"]) for e in listed}
        sizes = zip(manifest["path"].to_pylist(), manifest["bytes"].to_pylist(), strict=True)
        wrong = [path for path, size in sizes if present.get(path) != size]
        if wrong:
            raise UserError(
                f"{len(wrong)} of {manifest.num_rows} data files of {self.url} are missing or cut short, "
                f"such as {wrong[0]}",
                do="find all with ldm verify; remove those units' commits and encode again",
            )

    def write_derived(self) -> Derived:
        """Rebuild ``stats.json`` and, before it, ``manifest.parquet``; returns what is in them."""
        derived = self.derived()
        publish(self.filesystem, self.path("manifest.parquet"), derived.manifest_parquet())
        publish(self.filesystem, self.path("stats.json"), derived.stats_json())
        return derived

    def _names(self, folder: str) -> list[str]:
        """Stems of the JSON files in a folder of the dataset, sorted."""
        path = self.path(folder)
        self.filesystem.invalidate_cache(path)
        if not self.filesystem.exists(path):
            return []
        names = (path.rsplit("/", 1)[-1] for path in self.filesystem.ls(path, detail=False))
        return sorted(name[: -len(".json")] for name in names if name.endswith(".json") and name[0] != ".")

    def _read_all(self, paths: Sequence[str]) -> Iterator[bytes]:
        for start in range(0, len(paths), FILES_PER_READ):
            # cat_ranges reads in parallel where the store can, and takes names as they are: cat expands "[".
            some = list(paths[start : start + FILES_PER_READ])
            for content in self.filesystem.cat_ranges(some, None, None, on_error="return"):
                if isinstance(content, Exception):
                    raise content
                yield content


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
