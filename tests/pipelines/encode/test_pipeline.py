"""ENCODE end to end on a local Ray cluster, with a random VAE and hand-made shards."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.encode import EncodeJob
from jobs.stats import StatsJob
from ldm.autoencoder import load
from ldm.errors import UserError
from ldm.image_tensors import to_model
from ldm.preprocess import Preprocess
from ldm.text import load_text_encoder
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader
from pipelines.encode.backlog import find_backlog
from pipelines.encode.decode import Judge
from pipelines.encode.pipeline import TaskPools, vae_stage, written_units
from pipelines.encode.pools import EncoderPool, TaskPool, TextPool
from pipelines.latent_table import LatentRows, MomentArrays, read_latents
from pipelines.shards import Sample, list_shards, write_tar
from pipelines.storage_form import StorageForm
from pipelines.text_config import TextConfig
from pipelines.text_table import read_text
from tests.tiny_text import save_clip

pytestmark = pytest.mark.usefixtures("ray_cluster")

Photo = Callable[[int], bytes]
PREPROCESS = Preprocess(sizes_px=(32,))


def labelled(key: str, image: bytes | None, label: object = 0) -> Sample:
    return Sample(key, image, {"json": json.dumps({"label": label}).encode()})


def jpeg(photo: Photo, seed: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(photo(seed))).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, photo: Photo) -> Path:
    """Two shards: 10 good samples; 4 good ones among one of every kind of bad one, and a torn end."""
    folder = tmp_path_factory.mktemp("corpus")
    write_tar(folder / "good.tar", [labelled(f"g{i}", photo(i), i % 2) for i in range(10)])
    truncated = jpeg(photo, 20)
    bad = [
        labelled("first", photo(11)),
        labelled("cut", truncated[: len(truncated) // 2]),
        Sample("text", b"\xff\xd8this is text, whatever its name says"),
        labelled("none", None),
        labelled("twice", photo(12)),
        labelled("between", photo(13)),
        labelled("twice", photo(14)),
        labelled("minus", photo(15), -1),
        labelled("beyond", photo(16), 2),
        Sample("unlabelled", photo(17)),
        labelled("torn", photo(18)),
    ]
    write_tar(folder / "mixed.tar", bad)
    whole = (folder / "mixed.tar").read_bytes()
    # 'torn' is the last sample and its PNG the last member: cut inside it.
    (folder / "mixed.tar").write_bytes(whole[: whole.rindex(b"\x89PNG") + 600])
    (folder / "classes.json").write_text('["cat", "dog"]')
    return folder


REASONS = {
    "bad_label": 1,
    "broken_tar": 1,
    "duplicate_key": 1,
    "no_image": 1,
    "not_an_image": 1,
    "truncated_image": 1,
    "unknown_class": 1,
}
GOOD_KEYS = [f"g{i}" for i in range(10)] + ["first", "twice", "between", "unlabelled"]


def job(corpus: Path, out: Path, vae: Path, **options: object) -> EncodeJob:
    values = {"preprocess": PREPROCESS, "unit_size": 4, "encoder": EncoderPool(micro_batch=3), **options}
    return EncodeJob(input=str(corpus), output=str(out), vae=str(vae), **values)


def tree(folder: Path) -> dict[str, bytes]:
    """Everything that a dataset is, apart from who wrote it and what is told of that."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = (path for path in files if path.parent.name not in ("writers", "runs"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stored(dataset: LatentDataset) -> LatentRows:
    """All rows in manifest order."""
    parts = [read_latents(dataset.path(row["path"])) for row in dataset.derived().manifest.to_pylist()]
    return LatentRows(
        [key for part in parts for key in part.keys],
        [label for part in parts for label in part.labels],
        [caption for part in parts for caption in part.captions],
        [extra for part in parts for extra in part.extras],
        MomentArrays(
            np.concatenate([part.moments.mean_NChw for part in parts]),
            np.concatenate([part.moments.std_NChw for part in parts]),
        ),
    )


@pytest.fixture(scope="module")
def encoded(
    corpus: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Path:
    """The corpus, encoded once."""
    out = tmp_path_factory.mktemp("latents") / "run"
    summary = job(corpus, out, vae_folder).run()
    assert summary["images"] == len(GOOD_KEYS)
    assert summary["quarantined"] == REASONS
    assert (summary["units_done"], summary["units_skipped"]) == (6, 0)
    return out


def test_every_input_is_a_row_or_in_quarantine(encoded: Path) -> None:
    dataset = LatentDataset.open(encoded)
    totals = dataset.derived().totals
    assert totals.inputs == totals.rows + sum(totals.quarantined.values()) == 10 + 10 + 1
    assert stored(dataset).keys == GOOD_KEYS
    assert stored(dataset).labels == [0, 1] * 5 + [0, 0, 0, None]
    assert dataset.header.class_names == ("cat", "dog")


def test_quarantine_names_key_source_position_and_reason(encoded: Path) -> None:
    files = sorted((encoded / "quarantine").iterdir())
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert {row["source"].rsplit("/", 1)[-1] for row in found} == {"mixed.tar"}
    assert [(row["key"], row["position"], row["reason"]) for row in found] == [
        ("cut", 1, "truncated_image"),
        ("text", 2, "not_an_image"),
        ("none", 3, "no_image"),
        ("twice", 6, "duplicate_key"),
        ("minus", 7, "bad_label"),
        ("beyond", 8, "unknown_class"),
        ("", 10, "broken_tar"),
    ]


def test_moments_are_those_of_a_direct_encode(encoded: Path, vae_folder: Path, photo: Photo) -> None:
    rows = stored(LatentDataset.open(encoded))
    images = np.stack([PREPROCESS.views(photo(seed), "")[0] for seed in (*range(10), 11, 12, 13, 17)])
    direct = load(vae_folder).encode(to_model(images))
    # Half a unit in the last place of fp16, and what the batch size changes in fp32.
    for got, want in ((rows.moments.mean_NChw, direct.mean_BChw), (rows.moments.std_NChw, direct.std_BChw)):
        torch.testing.assert_close(torch.from_numpy(got).float(), want, rtol=2**-11 * 1.01, atol=1e-6)


def test_statistics_are_those_of_the_stored_rows(encoded: Path) -> None:
    dataset = LatentDataset.open(encoded)
    rows, stats = stored(dataset), dataset.derived().stats
    assert stats is not None
    mean, std = rows.moments.mean_NChw.astype(np.float64), rows.moments.std_NChw.astype(np.float64)
    expected_std = np.sqrt(mean.var(axis=(0, 2, 3)) + (std**2).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(stats.mean_C, mean.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(stats.std_C, expected_std, rtol=1e-12)
    assert json.loads((encoded / "stats.json").read_text())["std"] == list(stats.std_C)
    assert StatsJob(dataset=str(encoded)).run()["std"] == list(stats.std_C)


def test_stats_measures_the_forms_of_storage(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms = StatsJob(dataset=str(encoded)).run()["forms"]
    assert isinstance(forms, list)
    cost = {(form["stored"], form["dtype"]): form for form in forms}
    assert len(cost) == 6
    # As stored, the mean is what the moments say; int8 moves it a little, a sample a lot.
    assert cost["moments", "float16"]["psnr_db"] is None
    assert cost["mode", "float16"]["psnr_db"] is None
    losses = [cost[form]["psnr_db"] for form in (("mode", "int8"), ("sample", "float16"))]
    assert losses[0] > losses[1] + 3
    assert cost["moments", "int8"]["psnr_db"] == losses[0]
    sizes = [cost[form]["bytes_per_image"] for form in (("moments", "float16"), ("mode", "float16"))]
    assert sizes[0] > sizes[1]
    assert "forms of storage" in capsys.readouterr().out
    assert StatsJob(dataset=str(encoded), form_images=0).run()["forms"] == []


def test_the_run_leaves_a_page(encoded: Path) -> None:
    (page,) = (encoded / "runs").glob("*.html")
    assert f"<h1>{len(GOOD_KEYS)} images encoded</h1>" in page.read_text()


def test_another_run_gives_the_same_bytes(
    encoded: Path, corpus: Path, vae_folder: Path, tmp_path: Path
) -> None:
    # Two actors on a logical GPU each: who encodes a unit must not show in it.
    pool = EncoderPool(num_cpus=0.5, num_gpus=1, min_size=2, max_size=2, micro_batch=3)
    job(corpus, tmp_path / "again", vae_folder, encoder=pool).run()
    assert tree(tmp_path / "again") == tree(encoded)


def test_resume_encodes_only_what_is_missing(
    encoded: Path, corpus: Path, vae_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "resumed"
    shutil.copytree(encoded, out)
    removed = [
        next((out / "commits").glob("good-*-000001.json")),
        next((out / "commits").glob("mixed-*-000002.json")),
    ]
    for commit in removed:
        unit = commit.stem
        for path in [commit, *out.glob(f"data/*/{unit}.parquet"), *out.glob(f"quarantine/{unit}.parquet")]:
            path.unlink()
    times = {path: path.stat().st_mtime_ns for path in out.glob("commits/*")}
    summary = job(corpus, out, vae_folder).run()
    assert (summary["units_done"], summary["units_skipped"]) == (2, 4)
    assert tree(out) == tree(encoded)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_nothing_left_to_do_starts_nothing(encoded: Path, corpus: Path, vae_folder: Path) -> None:
    before = tree(encoded)
    summary = job(corpus, encoded, vae_folder).run()
    assert (summary["units_done"], summary["units_skipped"], summary["encoders"]) == (0, 6, ())
    assert tree(encoded) == before


def test_another_vae_is_refused_and_changes_nothing(
    encoded: Path, corpus: Path, other_vae_folder: Path
) -> None:
    before = tree(encoded)
    with pytest.raises(UserError, match="vae_fingerprint"):
        job(corpus, encoded, other_vae_folder).run()
    assert tree(encoded) == before


def test_an_edited_shard_is_encoded_again_and_an_added_one_added(
    encoded: Path, corpus: Path, vae_folder: Path, tmp_path: Path, photo: Photo
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(corpus, source)
    shutil.copytree(encoded, out)
    write_tar(source / "good.tar", [labelled(f"new{i}", photo(i)) for i in range(5)])
    write_tar(source / "added.tar", [labelled("added", photo(30))])
    summary = job(source, out, vae_folder).run()
    assert (summary["units_done"], summary["units_skipped"]) == (2 + 1, 3)
    assert (summary["retired_shards"], summary["removed_shards"]) == (("good",), ())
    kept = [key for key in GOOD_KEYS if not key.startswith("g")]
    assert sorted(stored(LatentDataset.open(out)).keys) == sorted(
        [*kept, *(f"new{i}" for i in range(5)), "added"]
    )
    # Taken back, the first version counts again, and nothing is encoded.
    (source / "added.tar").unlink()
    shutil.copy2(corpus / "good.tar", source / "good.tar")
    again = job(source, out, vae_folder).run()
    assert (again["units_done"], again["retired_shards"], again["removed_shards"]) == (
        0,
        ("good",),
        ("added",),
    )
    assert sorted(stored(LatentDataset.open(out)).keys) == sorted([*GOOD_KEYS, "added"])


def test_old_rows_count_until_the_new_version_is_whole(
    encoded: Path, corpus: Path, vae_folder: Path, tmp_path: Path, photo: Photo
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(corpus, source)
    shutil.copytree(encoded, out)
    bad = [labelled(f"bad{i}", b"no image") for i in range(30)]
    write_tar(source / "good.tar", [*[labelled(f"new{i}", photo(i)) for i in range(5)], *bad])
    # Half of all inputs are bad: the run fails at its end, with all units committed but the version not.
    with pytest.raises(UserError, match=r"30 of 35 inputs cannot be encoded.*good\.tar#bad0: not_an_image"):
        job(source, out, vae_folder).run()
    assert stored(LatentDataset.open(out)).keys == GOOD_KEYS
    job(source, out, vae_folder, max_bad_share=1.0).run()
    assert [key for key in stored(LatentDataset.open(out)).keys if key.startswith("new")]


def test_too_small_a_cluster_is_refused(corpus: Path, vae_folder: Path, tmp_path: Path) -> None:
    for pool, said in (
        (EncoderPool(num_cpus=64), "needs 65 CPUs"),
        (EncoderPool(num_gpus=8), "needs 8 GPUs"),
    ):
        with pytest.raises(UserError, match=said):
            job(corpus, tmp_path / "out", vae_folder, encoder=pool).run()
    assert not (tmp_path / "out").exists()


def test_stages_are_not_fused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Data would otherwise decode inside the VAE actors when both want one CPU."""
    header = DatasetHeader(vae="", vae_fingerprint="", f=4, channels=3, preprocess=PREPROCESS, unit_size=4)
    dataset = LatentDataset.create_or_check(tmp_path, header)
    backlog = find_backlog(list_shards(corpus), dataset)
    stage = vae_stage(header, "", EncoderPool())
    written_units(dataset, backlog, Judge(PREPROCESS), TaskPools(TaskPool(), TaskPool()), stage).explain()
    plan = capsys.readouterr().out
    stages = {
        "ReadShards",
        "MapBatches(_decode_row)",
        "MapBatches(UnitEncoder)",
    }
    assert stages <= set(re.findall(r"[\w()]+", plan))
    assert "->" not in plan


def test_size_must_be_a_multiple_of_f(corpus: Path, vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiples of 4"):
        job(corpus, tmp_path / "out", vae_folder, preprocess=Preprocess(sizes_px=(30,))).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([Sample("a", None, {"json": b"{}"})], "no sample has an image"),
        ([Sample("a", b"\xff\xd8text")], "not_an_image"),
        ([], "no sample has an image"),
    ],
)
def test_input_without_a_usable_image_leaves_nothing(
    samples: list[Sample], said: str, vae_folder: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "x.tar", samples)
    with pytest.raises(UserError, match=said):
        job(tmp_path / "x.tar", tmp_path / "out", vae_folder).run()
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_input(vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, said in (("missing", "no such input"), ("empty", "no shards in")):
        with pytest.raises(UserError, match=said):
            job(tmp_path / source, tmp_path / "out", vae_folder).run()
    assert not (tmp_path / "out").exists()


def test_captions_fields_sizes_and_mirrored_int8_arrive(
    vae_folder: Path, tmp_path: Path, photo: Photo
) -> None:
    clip = save_clip(tmp_path / "clip")
    captions = ["the cat", "the dog", "the cat", None]
    samples = [
        Sample(f"k{i}", photo(i), {"json": json.dumps({"caption": caption, "w": i}).encode()})
        for i, caption in enumerate(captions)
    ]
    write_tar(tmp_path / "in.tar", samples)
    summary = job(
        tmp_path / "in.tar",
        tmp_path / "out",
        vae_folder,
        preprocess=Preprocess(sizes_px=(16, 32)),
        form=StorageForm(dtype="int8", mirrored=True),
        text=TextConfig(encoder=str(clip)),
        text_encoder=TextPool(num_cpus=0.5),
        keep_fields=("w",),
    ).run()
    assert (summary["rows"], summary["images"], summary["quarantined"]) == (4, 16, {})
    dataset = LatentDataset.open(tmp_path / "out")
    files = {row["bucket"]: dataset.path(row["path"]) for row in dataset.derived().manifest.to_pylist()}
    assert files.keys() == {"16px-16x16", "32px-32x32"}
    for size in (16, 32):
        rows = read_latents(files[f"{size}px-{size}x{size}"])
        assert list(rows.captions) == captions
        assert [json.loads(extra or "") for extra in rows.extras] == [{"w": i} for i in range(4)]
        images = np.stack([Preprocess(sizes_px=(size,)).views(photo(i), "")[0] for i in range(4)])
        vae = load(vae_folder)
        assert rows.mirrored is not None
        for stored, shown in ((rows.moments, images), (rows.mirrored, images[:, :, ::-1])):
            direct = vae.encode(to_model(shown)).mean_BChw.numpy()
            step = np.abs(direct).max((2, 3), keepdims=True) / 127
            assert (np.abs(stored.mean_NChw - direct) <= 0.52 * step + 1e-3).all()
    (commit,) = dataset.commits()
    assert commit.text_file is not None
    embeddings = read_text(dataset.path(commit.text_file.path))
    assert list(embeddings) == ["the cat", "the dog"]
    for text, direct_LD in zip(
        embeddings, load_text_encoder(str(clip)).encode(list(embeddings)), strict=True
    ):
        np.testing.assert_allclose(embeddings[text], direct_LD, rtol=1e-3, atol=1e-3)
    assert dataset.header.text is not None and dataset.header.text.fingerprint


def test_precomputed_embeddings_arrive(vae_folder: Path, tmp_path: Path, photo: Photo) -> None:
    def npy(values: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, values)
        return buffer.getvalue()

    embeddings = [np.full((2 + i, 3), float(i), np.float32) for i in range(2)]
    samples = [Sample(f"k{i}", photo(i), {"t5.npy": npy(e)}) for i, e in enumerate(embeddings)]
    write_tar(tmp_path / "in.tar", [*samples, Sample("without", photo(9))])
    summary = job(
        tmp_path / "in.tar", tmp_path / "out", vae_folder, text=TextConfig(precomputed="t5.npy")
    ).run()
    assert (summary["rows"], summary["quarantined"]) == (2, {"missing_embedding": 1})
    dataset = LatentDataset.open(tmp_path / "out")
    (commit,) = dataset.commits()
    assert commit.text_file is not None
    stored = read_text(dataset.path(commit.text_file.path))
    assert list(stored) == ["k0", "k1"]
    assert all(np.array_equal(stored[f"k{i}"], e) for i, e in enumerate(embeddings))
