"""Bytes of a row against the Arrow columns of a file that `ldm encode`'s writer made."""

import io
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.latent_table import LatentRows, MomentArrays, data_bytes
from pipelines.planning.config import DatasetPlan, EmbeddingPlan, Measurement, StoredRow
from pipelines.planning.row_bytes import image_bytes, plain_row_bytes, row_bytes
from pipelines.storage_form import StorageForm

FORMS = [
    StorageForm(stored=stored, dtype=dtype, mirrored=mirrored)
    for stored, dtype, mirrored in itertools.product(
        ("moments", "mode", "sample"), ("float16", "int8"), (False, True)
    )
]
BENCH = Measurement.model_validate({"command": "ldm bench encode --json", "when": "2026-11-24"})
# Moments of f8 at 256 px: 2 tensors of 4×32×32 fp16, and the label.
PLAIN_256 = 2 * 4 * 32 * 32 * 2 + 4


def plan(**changes: object) -> DatasetPlan:
    return DatasetPlan.model_validate({"f": 8, "channels": 4, "sizes_px": (256,), **changes})


def stored(num_bytes: float, size_px: int) -> StoredRow:
    return StoredRow(num_bytes=num_bytes, size_px=size_px, measured=BENCH)


def column_bytes(column: pa.ChunkedArray) -> int:
    """Of the numbers in a column, those in lists and tensors included."""
    array = column.combine_chunks()
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    values = array.flatten() if pa.types.is_fixed_size_list(array.type) else array
    return len(values) * values.type.bit_width // 8


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_as_many_bytes_as_the_columns_hold(form: StorageForm) -> None:
    rng = np.random.default_rng(0)
    moments = MomentArrays(*(rng.normal(size=(5, 3, 8, 8)).astype(np.float16) for _ in "ms"))
    none = [None] * 5
    keys = [f"key{i}" for i in range(5)]
    rows = LatentRows(keys, range(5), none, none, moments, moments if form.mirrored else None)
    table = pq.read_table(io.BytesIO(data_bytes(rows, form)))
    held = sum(
        column_bytes(table[name])
        for name in table.schema.names
        if name == "label" or "mean" in name or "std" in name
    )
    told = plain_row_bytes(plan(f=4, channels=3, sizes_px=(32,), form=form, text_bytes_per_row=4), 32)
    assert held / 5 + len(keys[0]) == told


def test_without_a_measurement_before_compression() -> None:
    found = row_bytes(plan(), 256)
    assert (found.value, found.origin) == (PLAIN_256, "given")


def test_a_measured_row_at_its_own_size_and_at_another() -> None:
    dataset = plan(sizes_px=(256, 512), stored_row=stored(11_200, 256))
    small, large = row_bytes(dataset, 256), row_bytes(dataset, 512)
    assert (small.value, small.origin) == (11_200, "measured")
    assert small.note == "ldm bench encode --json, 2026-11-24"
    assert large.value == pytest.approx(11_200 * (4 * (PLAIN_256 - 4) + 4) / PLAIN_256)
    assert large.origin == "extrapolated"


def test_an_image_has_a_row_of_each_size_and_an_embedding() -> None:
    dataset = plan(sizes_px=(256, 512), embedding=EmbeddingPlan(tokens=20, width=768))
    found = image_bytes(dataset)
    assert found.value == PLAIN_256 + 4 * (PLAIN_256 - 4) + 4 + 20 * 768 * 2
    assert found.origin == "given"
    assert image_bytes(plan(stored_row=stored(11_200, 256))).origin == "measured"
