"""Whole or nothing, and first or not at all."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from ldm.errors import UserError
from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader
from pipelines.publish import create, publish

LOCAL = fsspec.filesystem("file")


def test_published_file_is_whole_alone_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    for data in (b"one", b"two"):
        publish(LOCAL, str(path), data)
        assert path.read_bytes() == data
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_failed_publish_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        publish(LOCAL, str(tmp_path / "taken"), b"data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_create_is_for_the_first_one_only(tmp_path: Path, scheme: str) -> None:
    store, path = fsspec.filesystem(scheme), f"{tmp_path}/deep/file"
    assert create(store, path, b"first") is True
    assert create(store, path, b"second") is False
    assert create(store, path, b"first") is False
    assert store.cat_file(path) == b"first"
    assert len(store.ls(f"{tmp_path}/deep")) == 1


def test_one_of_many_creates_and_its_file_is_whole(tmp_path: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    for race in range(20):
        path = tmp_path / str(race)
        with ThreadPoolExecutor(8) as pool:
            won = [*pool.map(lambda data, path=path: create(LOCAL, str(path), data), contents)]
        assert won.count(True) == 1
        assert path.read_bytes() == contents[won.index(True)]
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, range(20)))


def test_two_jobs_cannot_both_say_what_a_new_dataset_is(tmp_path: Path) -> None:
    kind = DatasetHeader(
        vae="f8", vae_fingerprint="aa", f=8, channels=2, preprocess=Preprocess(), unit_size=4
    )

    def start(job: tuple[Path, int]) -> int | str:
        try:
            header = kind.model_copy(update={"unit_size": job[1]})
            return LatentDataset.create_or_check(job[0], header).header.unit_size
        except UserError as error:
            return str(error)

    for race in range(20):
        with ThreadPoolExecutor(2) as pool:
            answers = [*pool.map(start, [(tmp_path / str(race), 64), (tmp_path / str(race), 128)])]
        (winner,) = [answer for answer in answers if isinstance(answer, int)]
        (loser,) = [answer for answer in answers if isinstance(answer, str)]
        assert f"unit_size: {winner}, not {192 - winner}" in loser
