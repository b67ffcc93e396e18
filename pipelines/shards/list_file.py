"""List files: one path or URL per line; in ``.jsonl`` one object per line, with other fields.

Lines are cut into buckets by their text, so that an added line changes one shard only.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from ldm import storage
from ldm.errors import BadSampleError, UserError
from pipelines.input_files import InputFile, file_version, is_image
from pipelines.shards.config import InputConfig
from pipelines.shards.fetch import fetch, in_order
from pipelines.shards.row import row_key
from pipelines.shards.sample import Sample, with_named_fields
from pipelines.shards.shard import NUM_BUCKETS, Shard, bucket_of, bucket_shard, split_url, version_of_all

__all__ = ["LIST_SUFFIXES", "list_file_shards", "read_list"]

LIST_SUFFIXES = (".txt", ".lst", ".jsonl")
PATH_FIELDS = ("path", "url", "file_name")
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class _Line:
    """A line: where its image is, and the object that it is in a ``.jsonl``."""

    text: str
    url: str
    key: str
    record: dict[str, object] | None


def list_file_shards(filesystem: AbstractFileSystem, path: str, config: InputConfig) -> list[Shard]:
    """The buckets that have a line. A version covers the lines, and sizes and times of their files.

    UserError where no line names a file.
    """
    url = filesystem.unstrip_protocol(path)
    buckets: dict[int, list[str]] = {bucket: [] for bucket in range(NUM_BUCKETS)}

    def versioned(text: str) -> tuple[str, str]:
        return text, _version(text, url, config)

    for text, version in in_order(versioned, _lines(filesystem, path)):
        buckets[bucket_of(text)] += text, version
    shards = [bucket_shard(url, "list", b, version_of_all(parts)) for b, parts in buckets.items() if parts]
    if not shards:
        raise UserError(f"{url} names no file", allowed="one path or URL per line")
    return shards


def read_list(shard: Shard, config: InputConfig) -> Iterator[Sample]:
    """The samples of a bucket in the order of their lines; relative paths start at the list's folder.

    The key is the row's key field, else the path without the extension of an image.
    """
    url, _, bucket = split_url(shard)
    filesystem, path = storage.filesystem(url)

    def read(text: str) -> Sample:
        return with_named_fields(_sample(text, url, config), config)

    yield from in_order(read, (text for text in _lines(filesystem, path) if bucket_of(text) == bucket))


def _lines(filesystem: AbstractFileSystem, path: str) -> Iterator[str]:
    with filesystem.open(path, "rb") as raw, io.BufferedReader(raw) as stream:
        while line := stream.readline(MAX_LINE_BYTES):
            if text := line.decode("utf-8-sig", errors="backslashreplace").strip():
                yield text


def _version(text: str, list_url: str, config: InputConfig) -> str:
    try:
        filesystem, path = storage.filesystem(_parse(text, list_url, config).url)
        filesystem.invalidate_cache()
        return file_version(filesystem, InputFile(text, path, filesystem.info(path)), digest=config.digest)
    except (BadSampleError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return "missing"


def _sample(text: str, list_url: str, config: InputConfig) -> Sample:
    try:
        line = _parse(text, list_url, config)
    except BadSampleError as error:
        return Sample.unusable(text[:200], error)
    fields = {} if line.record is None else {"json": json.dumps(line.record).encode()}
    try:
        return Sample(line.key, fetch(line.url, config.max_member_bytes), fields)
    except BadSampleError as error:
        return Sample.unusable(line.key, error)


def _parse(text: str, list_url: str, config: InputConfig) -> _Line:
    """BadSampleError ``bad_json`` or ``bad_path`` where a line is neither a path nor a row with one."""
    record = _record(text) if list_url.endswith(".jsonl") else None
    names = (config.image_column, *PATH_FIELDS)
    found = text if record is None else next((record[name] for name in names if record.get(name)), None)
    if not isinstance(found, str):
        raise BadSampleError("bad_path", f"none of the fields {', '.join(names)} is a path")
    stem = found.rpartition(".")[0] if is_image(found) else found
    key = stem if record is None else row_key(record, config) or stem
    url = _resolved(found, list_url)
    return _Line(text, url, key.encode(errors="backslashreplace").decode(), record)


def _record(text: str) -> dict[str, object]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise BadSampleError("bad_json", "the line is no object")
    return record


def _resolved(path: str, list_url: str) -> str:
    # Chained URLs may keep copies on disk, and a NUL ends a path early.
    if "::" in path or "\0" in path:
        raise BadSampleError("bad_path", f"{path!r}: neither a path nor a plain URL")
    if "://" in path:
        try:
            storage.filesystem(path)
        except UserError as error:
            raise BadSampleError("bad_path", str(error)) from error
        return path
    if path.startswith("/"):
        return f"{list_url.partition('://')[0]}://{path}"
    return f"{list_url.rpartition('/')[0]}/{path}"
