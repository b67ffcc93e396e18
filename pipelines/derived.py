"""What follows from the commits of a latent dataset: totals, statistics, manifest. One pass over them."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ldm.channel_stats import LatentStats
from pipelines.dataset_records import Commit, Totals

__all__ = ["Derived", "derive", "units_sha256"]

MANIFEST_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("unit", "shard", "bucket", "path", "sha256")),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Derived:
    """totals; stats over all rows, merged in unit order, None where there is none; the manifest.

    manifest: one row per data file, in unit order: unit, shard, bucket, path, sha256, rows, bytes.
    """

    totals: Totals
    stats: LatentStats | None
    manifest: pa.Table
    units_sha256: str

    def stats_json(self) -> bytes:
        """``stats.json``."""
        summary: dict[str, object] = self.totals._asdict() | {"units_sha256": self.units_sha256}
        summary["manifest_sha256"] = hashlib.sha256(self.manifest_parquet()).hexdigest()
        if self.stats is not None:
            summary |= {"count": self.stats.count, "mean": self.stats.mean_C, "std": self.stats.std_C}
            summary |= {"m2": self.stats.m2_C, "scaling_factor": self.stats.scaling_factor}
        return f"{json.dumps(summary, sort_keys=True, indent=1)}\n".encode()

    def manifest_parquet(self) -> bytes:
        """``manifest.parquet``."""
        buffer = io.BytesIO()
        pq.write_table(self.manifest, buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue()


def derive(commits: Iterable[Commit]) -> Derived:
    """Read the commits once, in unit order, keeping sums and a row for each data file."""
    units = inputs = rows = size = 0
    quarantined: Counter[str] = Counter()
    stats: LatentStats | None = None
    names: list[str] = []
    files: list[dict[str, object]] = []
    for commit in commits:
        units, inputs, rows = units + 1, inputs + commit.num_inputs, rows + commit.num_rows
        size += sum(file.bytes for file in commit.all_files())
        quarantined.update(commit.quarantined)
        names.append(commit.unit)
        if commit.stats is not None:
            part = LatentStats(commit.stats.count, commit.stats.mean, commit.stats.m2)
            stats = part if stats is None else stats.merge(part)
        files += [_manifest_row(commit, index) for index in range(len(commit.files))]
    totals = Totals(units, inputs, rows, size, dict(sorted(quarantined.items())))
    return Derived(totals, stats, pa.Table.from_pylist(files, MANIFEST_SCHEMA), units_sha256(names))


def units_sha256(units: Sequence[str]) -> str:
    """Tells one set of units from another; ``units`` in order."""
    return hashlib.sha256("\n".join(units).encode()).hexdigest()


def _manifest_row(commit: Commit, index: int) -> dict[str, object]:
    file = commit.files[index]
    bucket = file.path.split("/")[1]
    return {"unit": commit.unit, "shard": commit.shard, "bucket": bucket, **file.model_dump()}
