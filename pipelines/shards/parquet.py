"""Parquet files with an image column: bytes, or a struct {bytes, path} as Hugging Face datasets has it.

Read by small batches and of the needed columns only; memory does not follow the size of row groups.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from ldm import storage
from ldm.errors import BadSampleError, UserError
from pipelines.shards.config import InputConfig
from pipelines.shards.row import key_columns, row_key
from pipelines.shards.sample import CAPTION_FIELDS, Sample, with_named_fields
from pipelines.shards.shard import Shard

__all__ = ["PARQUET_SUFFIXES", "check_columns", "read_parquet"]

PARQUET_SUFFIXES = (".parquet",)
BATCH_ROWS = 32
# Read ahead in a column. Without it a whole column chunk, that is row group, is fetched at once.
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class _Columns:
    """The columns to read: of the image, and those whose values become the sample's ``json``."""

    image: str
    fields: tuple[str, ...]
    projection: tuple[str, ...]

    @classmethod
    def of(cls, schema: pa.Schema, config: InputConfig) -> "_Columns":
        """BadSampleError ``missing_column`` where the image column, or one that was named, is not there."""
        image = _image_paths(schema, config.image_column)
        named = tuple(n for n in (config.key_column, config.caption_field, config.label_field) if n)
        wanted = (*named, *(config.fields or ()))
        if config.fields is not None:
            wanted += tuple(n for n in (*key_columns(config), *CAPTION_FIELDS, "label") if n in schema.names)
        else:
            wanted += tuple(field.name for field in schema if _is_plain(field.type))
        fields = tuple(dict.fromkeys(name for name in wanted if name != config.image_column))
        for name in fields:
            _require_writable(schema, name)
        return cls(config.image_column, fields, (*image, *fields))


def check_columns(filesystem: AbstractFileSystem, path: str, config: InputConfig) -> None:
    """UserError where a file lacks a column that the configuration names. A damaged file is let pass."""
    try:
        with _opened(filesystem, path) as file:
            _Columns.of(file.schema_arrow, config)
    except BadSampleError as error:
        if error.reason == "missing_column":
            raise UserError(
                f"{path}: {error.detail}", do="name the columns with --read.image-column and its like"
            ) from error


def read_parquet(shard: Shard, config: InputConfig) -> Iterator[Sample]:
    """The samples of a file in the order of its rows; a row's columns are in ``fields["json"]``.

    BadSampleError ``broken_parquet`` or ``missing_column``, after the rows before the damage.
    """
    filesystem, path = storage.filesystem(shard.url)
    with _opened(filesystem, path) as file:
        columns = _Columns.of(file.schema_arrow, config)
        batches = file.iter_batches(BATCH_ROWS, columns=list(columns.projection), use_threads=False)
        first = 0
        for batch in batches:
            for row in range(batch.num_rows):
                sample = _sample(batch, row, f"{shard.name}-{first + row:08d}", columns, config)
                yield with_named_fields(sample, config)
            first += batch.num_rows


@contextmanager
def _opened(filesystem: AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    # The columns are read in turns; a cache of one place in the file would be thrown away every time.
    with filesystem.open(path, "rb", cache_type="none") as raw:
        try:
            with pq.ParquetFile(
                raw, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
            ) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and not _is_damage(error):
                raise
            raise BadSampleError("broken_parquet", f"{path}: {error}") from error


def _is_damage(error: OSError) -> bool:
    # Arrow tells of damaged pages by a bare OSError; a store's errors are subclasses or have a number.
    return type(error) is OSError and error.errno is None


def _sample(batch: pa.RecordBatch, row: int, name: str, columns: _Columns, config: InputConfig) -> Sample:
    try:
        record = {column: _value(batch, row, column, config) for column in columns.fields}
    except BadSampleError as error:
        return Sample.unusable(name, error)
    key = row_key(record, config) or name
    value = batch.column(columns.image)[row].as_py()
    image = value["bytes"] if isinstance(value, dict) else value
    if image is not None and len(image) > config.max_member_bytes:
        return Sample.unusable(key, BadSampleError("member_too_large", f"{len(image)} bytes"))
    fields = {"json": json.dumps(record, default=str, ensure_ascii=False).encode()}
    return Sample(key, image, fields if record else {})


def _value(batch: pa.RecordBatch, row: int, column: str, config: InputConfig) -> object:
    try:
        value: object = batch.column(column)[row].as_py()
    except UnicodeDecodeError as error:
        is_caption = column in (config.caption_field, *CAPTION_FIELDS)
        raise BadSampleError("bad_caption" if is_caption else "bad_text", f"{column}: {error}") from error
    return value


def _image_paths(schema: pa.Schema, name: str) -> tuple[str, ...]:
    """The image column, or of a struct the part that holds the bytes."""
    index = schema.get_field_index(name)
    if index < 0:
        raise BadSampleError("missing_column", f"no column {name!r} among {', '.join(schema.names)}")
    kind = schema.field(index).type
    if (
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and _is_bytes(kind.field("bytes").type)
    ):
        return (f"{name}.bytes",)
    if not _is_bytes(kind):
        raise BadSampleError("missing_column", f"column {name!r} is {kind}, not bytes or struct<bytes, path>")
    return (name,)


def _require_writable(schema: pa.Schema, name: str) -> None:
    index = schema.get_field_index(name)
    if index < 0:
        raise BadSampleError("missing_column", f"no column {name!r} among {', '.join(schema.names)}")
    if _is_bytes(schema.field(index).type):
        raise BadSampleError("missing_column", f"column {name!r} holds bytes, which JSON does not")


def _is_plain(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or _is_bytes(kind) or pa.types.is_dictionary(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)
