"""Snapshots torn in every way: the newest whole one is found, and what was skipped is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from pipelines.train.snapshots import SnapshotWriter, find_snapshot, load_snapshot, snapshot_folder

STEPS = (10, 20, 30)


def state_at(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(64, 8, generator=generator)},
        "ema": {"weight": torch.ones(3) * step},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    writer = SnapshotWriter(tmp_path, keep=3)
    for step in STEPS:
        writer.write(step, state_at(step))
    writer.wait()
    return tmp_path


def newest_files(root: Path) -> list[str]:
    return sorted(path.name for path in snapshot_folder(root, 30).iterdir())


def test_what_was_written_is_read_bit_for_bit(root: Path) -> None:
    for step in STEPS:
        loaded = state_at(0)
        load_snapshot(root, step, loaded)
        assert torch.equal(loaded["model"]["weight"], state_at(step)["model"]["weight"])
    assert find_snapshot(root).step == 30
    assert find_snapshot(root).skipped == ()


def test_the_state_is_that_of_the_call(tmp_path: Path) -> None:
    """It is written in the background, while training changes the tensors."""
    state = state_at(1)
    writer = SnapshotWriter(tmp_path, keep=3)
    writer.write(1, state)
    state["model"]["weight"].zero_()
    writer.wait()
    loaded = state_at(0)
    load_snapshot(tmp_path, 1, loaded)
    assert torch.equal(loaded["model"]["weight"], state_at(1)["model"]["weight"])


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("number", range(3))
def test_a_cut_file_sends_back_to_the_one_before(root: Path, number: int, kept: float) -> None:
    name = newest_files(root)[number]
    file = snapshot_folder(root, 30) / name
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    found = find_snapshot(root)
    assert found.step == 20
    (skipped,) = found.skipped
    assert skipped.startswith(f"step 30: {name}")


@pytest.mark.parametrize("number", range(3))
def test_a_flipped_bit_sends_back_to_the_one_before(root: Path, number: int) -> None:
    file = snapshot_folder(root, 30) / newest_files(root)[number]
    data = bytearray(file.read_bytes())
    # In snapshot.json: in the middle of a digest.
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert find_snapshot(root).step == 20


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda newest: (newest / "snapshot.json").unlink(), "step 30: snapshot.json is missing"),
        (lambda newest: (newest / ".metadata").unlink(), "step 30: .metadata is missing"),
        (_remove, "step 30: the folder is missing"),
    ],
)
def test_what_is_gone_is_said(root: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(snapshot_folder(root, 30))
    found = find_snapshot(root)
    assert (found.step, found.skipped) == (20, (said,))


def test_none_valid_is_refused(root: Path) -> None:
    for step in STEPS:
        (snapshot_folder(root, step) / "snapshot.json").write_text("{")
    with pytest.raises(
        UserError, match=r"no snapshot in .* is valid \(step 30: .*; step 20: .*; step 10: .*restore"
    ):
        find_snapshot(root)


def test_all_gone_is_no_fresh_start(root: Path) -> None:
    for step in STEPS:
        _remove(snapshot_folder(root, step))
    with pytest.raises(UserError, match=r"no snapshot in .* is valid \(step 30: the folder is missing\)"):
        find_snapshot(root)


def test_without_its_pointer_the_newest_still_counts(root: Path) -> None:
    (root / "latest.json").unlink()
    assert find_snapshot(root).step == 30


def test_one_that_was_never_published_is_no_loss(root: Path) -> None:
    torn = snapshot_folder(root, 40)
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    assert find_snapshot(root) == find_snapshot(root)
    assert (find_snapshot(root).step, find_snapshot(root).skipped) == (30, ())


def test_a_run_that_never_published_starts_afresh(tmp_path: Path) -> None:
    assert find_snapshot(tmp_path / "snapshots").step == 0
    (tmp_path / "step-00000010").mkdir()
    assert find_snapshot(tmp_path).step == 0


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path, keep=2)
    for step in (10, 20, 30, 40):
        writer.write(step, state_at(step))
    writer.wait()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000030", "step-00000040"]
    assert json.loads((tmp_path / "latest.json").read_text()) == {"step": 40}


def test_a_write_that_fails_is_raised_at_the_next(tmp_path: Path) -> None:
    blocked = tmp_path / "snapshots"
    blocked.write_text("a file where the folder should be")
    writer = SnapshotWriter(blocked, keep=2)
    writer.write(10, state_at(10))
    with pytest.raises(OSError, match="snapshots"):
        writer.wait()
