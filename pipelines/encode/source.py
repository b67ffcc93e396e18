"""The first stage: Ray Data read tasks, one per shard, that stream a tar and yield its units."""

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipelines.encode.backlog import ShardWork
from pipelines.encode.rows import ReadUnit
from pipelines.encode.units import slice_units
from pipelines.shards import InputConfig, read_samples

__all__ = ["ShardSource"]


class ShardSource(Datasource):
    """Yields the units that are not committed, each as a `ReadUnit` row."""

    def __init__(self, work: Sequence[ShardWork], unit_size: int, config: InputConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's own
        self._work, self._unit_size, self._config = work, unit_size, config

    def get_name(self) -> str:
        """Name of the stage in progress bars."""
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known before reading."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task per shard, whatever ``parallelism`` is: a tar is read forwards, by one reader."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        reads = (partial(_read_units, work, self._unit_size, self._config) for work in self._work)
        return [ReadTask(read, unknown, ReadUnit.SCHEMA) for read in reads]


def _read_units(work: ShardWork, unit_size: int, config: InputConfig) -> Iterator[pa.Table]:
    for samples in slice_units(work.shard, read_samples(work.shard, config), unit_size, work.committed):
        yield ReadUnit(samples).to_table()
