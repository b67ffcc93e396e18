"""Which inputs there are, how they are told apart, and the one line for those that are none."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.errors import UserError
from pipelines.shards import InputConfig, Sample, list_shards, read_samples, write_tar


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write_tar(folder / "b.tar", [Sample("b", b"b")])
    pq.write_table(pa.table({"image": [b"a"]}), folder / "sub/a.parquet")
    (folder / "classes.json").write_text("[]")
    (folder / ".c.tar.partial").write_bytes(b"")
    (folder / "._b.tar").write_bytes(b"no tar")
    return folder


def test_tars_and_parquet_files_in_one_folder(mixed: Path) -> None:
    shards = list_shards(mixed)
    assert [shard.name for shard in shards] == ["b", "a"]
    assert [sample.image for shard in shards for sample in read_samples(shard)] == [b"b", b"a"]
    assert list_shards(mixed / "b.tar") == shards[:1]


def test_a_version_follows_size_and_time_or_content(mixed: Path) -> None:
    path = mixed / "b.tar"

    def version(digest: bool) -> str:
        return list_shards(path, InputConfig(digest=digest))[0].version

    plain, digest = version(False), version(True)
    assert len(digest) == 64
    os.utime(path, (1, 1))
    assert (version(False) != plain, version(True) == digest) == (True, True)
    write_tar(path, [Sample("b", b"c")])
    assert version(True) != digest


def _missing(folder: Path) -> str:
    return str(folder / "missing")


def _empty(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def _text(folder: Path) -> str:
    (folder / "a.md").write_text("text")
    return str(folder / "a.md")


def _empty_list(folder: Path) -> str:
    (folder / "list.txt").write_text("\n \n")
    return str(folder / "list.txt")


def _both(folder: Path) -> str:
    (folder / "sub/a.jpg").write_bytes(b"x")
    return str(folder)


def _one_name(folder: Path) -> str:
    write_tar(folder / "a.tar", [])
    return str(folder)


def _no_such_store(folder: Path) -> str:
    return "nosuch://a"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_missing, "no such input: "),
        (_empty, "no shards in "),
        (_text, "a.md is no input; allowed: "),
        (_empty_list, "list.txt names no file; allowed: one path or URL per line"),
        (_both, r"both shards and loose images in .* \(b.tar and sub/a.jpg\)"),
        (_one_name, "are named 'a'"),
        (_no_such_store, "nosuch://a"),
    ],
)
def test_mistakes_are_one_line(mixed: Path, make: Callable[[Path], str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        list_shards(make(mixed))
    assert "\n" not in str(caught.value)


def test_s3_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"s3://bucket/shards.*credentials") as caught:
        list_shards("s3://bucket/shards")
    assert "\n" not in str(caught.value)
