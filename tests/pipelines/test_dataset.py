"""The latent dataset folder: publishing, refusing, reading back."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.errors import UserError
from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import Commit, DatasetHeader, StoredStats
from pipelines.latent_table import (
    LatentRows,
    MomentArrays,
    Rejected,
    data_bytes,
    quarantine_bytes,
    read_latents,
)
from pipelines.storage_form import StorageForm, dequantise, quantise

HEADER = DatasetHeader(
    vae="f8",
    vae_fingerprint="aa",
    f=8,
    channels=2,
    preprocess=Preprocess(sizes_px=(64,)),
    unit_size=4,
    class_names=("cat", "dog"),
)


def commit(unit: str, stats: StoredStats | None, rows: int) -> Commit:
    return Commit(
        unit=unit,
        shard="file:///a.tar",
        shard_version="1",
        index=0,
        is_final=True,
        num_inputs=rows + 1,
        num_rows=rows,
        num_quarantined=1,
        quarantined={"no_image": 1},
        files=(),
        quarantine_file=None,
        stats=stats,
    )


def rows(count: int, size: int = 4) -> LatentRows:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(count, 2, size, size)).astype(np.float16)
    std = np.exp(rng.normal(size=mean.shape)).astype(np.float16)
    none = [None] * count
    keys, labels = [f"k{i}" for i in range(count)], [0, None, *range(count - 2)]
    return LatentRows(keys, labels, none, none, MomentArrays(mean, std))


def test_header_is_read_back_and_accepted_again(tmp_path: Path) -> None:
    LatentDataset.create_or_check(tmp_path / "d", HEADER)
    again = HEADER.model_copy(update={"vae": "/elsewhere"})
    assert LatentDataset.create_or_check(tmp_path / "d", again).header == again
    assert json.loads((tmp_path / "d/dataset.json").read_text())["vae"] == "f8"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vae_fingerprint": "bb"}, "vae_fingerprint: aa, not bb"),
        ({"unit_size": 8}, "unit_size: 4, not 8"),
        ({"preprocess": Preprocess(sizes_px=(128,))}, "preprocess.sizes_px: (64,), not (128,)"),
        ({"class_names": None}, "class_names: ('cat', 'dog'), not None"),
    ],
)
def test_another_kind_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    LatentDataset.create_or_check(tmp_path, HEADER)
    before = (tmp_path / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="holds latents of another kind") as caught:
        LatentDataset.create_or_check(tmp_path, HEADER.model_copy(update=change))
    assert said in str(caught.value)
    assert (tmp_path / "dataset.json").read_bytes() == before


def test_open_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such latent dataset"):
        LatentDataset.open(tmp_path / "missing")
    with pytest.raises(UserError, match=r"it has no dataset\.json"):
        LatentDataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 9}')
    with pytest.raises(UserError, match="format_version"):
        LatentDataset.open(tmp_path)
    LatentDataset.create_or_check(tmp_path / "fresh", HEADER)
    with pytest.raises(UserError, match="is empty"):
        LatentDataset.open(tmp_path / "fresh")


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_commits_are_listed_sorted_and_merged(tmp_path: Path, scheme: str) -> None:
    dataset = LatentDataset.create_or_check(f"{scheme}{tmp_path}", HEADER)
    parts = [
        StoredStats(count=2, mean=(0.0, 1.0), m2=(2.0, 2.0)),
        StoredStats(count=2, mean=(4.0, 1.0), m2=(0.0, 0.0)),
    ]
    for unit, stats in (
        ("b[1]-00000000-000000", parts[1]),
        ("a-00000000-000000", parts[0]),
        ("c-00000000-000000", None),
    ):
        dataset.commit(commit(unit, stats, 0 if stats is None else 2))
    again = LatentDataset.open(f"{scheme}{tmp_path}")
    assert [c.unit for c in again.commits()] == again.committed_units() == sorted(again.committed_units())
    assert again.derived().totals == (3, 7, 4, 0, {"no_image": 3})
    stats = again.derived().stats
    assert stats is not None
    # Values -1, 1 and 4, 4 have mean 2 and squared deviations 9 + 1 + 4 + 4.
    assert (stats.count, stats.mean_C, stats.m2_C) == (4, (2.0, 1.0), (18.0, 2.0))


def test_derived_files_are_rebuilt_to_the_same_bytes(tmp_path: Path) -> None:
    dataset = LatentDataset.create_or_check(tmp_path, HEADER)
    file = dataset.publish("data/32x32/u.parquet", data_bytes(rows(3), HEADER.form), 3)
    dataset.commit(commit("u-00000000-000000", None, 3).model_copy(update={"files": (file,)}))
    dataset.write_derived()
    before = [(tmp_path / name).read_bytes() for name in ("stats.json", "manifest.parquet")]
    dataset.write_derived()
    assert [(tmp_path / name).read_bytes() for name in ("stats.json", "manifest.parquet")] == before
    (row,) = pq.read_table(tmp_path / "manifest.parquet").to_pylist()
    assert (row["bucket"], row["path"], row["rows"], row["sha256"]) == ("32x32", file.path, 3, file.sha256)


def test_latents_are_plain_arrow_and_survive_exactly(tmp_path: Path) -> None:
    written = rows(5)
    assert data_bytes(written, HEADER.form) == data_bytes(written, HEADER.form)
    (tmp_path / "x.parquet").write_bytes(data_bytes(written, HEADER.form))
    table = pq.read_table(tmp_path / "x.parquet", page_checksum_verification=True)
    assert table.schema.field("mean").type == pa.fixed_shape_tensor(pa.float16(), (2, 4, 4))
    assert table.schema.field("label").type == pa.int32()
    back = read_latents(str(tmp_path / "x.parquet"))
    assert (back.keys, back.labels) == (written.keys, written.labels)
    np.testing.assert_array_equal(back.moments.mean_NChw, written.moments.mean_NChw)
    np.testing.assert_array_equal(back.moments.std_NChw, written.moments.std_NChw)


def test_row_groups_hold_about_one_mebibyte_and_read_alone(tmp_path: Path) -> None:
    written = rows(20, size=128)  # 2 channels × 128² × 2 bytes × 2 = 128 KiB a row: 8 rows a group
    (tmp_path / "x.parquet").write_bytes(data_bytes(written, HEADER.form))
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [8, 8, 4]
    back = read_latents(str(tmp_path / "x.parquet"), [1])
    np.testing.assert_array_equal(back.moments.mean_NChw, written.moments.mean_NChw[8:16])


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    data = bytearray(data_bytes(rows(5), HEADER.form))
    data[len(data) // 3] ^= 1
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        read_latents(str(tmp_path / "x.parquet"))


def test_quarantine_file_holds_every_reason(tmp_path: Path) -> None:
    rejected = [Rejected("k", "file:///a.tar", 3, "no_image", "only json")]
    (tmp_path / "q.parquet").write_bytes(quarantine_bytes(rejected))
    assert pq.read_table(tmp_path / "q.parquet").to_pylist() == [vars(rejected[0])]


@pytest.mark.parametrize("stored", ["moments", "mode", "sample"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_form_is_read_back_as_what_it_stands_for(
    tmp_path: Path, stored: str, dtype: str, mirrored: bool
) -> None:
    form = StorageForm(stored=stored, dtype=dtype, mirrored=mirrored)  # type: ignore[arg-type]
    plain = rows(6)
    flipped = MomentArrays(*(values[..., ::-1] for values in plain.moments)) if mirrored else None
    captions, extras = ["a", None, "日本", "", "b", "c"], [None, '{"a": 1}', None, None, None, None]
    written = replace(plain, captions=captions, extras=extras, mirrored=flipped)
    data = data_bytes(written, form)
    back = read_latents(io.BytesIO(data))
    assert (back.captions, back.extras) == (captions, extras)
    assert (back.mirrored is not None) == mirrored
    names = pq.read_schema(io.BytesIO(data)).names
    assert [name for name in names if name.endswith("std")] == (
        ["std", "mirrored_std"][: 1 + mirrored] if stored == "moments" else []
    )
    for got, want in ((back.moments, plain.moments), (back.mirrored, flipped)):
        if got is not None and want is not None:
            assert_stands_for(got.mean_NChw, want.mean_NChw, dtype)
            assert_stands_for(got.std_NChw, want.std_NChw * (stored == "moments"), dtype)


def assert_stands_for(got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    """Exact in fp16; within half of a step, 1/127 of the channel's largest value, in int8."""
    assert got.dtype == np.float16
    if dtype == "float16":
        np.testing.assert_array_equal(got, want)
    else:
        step = np.abs(want.astype(np.float32)).max((2, 3), keepdims=True) / 127
        assert (np.abs(got.astype(np.float32) - want) <= step * 0.5 + np.abs(want) * 2.0**-10).all()


def test_quantising_again_changes_nothing() -> None:
    mean = rows(6).moments.mean_NChw
    once = dequantise(quantise(mean))
    np.testing.assert_array_equal(dequantise(quantise(once)), once)
    np.testing.assert_array_equal(dequantise(quantise(np.zeros_like(mean))), 0)


def test_int8_takes_about_a_byte_a_value() -> None:
    written = rows(64, size=32)
    assert len(data_bytes(written, StorageForm(dtype="int8"))) < 1.15 * 64 * 2 * 2 * 32 * 32


def test_only_the_current_version_of_a_shard_counts(tmp_path: Path) -> None:
    dataset = LatentDataset.create_or_check(tmp_path, HEADER)
    units = ["s-aaaaaaaa-000000", "s-bbbbbbbb-000000", "s-bbbbbbbb-000001", "t-cccccccc-000000"]
    for unit in units:
        dataset.commit(commit(unit, None, 0))
    assert dataset.units() == units
    dataset.write_derived()
    assert dataset.is_derived_current()
    dataset.set_current_family("s", "s-aaaaaaaa")
    assert not dataset.is_derived_current()
    assert dataset.units() == [units[0], units[3]]
    dataset.set_current_family("s", "s-bbbbbbbb")
    assert [c.unit for c in dataset.commits()] == units[1:] and dataset.committed_units() == units
