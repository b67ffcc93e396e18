"""Folders of images. Sub-folder = class, ``.txt`` beside = caption, ``.json`` beside = fields.

The files are cut into buckets by their names, so that an added file changes one shard only. A bucket
lists the folder anew: many images are better packed by ``ldm shards``.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from ldm import storage
from ldm.errors import BadSampleError
from pipelines.class_names import class_names_of_images
from pipelines.input_files import InputFile, file_version, is_image, visible_files
from pipelines.shards.config import InputConfig
from pipelines.shards.fetch import fetch, in_order
from pipelines.shards.sample import Sample, with_named_fields
from pipelines.shards.shard import Shard, bucket_of, bucket_shard, split_url, version_of_all

__all__ = ["folder_shards", "read_folder"]

SIDECARS = ("json", "txt")


@dataclass(frozen=True)
class _Picture:
    """An image, what stands beside it by extension, and the index of its class."""

    key: str
    image: InputFile
    beside: dict[str, InputFile]
    label: int | None

    @property
    def bucket(self) -> int:
        return bucket_of(self.key)


def folder_shards(
    filesystem: AbstractFileSystem, root: str, files: Sequence[InputFile], config: InputConfig
) -> list[Shard]:
    """The buckets that hold an image. A version covers paths, sizes, times and class indices."""
    buckets: dict[int, list[str]] = defaultdict(list)
    for picture in _pictures(filesystem, root, files):
        parts = buckets[picture.bucket]
        parts.append(f"label={picture.label}")
        for file in (picture.image, *picture.beside.values()):
            parts += file.name, file_version(filesystem, file, digest=config.digest)
    url = filesystem.unstrip_protocol(root)
    return [bucket_shard(url, "folder", b, version_of_all(parts)) for b, parts in sorted(buckets.items())]


def read_folder(shard: Shard, config: InputConfig) -> Iterator[Sample]:
    """The samples of a bucket in the order of their paths; the key is the path without extension.

    Two images of one key are two samples, of which the second shows as a duplicate.
    """
    url, _, bucket = split_url(shard)
    filesystem, root = storage.filesystem(url)
    filesystem.invalidate_cache()
    pictures = _pictures(filesystem, root, visible_files(filesystem, root))

    def read(picture: _Picture) -> Sample:
        return with_named_fields(_sample(filesystem, picture, config.max_member_bytes), config)

    yield from in_order(read, (picture for picture in pictures if picture.bucket == bucket))


def _pictures(filesystem: AbstractFileSystem, root: str, files: Sequence[InputFile]) -> Iterator[_Picture]:
    names = class_names_of_images(filesystem, root, files) or ()
    labels = {name: index for index, name in enumerate(names)}
    by_name = {file.name: file for file in files if file.name.endswith(SIDECARS)}
    for file in files:
        if not is_image(file.name):
            continue
        key = file.name.rpartition(".")[0]
        beside = {e: by_name[f"{key}.{e}"] for e in SIDECARS if f"{key}.{e}" in by_name}
        yield _Picture(key, file, beside, labels.get(file.name.split("/")[0]) if "/" in file.name else None)


def _sample(filesystem: AbstractFileSystem, picture: _Picture, limit_bytes: int) -> Sample:
    key = picture.key.encode(errors="surrogateescape").decode(errors="backslashreplace")
    fields = {} if picture.label is None else {"cls": str(picture.label).encode()}
    try:
        image = fetch(filesystem.unstrip_protocol(picture.image.path), limit_bytes)
        for extension, file in picture.beside.items():
            fields[extension] = fetch(filesystem.unstrip_protocol(file.path), limit_bytes)
    except BadSampleError as error:
        return Sample.unusable(key, error)
    return Sample(key, image, fields)
