"""Folders of images and list files: samples, stable buckets, versions, missing files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.errors import BadSampleError, UserError
from pipelines.class_names import read_class_names
from pipelines.shards import InputConfig, Sample, Shard, list_shards, read_samples


def samples(source: Path, **config: object) -> dict[str, Sample]:
    options = InputConfig.model_validate(config)
    found = [s for shard in list_shards(source, options) for s in read_samples(shard, options)]
    assert len({sample.key for sample in found}) == len(found)
    return {sample.key: sample for sample in found}


def reason(sample: Sample) -> str:
    with pytest.raises(BadSampleError) as caught:
        sample.image_bytes()
    return caught.value.reason


def changed(before: list[Shard], after: list[Shard]) -> set[str]:
    """Names of the shards that are not the same in both."""
    return {shard.name for shard in set(before) ^ set(after)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """300 images in two classes; some with captions and fields."""
    root = tmp_path / "photos"
    for index in range(300):
        path = root / ("cat" if index % 3 else "dög") / f"{index} #[1].JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"image {index}".encode())
        if index % 5 == 0:
            path.with_suffix(".txt").write_text(f"caption {index}")
        if index % 7 == 0:
            path.with_suffix(".json").write_text(json.dumps({"n": index, "label": 99}))
    (root / ".hidden").mkdir()
    (root / ".hidden/a.jpg").write_bytes(b"x")
    (root / "cat/.b.jpg").write_bytes(b"x")
    (root / "README.md").write_text("no input")
    return root


def test_a_folder_gives_every_image_once(folder: Path) -> None:
    found = samples(folder)
    assert len(found) == 300
    for index in range(300):
        sample = found[f"{'cat' if index % 3 else 'dög'}/{index} #[1]"]
        assert sample.image == f"image {index}".encode()
        assert sample.label() == (0 if index % 3 else 1)
        assert sample.caption() == (f"caption {index}" if index % 5 == 0 else None)
        assert sample.chosen(["n"]) == {"n": None if index % 7 else index}
    assert samples(folder, label_field="label")["dög/0 #[1]"].label() == 99


def test_shards_of_a_folder_are_in_order_and_so_are_their_samples(folder: Path) -> None:
    shards = list_shards(folder)
    assert [shard.name for shard in shards] == sorted(shard.name for shard in shards)
    assert {shard.name for shard in shards} <= {f"photos-{bucket:02x}" for bucket in range(64)}
    for shard in shards[:3]:
        keys = [sample.key for sample in read_samples(shard)]
        assert keys == sorted(keys)
        assert keys == [sample.key for sample in read_samples(shard)]


def _add(folder: Path) -> None:
    (folder / "cat/added.png").write_bytes(b"x")


def _edit(folder: Path) -> None:
    (folder / "cat/1 #[1].JPG").write_bytes(b"another content")


def _remove(folder: Path) -> None:
    (folder / "cat/1 #[1].JPG").unlink()


def _caption(folder: Path) -> None:
    (folder / "cat/1 #[1].txt").write_text("a caption")


@pytest.mark.parametrize("change", [_add, _edit, _remove, _caption])
@pytest.mark.parametrize("digest", [False, True])
def test_a_changed_file_changes_one_shard(folder: Path, change: Callable[[Path], None], digest: bool) -> None:
    config = InputConfig(digest=digest)
    before = list_shards(folder, config)
    change(folder)
    assert len(changed(before, list_shards(folder, config))) == 1


def test_a_digest_does_not_see_time_and_sees_what_time_does_not(folder: Path) -> None:
    path = folder / "cat/1 #[1].JPG"
    stat, content = path.stat(), path.read_bytes()
    plain, digest = list_shards(folder), list_shards(folder, InputConfig(digest=True))
    os.utime(path, (1, 1))
    assert len(changed(plain, list_shards(folder))) == 1
    assert list_shards(folder, InputConfig(digest=True)) == digest
    path.write_bytes(content[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert list_shards(folder) == plain
    assert len(changed(digest, list_shards(folder, InputConfig(digest=True)))) == 1


def test_a_moved_folder_keeps_its_buckets(folder: Path, tmp_path: Path) -> None:
    before = {shard.name: [s.key for s in read_samples(shard)] for shard in list_shards(folder)}
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere/photos")
    assert {shard.name: [s.key for s in read_samples(shard)] for shard in list_shards(moved)} == before


def test_links_are_followed_to_files_and_versioned_by_their_targets(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "in/a.jpg").symlink_to(tmp_path / "target")
    (tmp_path / "in/nowhere.jpg").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "in/pipe.jpg")
    before = list_shards(tmp_path / "in")
    found = samples(tmp_path / "in")
    assert found["a"].image == b"x"
    assert reason(found["nowhere"]) == "missing_file"
    assert set(found) == {"a", "nowhere"}
    (tmp_path / "target").write_bytes(b"another")
    assert len(changed(before, list_shards(tmp_path / "in"))) == 1


def test_class_names(folder: Path) -> None:
    assert read_class_names(str(folder)) == ("cat", "dög")
    (folder / "classes.json").write_text('["dög", "owl", "cat"]')
    assert read_class_names(str(folder)) == ("dög", "owl", "cat")
    assert samples(folder)["cat/1 #[1]"].label() == 2
    (folder / "classes.json").write_text('["cat"]')
    with pytest.raises(UserError, match="does not name the class of the folder 'dög'"):
        list_shards(folder)


def test_two_images_of_one_key_are_two_samples(tmp_path: Path) -> None:
    for extension in ("jpg", "png"):
        (tmp_path / f"a.{extension}").write_bytes(extension.encode())
    (shard,) = list_shards(tmp_path)
    assert [(s.key, s.image) for s in read_samples(shard)] == [("a", b"jpg"), ("a", b"png")]
    assert reason(next(read_samples(shard, InputConfig(max_member_bytes=2)))) == "member_too_large"


def test_a_list_of_paths(folder: Path, tmp_path: Path) -> None:
    lines = [
        "photos/cat/1 #[1].JPG",
        str(folder / "cat/2 #[1].JPG"),
        f"file://{folder}/cat/4 #[1].JPG",
        "photos/missing.jpg",
        "photos/cat",
        "nosuch://a.jpg",
        "simplecache::file:///a.jpg",
        "",
    ]
    listed = tmp_path / "list.txt"
    listed.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    found = samples(listed)
    good = {key: sample.image for key, sample in found.items() if not sample.fields}
    assert good == {
        "photos/cat/1 #[1]": b"image 1",
        f"{folder}/cat/2 #[1]": b"image 2",
        f"file://{folder}/cat/4 #[1]": b"image 4",
    }
    assert {key: reason(sample) for key, sample in found.items() if sample.fields} == {
        "photos/missing": "missing_file",
        "photos/cat": "missing_file",
        "nosuch://a.jpg": "bad_path",
        "simplecache::file:///a.jpg": "bad_path",
    }


def test_a_list_of_rows(folder: Path, tmp_path: Path) -> None:
    rows: list[object] = [
        {"file_name": "photos/cat/1 #[1].JPG", "text": "a cat", "label": 4},
        {"image": "photos/cat/2 #[1].JPG", "id": "é", "url": "not this"},
        {"text": "no path"},
        [1],
    ]
    listed = tmp_path / "list.jsonl"
    listed.write_text("\n".join(map(json.dumps, rows)) + "\n{")
    found = samples(listed)
    first = found["photos/cat/1 #[1]"]
    assert (first.image, first.caption(), first.label()) == (b"image 1", "a cat", 4)
    assert found["é"].chosen(["url"]) == {"url": "not this"}
    reasons = {key: reason(sample) for key, sample in found.items() if sample.image is None}
    assert reasons == {'{"text": "no path"}': "bad_path", "[1]": "bad_json", "{": "bad_json"}


def test_a_list_changes_where_a_line_or_its_file_does(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.lst"
    lines = [f"photos/cat/{index} #[1].JPG" for index in range(1, 300) if index % 3]
    listed.write_text("\n".join(lines))
    before = list_shards(listed)
    _edit(folder)
    after_edit = list_shards(listed)
    assert len(changed(before, after_edit)) == 1
    listed.write_text("\n".join([*lines[:50], "photos/later.jpg", *lines[50:]]))
    after_line = list_shards(listed)
    assert len(changed(after_edit, after_line)) == 1
    (folder / "later.jpg").write_bytes(b"x")
    assert len(changed(after_line, list_shards(listed))) == 1
    (shard,) = [shard for shard in list_shards(listed) if shard not in after_line]
    keys = [sample.key for sample in read_samples(shard)]
    assert keys == [line[:-4] for line in listed.read_text().split("\n") if line[:-4] in keys]
