"""A unit on a disk that has no room for it: told in one line, nothing torn, exact once there is room."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader
from pipelines.encode.rows import EncodedUnit, EncoderTrace, SampleColumns
from pipelines.encode.units import Unit
from pipelines.encode.write import write_unit
from pipelines.latent_table import Rejected
from pipelines.lease import writer_lease
from pipelines.publish import publish
from pipelines.shards import Shard

DISK_BYTES = 512 * 1024
PAGE_BYTES = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of DISK_BYTES."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def new_dataset(folder: Path) -> LatentDataset:
    header = DatasetHeader(
        vae="f8",
        vae_fingerprint="aa",
        f=8,
        channels=2,
        preprocess=Preprocess(sizes_px=(256,)),
        unit_size=4,
    )
    return LatentDataset.create_or_check(folder, header)


def encoded_unit() -> EncodedUnit:
    """Three images and a rejected one: a data file of about six pages, a quarantine file, a commit."""
    shard, draw = Shard("file:///a.tar", "a-00000000", "1"), np.random.default_rng(0)
    moments = [draw.normal(size=(2, 32, 32)).astype(np.float16) for _ in range(6)]
    return EncodedUnit(
        unit=Unit("a-00000000-000000", shard, 0, 0, 3, True),
        num_inputs=4,
        rejected=[Rejected("k3", shard.url, 3, "no_image", "")],
        samples=SampleColumns(["k0", "k1", "k2"], [None] * 3, [None] * 3, [None] * 3, [0, 1, 2]),
        stats=None,
        decode_s=0.0,
        trace=EncoderTrace("node", 1, "cpu", 0.0, 0.0),
        means_N=moments[:3],
        stds_N=[np.abs(std) for std in moments[3:]],
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(disk: Path, leave_pages: int) -> Path:
    """A file that leaves as many pages of the disk free."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leave_pages * PAGE_BYTES))
    return ballast


@pytest.mark.parametrize("leave_pages", range(12))
def test_unit_is_whole_or_absent_and_exact_after_space_is_freed(
    small_disk: Path, tmp_path: Path, leave_pages: int
) -> None:
    write_unit(new_dataset(tmp_path / "undisturbed"), encoded_unit())
    whole = files(tmp_path / "undisturbed")
    dataset = new_dataset(small_disk / "dataset")
    ballast = fill(small_disk, leave_pages)
    try:
        write_unit(dataset, encoded_unit())
        failure = ""
    except UserError as error:
        failure = str(error)
    there = files(small_disk / "dataset")
    # No temporary file, no torn one: whatever has a name has its bytes, and the commit came last.
    assert there == {name: whole[name] for name in there}
    assert bool(dataset.committed_units()) == (not failure)
    if failure:
        missing = next(name for name in sorted(whole, key=_order) if name not in there)
        assert failure.startswith(
            f"disk full or over quota: {dataset.root}/{missing} needs {len(whole[missing])} "
        )
        assert f"bytes, {shutil.disk_usage(small_disk).free} are free; free space" in failure
    ballast.unlink()
    write_unit(dataset, encoded_unit())
    assert files(small_disk / "dataset") == whole


def _order(name: str) -> int:
    """Of writing: header, data, quarantine, commit."""
    return ("dataset.json", "data", "quarantine", "commits").index(name.split("/", maxsplit=1)[0])


def test_both_outcomes_are_among_the_cases(small_disk: Path) -> None:
    dataset = new_dataset(small_disk / "dataset")
    before = shutil.disk_usage(small_disk).free
    write_unit(dataset, encoded_unit())
    pages = (before - shutil.disk_usage(small_disk).free) // PAGE_BYTES
    assert 4 < pages < 11


def test_old_file_stays_when_the_new_one_has_no_room(small_disk: Path) -> None:
    path = small_disk / "file"
    publish(new_dataset(small_disk / "d").filesystem, str(path), b"old")
    fill(small_disk, 1)
    with pytest.raises(UserError, match="disk full"):
        publish(new_dataset(small_disk / "d").filesystem, str(path), bytes(2 * PAGE_BYTES))
    assert path.read_bytes() == b"old"
    assert {entry.name for entry in small_disk.iterdir()} == {"file", "d", "ballast"}


def test_lease_on_a_full_disk_is_told_and_none_is_left(small_disk: Path) -> None:
    dataset = new_dataset(small_disk / "d")
    ballast = fill(small_disk, 0)
    with pytest.raises(UserError, match="disk full"):
        writer_lease(dataset.filesystem, dataset.root, "d").__enter__()
    ballast.unlink()
    with writer_lease(dataset.filesystem, dataset.root, "d"):
        pass


def test_commit_names_what_was_written(small_disk: Path) -> None:
    dataset = new_dataset(small_disk / "d")
    write_unit(dataset, encoded_unit())
    commit = json.loads(next((small_disk / "d/commits").iterdir()).read_bytes())
    for file in (*commit["files"], commit["quarantine_file"]):
        assert hashlib.sha256((small_disk / "d" / file["path"]).read_bytes()).hexdigest() == file["sha256"]
