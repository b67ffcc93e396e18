"""The last stage: a unit's files, then its commit. Twice gives the same bytes under the same names."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from pipelines.dataset import Commit, DataFile, LatentDataset
from pipelines.encode.rows import EncodedUnit, EncoderTrace
from pipelines.latent_table import LatentRows, data_bytes, quarantine_bytes

__all__ = ["LatentSink", "UnitReport", "write_unit"]


@dataclass(frozen=True)
class UnitReport:
    """What came of one unit: rows and bytes of data, rejected inputs by reason, who encoded it."""

    unit: str
    rows: int
    data_bytes: int
    quarantined: dict[str, int]
    trace: EncoderTrace


def write_unit(dataset: LatentDataset, unit: EncodedUnit) -> UnitReport:
    """Publish a unit's data files and quarantine file, and then, last, its commit."""
    files = tuple(_write_bucket(dataset, unit, indices) for indices in _buckets(unit))
    quarantined = dict(sorted(Counter(rejected.reason for rejected in unit.rejected).items()))
    commit = Commit(
        unit=unit.unit.id,
        shard=unit.unit.shard.url,
        shard_version=unit.unit.shard.version,
        index=unit.unit.index,
        is_final=unit.unit.is_final,
        num_inputs=unit.num_inputs,
        num_rows=len(unit.keys),
        num_quarantined=len(unit.rejected),
        quarantined=quarantined,
        files=files,
        quarantine_file=_write_quarantine(dataset, unit),
        stats=unit.stats,
    )
    if commit.num_rows + commit.num_quarantined != commit.num_inputs:
        account = f"{commit.num_rows} rows + {commit.num_quarantined} rejected"
        raise ValueError(f"unit {commit.unit} loses or repeats inputs: {commit.num_inputs} are not {account}")
    dataset.commit(commit)
    return UnitReport(unit.unit.id, len(unit.keys), sum(f.bytes for f in files), quarantined, unit.trace)


def _buckets(unit: EncodedUnit) -> list[list[int]]:
    """Indices of the rows of each latent size, sizes in ascending order."""
    sizes = sorted({mean.shape for mean in unit.means_N})
    return [[i for i, mean in enumerate(unit.means_N) if mean.shape == size] for size in sizes]


def _write_bucket(dataset: LatentDataset, unit: EncodedUnit, indices: Sequence[int]) -> DataFile:
    rows = LatentRows(
        keys=[unit.keys[i] for i in indices],
        labels=[unit.labels[i] for i in indices],
        mean_NChw=np.stack([unit.means_N[i] for i in indices]),
        std_NChw=np.stack([unit.stds_N[i] for i in indices]),
    )
    height, width = rows.mean_NChw.shape[2:]
    bucket = f"{width * dataset.header.f}x{height * dataset.header.f}"
    return dataset.publish(f"data/{bucket}/{unit.unit.id}.parquet", data_bytes(rows), len(indices))


def _write_quarantine(dataset: LatentDataset, unit: EncodedUnit) -> DataFile | None:
    if not unit.rejected:
        return None
    path = f"quarantine/{unit.unit.id}.parquet"
    return dataset.publish(path, quarantine_bytes(unit.rejected), len(unit.rejected))


@dataclass
class LatentSink(Datasink[list[UnitReport]]):
    """Writes every unit that reaches it. ``reports`` is filled, on the driver, when all are written."""

    dataset: LatentDataset
    reports: list[UnitReport] = field(default_factory=list)

    def write(self, blocks: Iterable[Block], ctx: object) -> list[UnitReport]:
        """Write the units of some blocks, each row of which is an `EncodedUnit`."""
        tables: Iterable[pa.Table] = (BlockAccessor.for_block(block).to_arrow() for block in blocks)
        return [
            write_unit(self.dataset, EncodedUnit.from_table(table.slice(row, 1)))
            for table in tables
            for row in range(table.num_rows)
        ]

    def on_write_complete(self, write_result: WriteResult[list[UnitReport]]) -> None:
        """Collect what the write tasks returned."""
        self.reports = [report for reports in write_result.write_returns for report in reports]
