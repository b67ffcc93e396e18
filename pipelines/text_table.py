"""The Parquet form of the embeddings of one unit's captions: deterministic bytes, reading back.

One row per distinct caption:

    caption    string
    tokens     int32: L, those that open and close the text included
    embedding  list of L·D float16, token by token

D is the same for the whole file, in its schema's metadata as ``width``.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.latent_table import ROW_GROUP_BYTES, parquet_bytes

__all__ = ["read_text", "read_width", "text_bytes"]

WIDTH = b"width"
SCHEMA = pa.schema(
    [
        pa.field("caption", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        # 64-bit offsets: the embeddings of one unit may have more than 2³¹ values.
        pa.field("embedding", pa.large_list(pa.float16()), nullable=False),
    ]
)


def text_bytes(captions: Sequence[str], embeddings: Sequence[NDArray[np.float16]]) -> bytes:
    """One Parquet file. Equal captions and embeddings give equal bytes.

    embeddings: float16 (L, D), one for each caption, L its own. ValueError where there is none, where
    they have several D, or where a caption is there twice.
    """
    widths = {embedding.shape[1] for embedding in embeddings}
    if len(widths) != 1:
        raise ValueError(f"embeddings of one file must have one width, got {sorted(widths)}")
    if len(set(captions)) < len(captions):
        raise ValueError("a caption is there twice")
    tokens = [len(embedding) for embedding in embeddings]
    columns = [pa.array(captions, pa.string()), pa.array(tokens, pa.int32()), _list_column(embeddings)]
    table = pa.table(columns, schema=SCHEMA.with_metadata({WIDTH: str(widths.pop())}))
    mean_bytes = max(1, sum(embedding.nbytes for embedding in embeddings) // len(embeddings))
    return parquet_bytes(
        table,
        row_group_size=max(1, ROW_GROUP_BYTES // mean_bytes),
        dictionary=[],
        byte_stream_split=["embedding.list.element"],
    )


def read_text(source: pa.NativeFile | io.IOBase | str) -> dict[str, NDArray[np.float16]]:
    """caption → float16 (L, D), not to be written; page checksums are verified."""
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        table = file.read()
    width = int(table.schema.metadata[WIDTH])
    rows = table["embedding"].combine_chunks()
    values = rows.values.to_numpy(zero_copy_only=True)
    starts = rows.offsets.to_pylist()
    return {
        caption: values[start:stop].reshape(tokens, width)
        for caption, tokens, start, stop in zip(
            table["caption"].to_pylist(), table["tokens"].to_pylist(), starts[:-1], starts[1:], strict=True
        )
    }


def read_width(source: pa.NativeFile | io.IOBase | str) -> int:
    """D of a file; reads no embedding."""
    return int(pq.read_schema(source).metadata[WIDTH])


def _list_column(embeddings: Sequence[NDArray[np.float16]]) -> pa.Array:
    flat = np.concatenate([embedding.reshape(-1) for embedding in embeddings])
    offsets = np.cumsum([0, *(embedding.size for embedding in embeddings)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.float16()))
