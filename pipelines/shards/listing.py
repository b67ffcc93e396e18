"""What shards an input has: a folder or URL of them, one file, a folder of images, a list."""

from collections.abc import Sequence
from pathlib import Path

from fsspec import AbstractFileSystem

from ldm import storage
from ldm.errors import UserError
from pipelines.input_files import (
    InputFile,
    access_explained,
    file_version,
    is_image,
    visible_files,
)
from pipelines.shards.config import InputConfig
from pipelines.shards.folder import folder_shards
from pipelines.shards.list_file import LIST_SUFFIXES, list_file_shards
from pipelines.shards.parquet import PARQUET_SUFFIXES, check_columns
from pipelines.shards.shard import Shard
from pipelines.shards.tar import TAR_SUFFIXES

__all__ = ["list_shards"]

SHARD_SUFFIXES = (*TAR_SUFFIXES, *PARQUET_SUFFIXES)
DEFAULTS = InputConfig()


def list_shards(source: str | Path, config: InputConfig = DEFAULTS) -> list[Shard]:
    """The shards of an input in name order: tars and Parquet files, or buckets of a folder or list.

    UserError where nothing is there, nothing can be read, or two kinds of input are mixed.
    """
    with access_explained(str(source)):
        filesystem, root = storage.filesystem(str(source))
        filesystem.invalidate_cache()
        try:
            info = filesystem.info(root)
        except FileNotFoundError as error:
            raise UserError(f"no such input: {source}", do="give a folder of shards or images") from error
        if info["type"] == "directory":
            return _of_folder(str(source), filesystem, root, config)
        return _of_file(filesystem, InputFile(root.rpartition("/")[2], root, info), config)


def _of_file(filesystem: AbstractFileSystem, file: InputFile, config: InputConfig) -> list[Shard]:
    if file.name.endswith(SHARD_SUFFIXES):
        return _file_shards(file.path, filesystem, [file], config)
    if file.name.endswith(LIST_SUFFIXES):
        return list_file_shards(filesystem, file.path, config)
    raise UserError(f"{file.path} is no input", allowed=_patterns((*SHARD_SUFFIXES, *LIST_SUFFIXES)))


def _of_folder(source: str, filesystem: AbstractFileSystem, root: str, config: InputConfig) -> list[Shard]:
    files = visible_files(filesystem, root)
    shards = [file for file in files if file.name.endswith(SHARD_SUFFIXES)]
    images = [file for file in files if is_image(file.name)]
    if shards and images:
        found = f"{shards[0].name} and {images[0].name}"
        raise UserError(f"both shards and loose images in {source} ({found})", do="put them into two folders")
    if images:
        return folder_shards(filesystem, root, files, config)
    if shards:
        return _file_shards(source, filesystem, shards, config)
    raise UserError(
        f"no shards in {source}",
        allowed=f"{_patterns(SHARD_SUFFIXES)}, images; or the path of a list ({_patterns(LIST_SUFFIXES)})",
        do="check the folder",
    )


def _file_shards(
    source: str, filesystem: AbstractFileSystem, files: Sequence[InputFile], config: InputConfig
) -> list[Shard]:
    names = [_stem(file.name.rpartition("/")[2]) for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"two shards in {source} are named {twice!r}", do="rename one: units are named after shards"
        )
    # One stands for all: a folder of shards was written by one program.
    if parquet := next((file for file in files if file.name.endswith(PARQUET_SUFFIXES)), None):
        check_columns(filesystem, parquet.path, config)
    return [
        Shard(
            filesystem.unstrip_protocol(file.path), name, file_version(filesystem, file, digest=config.digest)
        )
        for file, name in zip(files, names, strict=True)
    ]


def _stem(name: str) -> str:
    suffix = next(suffix for suffix in SHARD_SUFFIXES if name.endswith(suffix))
    return name[: -len(suffix)]


def _patterns(suffixes: Sequence[str]) -> str:
    return ", ".join(f"*{suffix}" for suffix in suffixes)
