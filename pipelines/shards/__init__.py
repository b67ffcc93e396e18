"""Inputs: WebDataset tars, Parquet files, folders of images and lists of files, as shards of samples.

Shards are streamed, never unpacked to disk and never wholly in memory; names in them are data.
"""

from pipelines.input_files import IMAGE_EXTENSIONS
from pipelines.shards.config import InputConfig
from pipelines.shards.listing import list_shards
from pipelines.shards.reading import read_samples
from pipelines.shards.sample import Sample
from pipelines.shards.shard import Shard
from pipelines.shards.tar import tar_bytes, write_tar

__all__ = [
    "IMAGE_EXTENSIONS",
    "InputConfig",
    "Sample",
    "Shard",
    "list_shards",
    "read_samples",
    "tar_bytes",
    "write_tar",
]
