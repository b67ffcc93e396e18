"""The samples of any shard."""

from collections.abc import Iterator

from pipelines.shards.config import InputConfig
from pipelines.shards.folder import read_folder
from pipelines.shards.list_file import read_list
from pipelines.shards.parquet import PARQUET_SUFFIXES, read_parquet
from pipelines.shards.sample import Sample
from pipelines.shards.shard import Shard, split_url
from pipelines.shards.tar import read_tar

__all__ = ["read_samples"]

DEFAULTS = InputConfig()


def read_samples(shard: Shard, config: InputConfig = DEFAULTS) -> Iterator[Sample]:
    """The samples of a shard, always in the same order, one or a few at a time in memory.

    One that cannot be read is yielded in its place, and tells why when it is asked for anything (see
    `Sample.unusable`). BadSampleError, after the samples before it, for a damage that ends the shard.
    """
    _, kind, _ = split_url(shard)
    if kind == "folder":
        return read_folder(shard, config)
    if kind == "list":
        return read_list(shard, config)
    return read_parquet(shard, config) if shard.url.endswith(PARQUET_SUFFIXES) else read_tar(shard, config)
