"""``ldm shards``: labels, captions, equal bytes, and what is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.shards import ShardsJob
from ldm.errors import UserError
from ldm.images import encode_png
from pipelines.shards import Sample, list_shards, read_samples


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes and a caption: dark cats, bright dogs."""
    folder = tmp_path / "pictures"
    for name, level, count in (("cat", 40, 3), ("dog", 200, 2)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = np.random.default_rng(index).integers(-20, 20, (48, 64, 3))
            (folder / name / f"{index}.x.png").write_bytes(encode_png((level + noise).astype(np.uint8)))
    (folder / "cat/0.x.txt").write_text("a dark cat\n")
    return folder


def packed(folder: Path) -> list[Sample]:
    return [sample for shard in list_shards(folder) for sample in read_samples(shard)]


def test_files_are_kept_as_they_are_with_their_labels(pictures: Path, tmp_path: Path) -> None:
    result = ShardsJob(src=pictures, out=tmp_path / "out", samples_per_shard=2).run()
    assert result == {"shards": 3, "samples": 5, "class_names": ("cat", "dog"), "skipped": {}}
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["cat", "dog"]
    samples = packed(tmp_path / "out")
    records = [json.loads(sample.fields["json"]) for sample in samples]
    assert [record["source"] for record in records] == [
        *(f"cat/{i}.x.png" for i in range(3)),
        "dog/0.x.png",
        "dog/1.x.png",
    ]
    assert [sample.label() for sample in samples] == [0, 0, 0, 1, 1]
    assert [record["class"] for record in records] == ["cat"] * 3 + ["dog"] * 2
    assert [sample.image for sample in samples] == [(pictures / r["source"]).read_bytes() for r in records]
    assert [sample.fields.get("txt") for sample in samples] == [b"a dark cat", None, None, None, None]
    assert len({sample.key for sample in samples}) == 5


@pytest.mark.parametrize("options", [{}, {"resize_px": 16}, {"crop_px": 16, "crops_per_image": 3}])
def test_equal_input_gives_equal_bytes(pictures: Path, tmp_path: Path, options: dict[str, int]) -> None:
    for out in ("a", "b"):
        ShardsJob(src=pictures, out=tmp_path / out, **options).run()
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["classes.json", "shard-000000.tar"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files)


def test_crops_are_square_differ_and_depend_on_key_and_seed_alone(pictures: Path, tmp_path: Path) -> None:
    ShardsJob(src=pictures, out=tmp_path / "a", crop_px=16, crops_per_image=2).run()
    (pictures / "cat/1.x.png").unlink()
    ShardsJob(src=pictures, out=tmp_path / "b", crop_px=16, crops_per_image=2).run()
    ShardsJob(src=pictures, out=tmp_path / "c", crop_px=16, crops_per_image=2, seed=1).run()
    whole, fewer, reseeded = ({s.key: s.image for s in packed(tmp_path / name)} for name in "abc")
    assert (len(whole), len(fewer)) == (10, 8)
    assert fewer == {key: whole[key] for key in fewer}
    assert not set(fewer.values()) & set(reseeded.values())
    assert len(set(whole.values())) == 10
    assert {Image.open(io.BytesIO(image or b"")).size for image in whole.values()} == {(16, 16)}
    assert [sample.label() for sample in packed(tmp_path / "a")] == [0] * 6 + [1] * 4


def test_zoom_one_spans_the_short_side(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], 80, axis=1).repeat(3, axis=2)
    (tmp_path / "in/ramp.png").write_bytes(encode_png(ramp))
    ShardsJob(src=tmp_path / "in", out=tmp_path / "out", crop_px=16, zoom_max=1.0).run()
    (sample,) = packed(tmp_path / "out")
    column = np.asarray(Image.open(io.BytesIO(sample.image or b"")))[:, 8, 0]
    assert column[0] < 12
    assert column[-1] > 243


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
    ShardsJob(src=tmp_path / "in", out=tmp_path / "out").run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-000000.tar"]
    assert packed(tmp_path / "out")[0].label() is None


def test_bad_pictures_are_counted_not_packed(pictures: Path, tmp_path: Path) -> None:
    (pictures / "cat/bad.jpg").write_bytes(b"no image")
    result = ShardsJob(src=pictures, out=tmp_path / "out", resize_px=16).run()
    assert (result["samples"], result["skipped"]) == (5, {"not_an_image": 1})


def _missing(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "missing", tmp_path / "out"


def _empty(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty", tmp_path / "out"


def _all_bad(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"no image")
    return tmp_path / "bad", tmp_path / "out"


@pytest.mark.parametrize(
    ("make", "said"), [(_missing, "no such folder"), (_empty, "no image in"), (_all_bad, "can be used")]
)
def test_mistakes_leave_nothing(make: Callable[[Path], tuple[Path, Path]], said: str, tmp_path: Path) -> None:
    src, out = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=said):
        ShardsJob(src=src, out=out, resize_px=16).run()
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_is_there_is_not_touched(pictures: Path, tmp_path: Path) -> None:
    ShardsJob(src=pictures, out=tmp_path / "out").run()
    before = (tmp_path / "out/shard-000000.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="is there already"):
        ShardsJob(src=pictures, out=tmp_path / "out").run()
    assert (tmp_path / "out/shard-000000.tar").stat().st_mtime_ns == before
