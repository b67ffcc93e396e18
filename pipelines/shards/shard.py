"""A shard: the part of an input that one reader reads from its beginning to its end."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["NUM_BUCKETS", "Shard", "bucket_of", "bucket_shard", "split_url", "version_of_all"]

# Folders and lists are cut into this many shards, whatever their size: a number that followed the
# size would move every file each time it changed. 64 keeps as many readers busy, repeats 1.6 % of
# the work for one added file, and still leaves 16 images in a shard where there are 1,000.
NUM_BUCKETS = 64


@dataclass(frozen=True)
class Shard:
    """One input shard: ``url`` as fsspec reads it, ``name`` without folder and suffix, its ``version``.

    ``version`` changes when the content does. The url of a bucket of a folder or of a list ends in
    ``#folder=3f`` or ``#list=3f``.
    """

    url: str
    name: str
    version: str


def bucket_of(name: str) -> int:
    """The bucket of a file, by its name alone: what else is in the folder has no part in it."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()[0] % NUM_BUCKETS


def bucket_shard(url: str, kind: str, bucket: int, version: str) -> Shard:
    """The shard of one bucket; kind: ``folder`` or ``list``."""
    name = url.rstrip("/").rpartition("/")[2] or "input"
    return Shard(f"{url}#{kind}={bucket:02x}", f"{name}-{bucket:02x}", version)


def split_url(shard: Shard) -> tuple[str, str, int]:
    """(url, kind, bucket) of a shard; kind is empty where it is a whole file."""
    url, mark, fragment = shard.url.rpartition("#")
    kind, equals, bucket = fragment.partition("=")
    if mark and equals and kind in ("folder", "list"):
        return url, kind, int(bucket, 16)
    return shard.url, "", 0


def version_of_all(parts: Iterable[str]) -> str:
    """One version of many files: a digest of their names and versions in order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
