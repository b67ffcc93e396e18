"""Pairs of two sizes against the files read directly, by key."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ldm.aspect_buckets import AspectBuckets
from ldm.autoencoder import load
from ldm.errors import BadSampleError, UserError
from ldm.images import encode_png
from ldm.preprocess import Preprocess
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader
from pipelines.encode.attempts import attempt
from pipelines.encode.decode import Judge, decode_unit
from pipelines.encode.encoder import encode_unit
from pipelines.encode.micro_batches import ImageEncoder
from pipelines.encode.pools import EncoderPool
from pipelines.encode.units import slice_units
from pipelines.encode.write import write_unit
from pipelines.latent_table import LatentRows, data_bytes, read_latents
from pipelines.shards import Sample, Shard
from pipelines.train.loader import LatentBatch, LatentLoader, LoaderConfig

BATCH = 8
LOW = "data/16px-16x16/unit-000001.parquet"


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 rows of 3 × 8 × 8 in a row group and 21 of 3 × 4 × 4, so that their ends do not meet."""
    monkeypatch.setattr("pipelines.latent_table.ROW_GROUP_BYTES", 4096)


def loader_of(folder: Path, **options: object) -> LatentLoader:
    values = {"validation_rows": 8, "window_groups": 3, "size_px": 32, "low_size_px": 16, **options}
    config = LoaderConfig.model_validate(values)
    return LatentLoader(LatentDataset.open(folder), config, batch_size=BATCH, seed=5, condition_dropout=0.3)


def take(loader: LatentLoader, count: int, *, rank: int = 0, world: int = 1) -> list[LatentBatch]:
    return list(islice(loader.batches(rank=rank, world=world), count))


def stored(folder: Path, size_px: int) -> dict[str, list[np.ndarray]]:
    """key → its mean and std, then those of the mirrored image if they are there, float32."""
    rows = {}
    for path in sorted((folder / "data").glob(f"{size_px}px-*/*.parquet")):
        found = read_latents(str(path))
        arrays = [*found.moments, *(found.mirrored or ())]
        rows |= {key: [a[i].astype(np.float32) for a in arrays] for i, key in enumerate(found.keys)}
    return rows


@pytest.mark.parametrize("mirrored", [False, True])
def test_every_row_comes_with_the_small_latent_of_its_key(
    write_pairs: Callable[..., Path], tmp_path: Path, mirrored: bool
) -> None:
    """Over two buckets and three units; both sizes are mirrored or neither; epoch and key decide all."""
    folder = write_pairs(tmp_path / "d", count=150, wide_every=3, mirrored=mirrored)
    groups = [
        pq.ParquetFile(folder / f"data/{bucket}/unit-000000.parquet").metadata.num_row_groups
        for bucket in ("32px-32x32", "16px-16x16", "32px-64x32", "16px-32x16")
    ]
    assert groups == ([17, 4, 17, 4] if mirrored else [7, 2, 9, 2])
    loader = loader_of(folder)
    small, large = stored(folder, 16), stored(folder, 32)
    seen = set()
    for index, batch in enumerate(take(loader, 2 * loader.batches_per_epoch)):
        assert batch.low is not None
        for i, key in enumerate(batch.keys_B):
            seed = keyed_seed("row", 5, index // loader.batches_per_epoch, key)
            rng = np.random.Generator(np.random.Philox(key=seed))
            _, _, flip = rng.random(3)
            side = slice(2, 4) if mirrored and flip < 0.5 else slice(0, 2)
            mean, std = large[key][side]
            posterior, _ = rng.standard_normal((2, *mean.shape), np.float32)
            assert np.array_equal(batch.z_BChw[i].numpy(), mean + std * posterior)
            mean, std = small[key][side]
            posterior, noise = rng.standard_normal((2, *mean.shape), np.float32)
            assert np.array_equal(batch.low.z_BChw[i].numpy(), mean + std * posterior)
            assert np.array_equal(batch.low.noise_BChw[i].numpy(), noise)
            assert float(batch.low.u_B[i]) == np.float32(rng.random())
            seen.add(key)
    assert len(seen) > 130


def test_what_is_drawn_without_pairs_keeps_its_bits(write_pairs: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "d", mirrored=True)
    alone = take(loader_of(folder, low_size_px=None), 20)
    for batch, other in zip(take(loader_of(folder), 20), alone, strict=True):
        assert (batch.keys_B, other.low) == (other.keys_B, None)
        for name in ("z_BChw", "noise_BChw", "u_B", "keep_B", "labels_B"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


def test_two_ranks_see_the_pairs_of_one(write_pairs: Callable[..., Path], tmp_path: Path) -> None:
    loader = loader_of(write_pairs(tmp_path / "d", wide_every=3))
    whole = take(loader, 20)
    ranks = [take(loader, 20, rank=rank, world=2) for rank in range(2)]
    for step, shares in zip(whole, zip(*ranks, strict=True), strict=True):
        for name in ("z_BChw", "noise_BChw", "u_B"):
            joined = torch.stack([getattr(share.low, name) for share in shares], 1).flatten(0, 1)
            assert torch.equal(joined, getattr(step.low, name))


def test_held_out_rows_have_pairs_too_the_same_on_any_ranks(
    write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_pairs(tmp_path / "d", count=200)
    loader, small = loader_of(folder), stored(folder, 16)

    def held_out(world: int) -> dict[str, torch.Tensor]:
        batches = [batch for rank in range(world) for batch in loader.validation(rank=rank, world=world)]
        return {key: b.low.z_BChw[i] for b in batches if b.low for i, key in enumerate(b.keys_B)}

    one, two = held_out(1), held_out(2)
    assert len(one) == 8
    assert one.keys() == two.keys()
    for key, z in one.items():
        mean, std = small[key]
        assert torch.equal(z, two[key])
        assert (np.abs(z.numpy() - mean) <= 6 * std).all()


def test_parts_of_a_batch_keep_their_pairs(write_pairs: Callable[..., Path], tmp_path: Path) -> None:
    (batch,) = take(loader_of(write_pairs(tmp_path / "d")), 1)
    parts = batch.split(4)
    for name in ("z_BChw", "noise_BChw", "u_B"):
        assert torch.equal(torch.cat([getattr(part.low, name) for part in parts]), getattr(batch.low, name))


def rewrite(folder: Path, change: Callable[[list[str]], list[int]]) -> None:
    """Change which rows `LOW` has, and let commit and manifest say so too."""
    dataset = LatentDataset.open(folder)
    found = read_latents(str(folder / LOW))
    order = change(list(found.keys))
    moments = type(found.moments)(*(m[order] for m in found.moments))
    columns = [
        [column[i] for i in order] for column in (found.keys, found.labels, found.captions, found.extras)
    ]
    data = data_bytes(LatentRows(*columns, moments), dataset.header.form)
    file = dataset.publish(LOW, data, len(order))
    (commit,) = dataset.commits(["unit-000001"])
    files = tuple(file if old.path == LOW else old for old in commit.files)
    dataset.commit(commit.model_copy(update={"files": files}))
    dataset.write_derived()


def test_pairs_of_different_keys_are_refused_when_they_are_read(
    write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_pairs(tmp_path / "d")
    rewrite(folder, lambda keys: [*range(30), 31, 30, *range(32, len(keys))])
    with pytest.raises(
        UserError, match=rf"^{LOW} has key k81 where data/32px-32x32/unit-000001\.parquet has k80;"
    ):
        take(loader_of(folder), 12)


def test_a_file_that_lacks_a_row_is_refused_before_the_first_batch(
    write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_pairs(tmp_path / "d")
    rewrite(folder, lambda keys: list(range(len(keys) - 1)))
    said = "unit-000001.parquet has 50 rows in bucket 32px-32x32 and 49 in 16px-16x16; run ldm verify"
    with pytest.raises(UserError, match=said):
        loader_of(folder)


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ((16, 32), {"low_size_px": 8}, "has no images of size 8; allowed: 16, 32"),
        ((16, 32), {"size_px": None}, "several sizes; allowed: 16, 32; choose one: --train.data.size-px 16"),
        ((16, 32), {"low_size_px": 32}, "size 32 is no whole multiple of the low size 32; allowed: 2, 3"),
        ((16, 32), {"size_px": 16, "low_size_px": 32}, "size 16 is no whole multiple of the low size 32"),
        ((20, 32), {"low_size_px": 20}, "size 32 is no whole multiple of the low size 20"),
    ],
)
def test_sizes_that_make_no_pairs(
    write_pairs: Callable[..., Path],
    tmp_path: Path,
    sizes: tuple[int, int],
    options: dict[str, object],
    said: str,
) -> None:
    with pytest.raises(UserError, match=said):
        loader_of(write_pairs(tmp_path / "d", sizes_px=sizes), **options)


def test_a_bucket_without_counterpart(write_pairs: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "d", ratio=3)
    said = "bucket 32px-48x48 has 12×12 latents, and no bucket of size 16 has latents 2 times smaller; encode"
    with pytest.raises(UserError, match=said):
        loader_of(folder)


class OneViewFails(ImageEncoder):
    """Has no memory for the second, larger view of the fourth image."""

    def encode(self, images_N: object, this_attempt: object) -> list[object]:  # type: ignore[override]
        found = super().encode(images_N, this_attempt)  # type: ignore[arg-type]
        return [*found[:7], BadSampleError("out_of_memory"), *found[8:]]


def test_what_the_encoder_writes_are_pairs(vae_folder: Path, tmp_path: Path) -> None:
    """Three aspects, through decoding, VAE and writer; what fails at one size is in neither."""
    preprocess = Preprocess(sizes_px=(16, 32), buckets=AspectBuckets(step_px=8, max_aspect=4))
    header = DatasetHeader(
        vae=str(vae_folder),
        vae_fingerprint=load(vae_folder).fingerprint,
        f=4,
        channels=3,
        preprocess=preprocess,
        unit_size=30,
    )
    dataset = LatentDataset.create_or_check(tmp_path / "d", header)
    encoder = OneViewFails(load(vae_folder), EncoderPool(micro_batch=8), torch.device("cpu"))
    rng = np.random.default_rng(0)
    sides = [(40, 40), (40, 160), (160, 40)]
    samples = [
        Sample(f"s{i}", encode_png(rng.integers(0, 256, (*sides[rng.integers(3)], 3), dtype=np.uint8)))
        for i in range(60)
    ]
    samples[10] = Sample("s10", b"\x89PNG\r\n\x1a\nand no more")
    for unit in slice_units(Shard("file:///a.tar", "a.tar", "1"), samples, header.unit_size):
        with attempt(None, "encode", unit.unit.id) as this_attempt:
            decoded = decode_unit(unit, Judge(preprocess), this_attempt)
            write_unit(dataset, encode_unit(encoder, decoded, header.form, this_attempt))
    dataset.write_derived()
    loader = loader_of(tmp_path / "d", validation_rows=0, max_quarantined_share=0.1)
    assert sorted(loader.shapes) == [(3, 4, 16), (3, 8, 8), (3, 16, 4)]
    small, large = stored(tmp_path / "d", 16), stored(tmp_path / "d", 32)
    assert small.keys() == large.keys()
    assert len(small) == 57
    seen = {}
    for batch in take(loader, 3 * loader.batches_per_epoch):
        seen |= dict(zip(batch.keys_B, zip(batch.z_BChw, batch.low.z_BChw, strict=True), strict=True))
    assert len(seen) > 50
    for key, (z, z_low) in seen.items():
        for latent, (mean, std) in ((z, large[key]), (z_low, small[key])):
            assert (np.abs(latent.numpy() - mean) <= 6 * std + 1e-6).all()
