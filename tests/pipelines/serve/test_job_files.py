"""The files of a job: how they come, and how they go."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from ldm.storage import filesystem
from pipelines.serve.deep_zoom import write_tiles
from pipelines.serve.job_store import JobNotFound, JobStore
from tests.faults.conftest import s3_port, s3_url
from tests.pipelines.serve.test_job_store import (
    Clock,
    clock,
    completed,
    filled,
    local,
    new_job,
    of_a_client,
    of_a_runner,
    store,
    url,
)

# Fixtures.
__all__ = ["clock", "local", "s3_port", "s3_url", "store", "url"]


def test_preview_and_result(store: JobStore, tmp_path: Path) -> None:
    record = new_job(store)
    assert store.preview(record.id, "ann") is None
    for png in (b"first", b"second"):
        store.put_preview(record.id, png)
        assert store.preview(record.id, "ann") == png
    (tmp_path / "image").write_bytes(b"w" * 100_000)
    store.put_result(record.id, b"j" * 10, "image/jpeg")
    store.put_result(record.id, tmp_path / "image", "image/webp")
    with pytest.raises(JobNotFound):
        store.open_result(record.id, "ann")
    store.update(record.revised(status="completed", content_type="image/webp"))

    with store.open_result(record.id, "ann").stream as stream:
        assert stream.read() == b"w" * 100_000
    assert store.open_result(record.id, "ann")[1:] == (100_000, "image/webp")


def test_a_file_of_any_size_takes_little_memory(local: JobStore, tmp_path: Path) -> None:
    size_bytes, record = 2**28, new_job(local)
    with (tmp_path / "image").open("wb") as stream:
        stream.truncate(size_bytes)

    tracemalloc.start()
    local.put_result(record.id, tmp_path / "image", "image/png")
    completed(local, record)
    read_bytes = 0
    with local.open_result(record.id, "ann").stream as stream:
        while block := stream.read(2**20):
            read_bytes += len(block)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert read_bytes == size_bytes
    assert peak_bytes < 2**24


def test_tiles(store: JobStore, tmp_path: Path, photo: Callable[[int], bytes]) -> None:
    record, made = new_job(store), tmp_path / "made"
    (tmp_path / "photo.png").write_bytes(photo(0))
    write_tiles(tmp_path / "photo.png", made)
    store.put_tiles(record.id, made)
    with pytest.raises(JobNotFound):
        store.dzi(record.id, "ann")
    completed(store, record)

    assert store.dzi(record.id, "ann") == (made / "tiles.dzi").read_bytes()
    for level in range(7):
        tile = (made / f"tiles_files/{level}/0_0.jpg").read_bytes()
        assert store.tile(record.id, "ann", level, 0, 0) == tile
    for place in ((7, 0, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, 10**5000)):
        with pytest.raises(JobNotFound):
            store.tile(record.id, "ann", *place)


def test_tiles_without_a_description_are_not_taken_for_whole(local: JobStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        local.put_tiles(new_job(local).id, tmp_path)


def test_what_has_ended_expires(store: JobStore, url: str, clock: Clock, tmp_path: Path) -> None:
    old, kept, waiting = new_job(store, ttl_s=50), new_job(store, ttl_s=51), new_job(store)
    filled(store, old, tmp_path / "made")
    clock.now = 1100.0
    kept = completed(store, kept)
    assert completed(store, old).expires_at == 1150.0
    assert store.expire(1149.9) == 0

    clock.now = 1150.0
    for ask in of_a_client(store, old.id, "ann"):
        with pytest.raises(JobNotFound):
            ask()
    assert {record.id for record in store.list("ann")} == {kept.id, waiting.id}
    assert store.counts() == {"queued": 1, "completed": 2}
    assert store.expire(1150.0) == 1
    assert store.counts() == {"queued": 1, "completed": 1}
    assert store.expire(10.0**9) == 1

    files, root = filesystem(url)
    assert [path.rsplit("/", 1)[-1] for path in files.ls(root, detail=False)] == [waiting.id]
    assert files.find(f"{root}/{old.id}") == []


def test_a_runner_that_comes_back_too_late_makes_no_folder(store: JobStore, url: str, clock: Clock) -> None:
    record = new_job(store)
    completed(store, record)
    clock.now = 2000.0
    assert store.expire(2000.0) == 1

    for put in (
        lambda: store.update(record),
        lambda: completed(store, record),
        *of_a_runner(store, record.id),
    ):
        with pytest.raises(JobNotFound):
            put()
    files, root = filesystem(url)
    assert files.find(root) == []


class Killed(BaseException):
    """In place of a signal, so that it comes at a known moment."""


def test_a_removal_that_is_killed_anywhere_is_never_seen(
    local: JobStore, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    for moment in range(20):
        clock.now = 1000.0
        record = completed(local, filled(local, new_job(local), tmp_path / f"made{moment}"))
        (tmp_path / "jobs" / record.id / ".job.json.abc.partial").write_bytes(b"of a writer that was killed")
        clock.now = 1050.0
        if removed_up_to(moment, JobStore(str(tmp_path / "jobs"), clock=clock), monkeypatch):
            break
        left.append(" ".join(sorted(path.name for path in (tmp_path / "jobs" / record.id).iterdir())))
        later = JobStore(str(tmp_path / "jobs"), clock=clock)
        assert later.unfinished() == later.list("ann") == []
        for ask in of_a_client(later, record.id, "ann"):
            with pytest.raises(JobNotFound):
                ask()
        later.expire(1050.0)
    # Contents one after the other, the two records, and the folder.
    assert len(left) == 9
    assert left[-3:] == ["done.json job.json", "done.json", ""]
    assert [*(tmp_path / "jobs").glob("*/*")] == []


def removed_up_to(moment: int, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the removal came to its end before so many things were removed."""
    calls = iter(range(moment))

    def counted(name: str) -> object:
        whole = getattr(LocalFileSystem, name)

        def remove(self: LocalFileSystem, *arguments: object, **named: object) -> object:
            if next(calls, None) is None:
                raise Killed
            return whole(self, *arguments, **named)

        return remove

    with monkeypatch.context() as patched:
        for name in ("rm", "rm_file"):
            patched.setattr(LocalFileSystem, name, counted(name))
        try:
            store.expire(1050.0)
        except Killed:
            return False
    return True
