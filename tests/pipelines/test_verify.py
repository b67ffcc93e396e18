"""`ldm verify` finds what is wrong with a dataset, and `ldm gc` removes what nobody names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs.gc import GcJob
from jobs.verify import UnsoundDatasetError, VerifyJob
from ldm.autoencoder import load
from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader
from pipelines.encode.attempts import Attempt, Mark
from pipelines.encode.decode import Judge, decode_unit
from pipelines.encode.encoder import encode_unit
from pipelines.encode.micro_batches import ImageEncoder
from pipelines.encode.pools import EncoderPool
from pipelines.encode.units import slice_units
from pipelines.encode.write import write_unit
from pipelines.shards import Sample, list_shards, read_samples, write_tar
from pipelines.verify import verify

PREPROCESS = Preprocess(sizes_px=(16, 32))


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of an actor without a GPU; asked outside of one, Ray would start a cluster."""
    monkeypatch.setattr("pipelines.encode.recheck.pick_device", lambda: torch.device("cpu"))


@pytest.fixture
def source(tmp_path: Path, photo: Callable[[int], bytes]) -> Path:
    """Two shards, one image in nine bad."""
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(2):
        images = [b"no image" if i == 8 else photo(10 * shard + i) for i in range(10)]
        write_tar(folder / f"s{shard}.tar", [Sample(f"k{shard}{i}", data) for i, data in enumerate(images)])
    return folder


@pytest.fixture
def dataset(tmp_path: Path, source: Path, vae_folder: Path) -> LatentDataset:
    """The shards, encoded without Ray, at two sizes."""
    return encoded(tmp_path, source, vae_folder)


def encoded(tmp_path: Path, source: Path, vae_folder: Path) -> LatentDataset:
    vae = load(vae_folder)
    header = DatasetHeader(
        vae=str(vae_folder),
        vae_fingerprint=vae.fingerprint,
        f=vae.f,
        channels=vae.channels,
        preprocess=PREPROCESS,
        unit_size=4,
    )
    dataset = LatentDataset.create_or_check(tmp_path / "out", header)
    encoder = ImageEncoder(vae, EncoderPool(), torch.device("cpu"))
    attempt = Attempt({}, Mark(tmp_path / "mark"))
    for shard in list_shards(source):
        for unit in slice_units(shard, read_samples(shard), 4):
            decoded = decode_unit(unit, Judge(PREPROCESS), attempt)
            write_unit(dataset, encode_unit(encoder, decoded, header.form, attempt))
    dataset.write_derived()
    return dataset


def kinds(dataset: LatentDataset) -> set[str]:
    return set(verify(dataset).findings.counts)


def edit_commit(dataset: LatentDataset, unit: str, **changes: object) -> None:
    path = Path(dataset.path("commits", f"{unit}.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    dataset.write_derived()


def test_a_sound_dataset_has_no_findings(dataset: LatentDataset, source: Path) -> None:
    proof = verify(dataset)
    assert proof.findings.lines() == []
    # Three units a shard, two sizes each, and one quarantine file a shard.
    assert (proof.units, proof.rows, proof.files) == (6, 18, 6 * 2 + 2)
    result = VerifyJob(dataset=dataset.url, input=str(source), deep=True, share=1.0).run()
    assert result["rows"] == 18


def test_a_missing_a_damaged_and_a_short_file(dataset: LatentDataset) -> None:
    files = sorted(Path(dataset.path("data")).rglob("*.parquet"))
    files[0].unlink()
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(content)
    files[2].write_bytes(files[2].read_bytes()[:-1])
    counts = verify(dataset).findings.counts
    assert (counts["missing"], counts["damaged"]) == (1, 2)


def test_a_lost_unit_and_a_lost_end(dataset: LatentDataset) -> None:
    units = dataset.committed_units()
    Path(dataset.path("commits", f"{units[1]}.json")).unlink()
    Path(dataset.path("commits", f"{units[5]}.json")).unlink()
    dataset.write_derived()
    lines = verify(dataset).findings.lines()
    assert [line.split(":")[0] for line in lines] == ["incomplete", "incomplete"]
    assert "s0 lacks unit 1" in lines[0] and "s1 is not encoded to its end" in lines[1]


def test_an_account_that_does_not_add_up(dataset: LatentDataset) -> None:
    edit_commit(dataset, dataset.units()[0], num_inputs=5)
    assert kinds(dataset) == {"account"}


def test_statistics_that_are_not_those_of_the_rows(dataset: LatentDataset) -> None:
    unit = dataset.units()[0]
    commit = next(iter(dataset.commits([unit])))
    assert commit.stats is not None
    wrong = commit.stats.model_dump() | {"m2": [value * (1 + 1e-6) for value in commit.stats.m2]}
    edit_commit(dataset, unit, stats=wrong)
    assert kinds(dataset) == {"statistics"}


def test_a_key_that_is_there_twice(tmp_path: Path, vae_folder: Path, photo: Callable[[int], bytes]) -> None:
    keys = ["a", "b", "c", "d", "e", "a"]  # in the second unit, where encoding cannot see it
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/s.tar", [Sample(key, photo(i)) for i, key in enumerate(keys)])
    lines = verify(encoded(tmp_path, tmp_path / "in", vae_folder)).findings.lines()
    assert lines == [
        f"duplicate: key 'a' of shard s has 2 rows at {resolution}" for resolution in ("16px", "32px")
    ]


def test_stale_derived_files_are_found_and_repaired(dataset: LatentDataset) -> None:
    Path(dataset.path("stats.json")).write_text("{}")
    Path(dataset.path("manifest.parquet")).unlink()
    assert kinds(dataset) == {"stale"}
    VerifyJob(dataset=dataset.url, repair=True).run()
    assert kinds(dataset) == set()


def test_an_edited_and_a_missing_shard(
    dataset: LatentDataset, source: Path, photo: Callable[[int], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(source / "s0.tar", [Sample("new", photo(1))])
    write_tar(source / "s2.tar", [Sample("added", photo(2))])
    (source / "s1.tar").unlink()
    with pytest.raises(UnsoundDatasetError, match="3 findings"):
        VerifyJob(dataset=dataset.url, input=str(source)).run()
    out = capsys.readouterr().out
    assert "edited: shard s0" in out and "s2.tar, or not to its end" in out and "shard s1 is not in" in out


def test_deep_finds_latents_of_another_image(
    dataset: LatentDataset, source: Path, tmp_path: Path, vae_folder: Path, photo: Callable[[int], bytes]
) -> None:
    # The same keys and size of shard, one other picture; the version is made to match.
    stored = {shard.name: shard for shard in list_shards(source)}["s0"]
    samples = list(read_samples(stored))
    samples[2] = Sample(samples[2].key, photo(99))
    write_tar(source / "s0.tar", samples)
    changed = {shard.name: shard for shard in list_shards(source)}["s0"]
    for unit in [unit for unit in dataset.units() if unit.startswith("s0-")]:
        commit = next(iter(dataset.commits([unit])))
        from pipelines.unit_ids import unit_id

        moved = commit.model_copy(
            update={"unit": unit_id(changed, 4, commit.index), "shard_version": changed.version}
        )
        dataset.commit(moved)
        Path(dataset.path("commits", f"{unit}.json")).unlink()
    dataset.write_derived()
    with pytest.raises(UnsoundDatasetError):
        VerifyJob(dataset=dataset.url, input=str(source), deep=True, share=1.0).run()


def test_gc_removes_what_no_commit_names_and_nothing_else(dataset: LatentDataset) -> None:
    root = Path(dataset.root)
    before = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    orphan = root / "data/16px-16x16/s9-00000000-000000.parquet"
    partial = root / "data/32px-32x32/.s0.parquet.abc.partial"
    for path in (orphan, partial):
        path.write_bytes(b"left behind")
    assert GcJob(dataset=dataset.url).run() == {"files": 2, "bytes": 22, "deleted": False}
    assert orphan.exists() and partial.exists()
    assert GcJob(dataset=dataset.url, delete=True).run()["files"] == 2
    after = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    assert {path: data for path, data in after.items() if path.parent.name != "writers"} == before


def test_gc_retired_removes_versions_that_do_not_count(dataset: LatentDataset) -> None:
    old = [unit for unit in dataset.units() if unit.startswith("s0-")]
    dataset.set_current_family("s0", "s0-ffffffff")
    assert GcJob(dataset=dataset.url).run()["files"] == 0
    # Three commits, two data files each, one quarantine file.
    assert GcJob(dataset=dataset.url, retired=True, delete=True).run()["files"] == 3 + 6 + 1
    assert not set(old) & set(dataset.committed_units())
    assert len(dataset.units()) == 3
