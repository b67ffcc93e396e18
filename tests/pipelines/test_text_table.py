import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipelines.text_table import read_text, text_bytes

CAPTIONS = ["the cat", "", "日本の猫", "🐱 e\u0301", "word " * 500, "\x00 \n"]


def embeddings(width: int = 5) -> list[NDArray[np.float16]]:
    """L = 3, 1, 7, 7, 77, 2; the fp16 extremes and zeros of both signs among the values."""
    rng = np.random.default_rng(0)
    made = [rng.normal(0, 3, (tokens, width)).astype(np.float16) for tokens in (3, 1, 7, 7, 77, 2)]
    made[0][0, :4] = [65504, -65504, 6e-8, -0.0]
    return made


def test_what_was_written_is_read_bit_for_bit() -> None:
    read = read_text(io.BytesIO(text_bytes(CAPTIONS, embeddings())))
    assert list(read) == CAPTIONS
    for found, written in zip(read.values(), embeddings(), strict=True):
        assert found.dtype == np.float16 and found.shape == written.shape
        assert found.tobytes() == written.tobytes()


def test_equal_embeddings_give_equal_bytes() -> None:
    first = text_bytes(CAPTIONS, embeddings())
    assert text_bytes(list(CAPTIONS), [np.asfortranarray(e) for e in embeddings()]) == first
    assert text_bytes(CAPTIONS[::-1], embeddings()) != first


def test_plain_parquet_readers_can_read_it() -> None:
    table = pq.read_table(io.BytesIO(text_bytes(CAPTIONS, embeddings())))
    assert table.column_names == ["caption", "tokens", "embedding"]
    assert table["tokens"].to_pylist() == [3, 1, 7, 7, 77, 2]
    assert table.schema.metadata[b"width"] == b"5"
    assert np.array_equal(np.array(table["embedding"][2].as_py()).reshape(7, 5), embeddings()[2])


def test_a_row_group_is_about_a_mebibyte() -> None:
    large = [np.full((64, 1024), index, np.float16) for index in range(20)]
    content = text_bytes([str(index) for index in range(20)], large)
    assert pq.ParquetFile(io.BytesIO(content)).num_row_groups == 3
    assert [embedding[0, 0] for embedding in read_text(io.BytesIO(content)).values()] == list(range(20))


def test_values_are_split_by_bytes() -> None:
    content = text_bytes(CAPTIONS, embeddings())
    column = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(2)
    assert column.path_in_schema == "embedding.list.element"
    assert "BYTE_STREAM_SPLIT" in column.encodings


def test_a_flipped_bit_in_a_page_is_noticed() -> None:
    content = bytearray(text_bytes(CAPTIONS, embeddings()))
    column = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(2)
    content[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    with pytest.raises(OSError, match="CRC"):
        read_text(io.BytesIO(content))


@pytest.mark.parametrize(
    ("captions", "widths", "told"),
    [
        ([], [], r"one width, got \[\]"),
        (["a", "b"], [4, 5], r"one width, got \[4, 5\]"),
        (["a", "a"], [4, 4], "there twice"),
        (["a", "b"], [4], "length"),
    ],
)
def test_what_makes_no_table_is_refused(captions: list[str], widths: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        text_bytes(captions, [np.zeros((2, width), np.float16) for width in widths])
