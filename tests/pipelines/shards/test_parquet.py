"""Parquet inputs against what pyarrow was given to write."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileOpener

from ldm.errors import BadSampleError, UserError
from pipelines.shards import InputConfig, Sample, Shard, list_shards, read_samples

ROOT = Path(__file__).resolve().parents[3]
IMAGES = [bytes([i]) * (50 * i + 1) for i in range(100)]


def saved(tmp_path: Path, columns: dict[str, object], **options: object) -> Path:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path


def read(path: Path, **config: object) -> list[Sample]:
    options = InputConfig.model_validate(config)
    return [s for shard in list_shards(path, options) for s in read_samples(shard, options)]


def records(samples: list[Sample]) -> list[object]:
    return [json.loads(sample.fields["json"]) for sample in samples]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("row_group", [7, 1000])
def test_rows_come_back_in_order(tmp_path: Path, kind: pa.DataType, row_group: int) -> None:
    columns = {
        "image": pa.array(IMAGES, kind),
        "label": list(range(100)),
        "text": [f"é{i}" for i in range(100)],
    }
    samples = read(saved(tmp_path, columns, row_group_size=row_group))
    assert [sample.key for sample in samples] == [f"train-{i:08d}" for i in range(100)]
    assert [sample.image for sample in samples] == IMAGES
    assert [(s.label(), s.caption()) for s in samples] == [(i, f"é{i}") for i in range(100)]


def test_structs_as_hugging_face_datasets_writes_them(tmp_path: Path) -> None:
    rows = [{"bytes": b"1", "path": "a.jpg"}, {"bytes": None, "path": "/etc/passwd"}, None]
    samples = read(saved(tmp_path, {"image": pa.array(rows), "id": [7, 8, None]}))
    assert [(s.key, s.image) for s in samples] == [("7", b"1"), ("8", None), ("train-00000002", None)]


def test_plain_columns_pass_through_and_others_when_named(tmp_path: Path) -> None:
    columns = {
        "image": [b"1"],
        "n": [1.5],
        "ok": [True],
        "none": pa.array([None]),
        "time": pa.array([0], pa.timestamp("s")),
        "mask": [b"2"],
        "boxes": [[1, 2]],
    }
    path = saved(tmp_path, columns)
    plain = {"n": 1.5, "ok": True, "none": None, "time": "1970-01-01 00:00:00"}
    assert records(read(path)) == [plain]
    assert records(read(path, fields=("boxes", "n"))) == [{"boxes": [1, 2], "n": 1.5}]
    assert read(path)[0].chosen(["n", "boxes"]) == {"n": 1.5, "boxes": None}


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = saved(tmp_path, {"jpg": [b"1"], "name": ["k"], "class": [3], "prompt": ["p"], "id": [1]})
    config = {"image_column": "jpg", "key_column": "name", "label_field": "class", "caption_field": "prompt"}
    (sample,) = read(path, **config, fields=())
    assert (sample.key, sample.image, sample.label(), sample.caption()) == ("k", b"1", 3, "p")
    assert records([sample]) == [{"name": "k", "class": 3, "prompt": "p"}]


@pytest.mark.parametrize(
    ("columns", "config", "said"),
    [
        ({"jpg": [b"1"]}, {}, "no column 'image' among jpg"),
        ({"image": ["a.jpg"]}, {}, "column 'image' is string, not bytes"),
        ({"image": [b"1"]}, {"key_column": "k"}, "no column 'k'"),
        ({"image": [b"1"], "m": [b"2"]}, {"fields": ("m",)}, "'m' holds bytes"),
    ],
)
def test_a_column_that_is_not_there(
    tmp_path: Path, columns: dict[str, object], config: dict[str, object], said: str
) -> None:
    path = saved(tmp_path, columns)
    with pytest.raises(UserError, match=said):
        list_shards(path, InputConfig.model_validate(config))
    with pytest.raises(BadSampleError, match="missing_column"):
        list(read_samples(Shard(str(path), "x", "1"), InputConfig.model_validate(config)))


def test_text_that_is_not_utf8_and_an_image_too_large(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    path = saved(tmp_path, {"image": [b"1", b"2", b"3" * 20], "text": bad})
    good, unreadable, large = read(path, max_member_bytes=10)
    assert (good.image, good.caption()) == (b"1", "a")
    for sample, reason in ((unreadable, "bad_caption"), (large, "member_too_large")):
        with pytest.raises(BadSampleError) as caught:
            sample.image_bytes()
        assert caught.value.reason == reason


def test_a_torn_file_and_a_flipped_bit(tmp_path: Path) -> None:
    path = saved(tmp_path, {"image": IMAGES}, row_group_size=50, write_page_checksum=True, compression="none")
    whole = path.read_bytes()
    shard = list_shards(path)[0]
    path.write_bytes(whole[: len(whole) // 2])
    list_shards(path)  # a damaged file is the job's business, and costs no other file
    with pytest.raises(BadSampleError, match="broken_parquet"):
        list(read_samples(shard))
    flipped = bytearray(whole)
    flipped[whole.rindex(IMAGES[99]) + 9] ^= 1  # in the second row group
    path.write_bytes(flipped)
    read_before: list[Sample] = []
    with pytest.raises(BadSampleError, match="broken_parquet"):
        read_before.extend(_until_damage(shard, read_before))
    assert [sample.image for sample in read_before] == IMAGES[: len(read_before)]
    assert 32 <= len(read_before) < 100


def _until_damage(shard: Shard, into: list[Sample]) -> Iterator[Sample]:
    for sample in read_samples(shard):
        into.append(sample)
    yield from ()


def test_a_failing_store_is_not_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, {"image": IMAGES})
    (shard,) = list_shards(path)

    def reset(self: LocalFileOpener, *args: object) -> bytes:
        raise ConnectionResetError(104, "reset by peer")

    monkeypatch.setattr(LocalFileOpener, "read", reset)
    with pytest.raises(ConnectionResetError):
        list(read_samples(shard))


def test_only_the_needed_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    heavy = [random.Random(i).randbytes(40_000) for i in range(100)]
    path = saved(tmp_path, {"image": IMAGES, "heavy": heavy})
    read_bytes = 0
    original = LocalFileOpener.read

    def counted(self: LocalFileOpener, *args: int) -> bytes:
        nonlocal read_bytes
        data: bytes = original(self, *args)
        read_bytes += len(data)
        return data

    monkeypatch.setattr(LocalFileOpener, "read", counted)
    assert [sample.image for sample in read(path)] == IMAGES
    assert 0 < read_bytes < 400_000 < 4_000_000 < path.stat().st_size


CHILD = """
import sys
from pipelines.shards import Shard, read_samples

def peak_kb():  # of this program: getrusage keeps the peak of the one that started it
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))

list(read_samples(Shard(sys.argv[2], "warm", "1")))
before = peak_kb()
print(sum(len(sample.image) for sample in read_samples(Shard(sys.argv[1], "a", "1"))))
print(peak_kb() - before)
"""


def test_memory_does_not_follow_the_row_group(tmp_path: Path) -> None:
    """One row group of 160 MB, and pages of 1 MB."""
    image = bytes(range(256)) * 1024
    table = pa.table({"image": pa.array([image] * 640, pa.large_binary())})
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}
    (tmp_path / "warm").mkdir()
    warm = saved(tmp_path / "warm", {"image": [image] * 64}, **options)
    path = tmp_path / "big.parquet"
    pq.write_table(table, path, row_group_size=640, **options)
    assert pq.ParquetFile(path).num_row_groups == 1
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(warm)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    total, growth_kb = map(int, done.stdout.split())
    assert total == 640 * len(image)
    assert growth_kb < 40_000, done.stderr


def test_any_fsspec_url() -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": IMAGES}), buffer)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shards-test/a.parquet", buffer.getvalue())
    try:
        (shard,) = list_shards("memory://shards-test")
        assert shard.url == "memory:///shards-test/a.parquet"
        assert [sample.image for sample in read_samples(shard)] == IMAGES
    finally:
        memory.rm("/shards-test", recursive=True)
