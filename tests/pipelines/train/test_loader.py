"""The loader against the dataset read directly, and against itself on other numbers of ranks."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.latent_table import read_latents
from pipelines.train.loader import LatentBatch, LatentLoader, LoaderConfig

NUM_ROWS, BATCH = 20, 8
PER_EPOCH = NUM_ROWS // BATCH


def loader_of(folder: Path, *, batch_size: int = BATCH, seed: int = 5, **options: object) -> LatentLoader:
    config = LoaderConfig.model_validate({"validation_rows": 0, "window_groups": 1, **options})
    return LatentLoader(
        LatentDataset.open(folder), config, batch_size=batch_size, seed=seed, condition_dropout=0.3
    )


def take(
    loader: LatentLoader, count: int, *, rank: int = 0, world: int = 1, first: int = 0
) -> list[LatentBatch]:
    return list(islice(loader.batches(rank=rank, world=world, first=first), count))


def assert_equal(got: Sequence[LatentBatch], expected: Sequence[LatentBatch]) -> None:
    """Bit for bit."""
    for a, b in zip(got, expected, strict=True):
        assert a.keys_B == b.keys_B
        for name in ("z_BChw", "noise_BChw", "u_B", "keep_B", "labels_B"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def joined(ranks: Sequence[LatentBatch]) -> LatentBatch:
    """The global batch of one step's shares: row i is rank i mod w's."""

    def tensor(name: str) -> torch.Tensor:
        return torch.stack([getattr(share, name) for share in ranks], 1).flatten(0, 1)

    keys = tuple(key for group in zip(*(share.keys_B for share in ranks), strict=True) for key in group)
    names = ("z_BChw", "noise_BChw", "u_B", "keep_B", "labels_B")
    return LatentBatch(keys, *(tensor(name) for name in names), embeddings_B=(None,) * len(keys))


@pytest.fixture(scope="module")
def stored(latent_folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """key → mean, std, label; as plain pyarrow finds them."""
    rows = {}
    for path in sorted((latent_folder / "data").rglob("*.parquet")):
        found = read_latents(str(path))
        for i, key in enumerate(found.keys):
            label = found.labels[i]
            rows[key] = found.moments[0][i], found.moments[1][i], -1 if label is None else label
    return rows


def test_rows_are_those_of_the_dataset_with_everything_random_keyed_by_epoch_and_key(
    latent_folder: Path, stored: dict[str, tuple[np.ndarray, np.ndarray, int]]
) -> None:
    assert sorted(stored) == sorted(f"k{i}" for i in range(NUM_ROWS))
    for index, batch in enumerate(take(loader_of(latent_folder), 3 * PER_EPOCH)):
        for i, key in enumerate(batch.keys_B):
            mean, std, label = stored[key]
            seed = keyed_seed("row", 5, index // PER_EPOCH, key)
            rng = np.random.Generator(np.random.Philox(key=seed))
            u, keep, _ = rng.random(3)
            posterior, noise = rng.standard_normal((2, 3, 8, 8), np.float32)
            expected = mean.astype(np.float32) + std.astype(np.float32) * posterior
            assert np.array_equal(batch.z_BChw[i].numpy(), expected)
            assert np.array_equal(batch.noise_BChw[i].numpy(), noise)
            assert float(batch.u_B[i]) == np.float32(u)
            assert bool(batch.keep_B[i]) == (keep >= 0.3)
            assert int(batch.labels_B[i]) == label


def test_an_epoch_has_no_row_twice_and_leaves_out_less_than_a_batch(latent_folder: Path) -> None:
    loader = loader_of(latent_folder)
    assert loader.batches_per_epoch == PER_EPOCH
    epochs = [
        [key for batch in take(loader, PER_EPOCH, first=epoch * PER_EPOCH) for key in batch.keys_B]
        for epoch in range(4)
    ]
    assert all(len(set(keys)) == PER_EPOCH * BATCH for keys in epochs)
    assert len({tuple(keys) for keys in epochs}) == 4


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_the_ranks_together_see_the_batches_of_one(latent_folder: Path, world: int, lanes: int) -> None:
    loader, count = loader_of(latent_folder, lanes=lanes), 2 * PER_EPOCH + 1
    shares = [take(loader, count, rank=rank, world=world) for rank in range(world)]
    assert {len(share.keys_B) for rank in shares for share in rank} == {BATCH // world}
    assert_equal([joined(step) for step in zip(*shares, strict=True)], take(loader, count))


def test_two_epochs_are_the_same_on_any_ranks_resumed_anywhere(
    write_latents: Callable[..., Path], tmp_path: Path
) -> None:
    """Over two buckets: keys of all ranks in order, with changes of the number of ranks at random steps."""
    folder = write_latents(tmp_path / "d", count=128, unit_sizes_px=(32, 16) * 8)
    loader = loader_of(folder, validation_rows=8)
    steps = 2 * loader.batches_per_epoch
    whole = list(islice(loader.keys(rank=0, world=1), steps))
    assert {len(shapes) for shapes in (loader.shapes,)} == {2}
    rng = np.random.default_rng(0)
    for _ in range(10):
        at, got = 0, []
        while at < steps:
            world, count = int(rng.choice([1, 2, 4])), int(rng.integers(1, 6))
            count = min(count, steps - at)
            ranks = [list(islice(loader.keys(rank=r, world=world, first=at), count)) for r in range(world)]
            got += [
                tuple(k for group in zip(*step, strict=True) for k in group)
                for step in zip(*ranks, strict=True)
            ]
            at += count
        assert got == whole


@pytest.mark.parametrize("first", [1, PER_EPOCH, 2 * PER_EPOCH + 1])
def test_first_is_skipping(latent_folder: Path, first: int) -> None:
    loader = loader_of(latent_folder)
    whole = take(loader, first + 3, rank=1, world=2)
    assert_equal(take(loader, 3, rank=1, world=2, first=first), whole[first:])


def test_batches_of_buckets_are_uniform(write_latents: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_latents(tmp_path / "d", count=32, unit_sizes_px=(32, 16) * 2)
    shapes = [tuple(batch.z_BChw.shape) for batch in take(loader_of(folder), 8)]
    assert sorted(set(shapes)) == [(8, 3, 4, 4), (8, 3, 8, 8)]


def test_held_out_rows_are_never_trained_on_and_have_the_same_noise_every_time(
    write_latents: Callable[..., Path], tmp_path: Path
) -> None:
    loader = loader_of(write_latents(tmp_path / "d", count=200), validation_rows=8)
    held = loader.validation(rank=0, world=1)
    keys = {key for batch in held for key in batch.keys_B}
    trained = {key for batch in take(loader, 4 * loader.batches_per_epoch) for key in batch.keys_B}
    assert len(keys) == 8
    assert not keys & trained
    assert len(trained) == 192
    assert_equal(loader.validation(rank=0, world=1), held)
    halves = [key for rank in range(2) for b in loader.validation(rank=rank, world=2) for key in b.keys_B]
    assert sorted(halves) == sorted(keys)


def test_a_small_bucket_is_refused_unless_told_otherwise(
    write_latents: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_latents(tmp_path / "d", count=28, unit_sizes_px=(32, 32, 32, 16))
    said = "4 latents in bucket 16x16 cannot fill a batch of 8; use a smaller batch, or .*skip-small-buckets"
    with pytest.raises(UserError, match=said):
        loader_of(folder)
    assert loader_of(folder, skip_small_buckets=True).shapes == [(3, 8, 8)]


def test_lanes_that_do_not_divide_the_batch(latent_folder: Path) -> None:
    with pytest.raises(UserError, match="a batch of 8 cannot be shared by 3 lanes evenly"):
        loader_of(latent_folder, lanes=3)


def _spoil_manifest(folder: Path) -> None:
    file = folder / "manifest.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _cut_data(folder: Path) -> None:
    file = folder / "data/32x32/unit-000001.parquet"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_spoil_manifest, r"manifest\.parquet of .* is missing or damaged.*; run ldm verify --repair"),
        (lambda f: (f / "manifest.parquet").unlink(), r"manifest\.parquet of .* is missing or damaged"),
        (lambda f: (f / "stats.json").unlink(), "the manifest of .* is not of its commits"),
        (lambda f: (f / "commits/unit-000001.json").unlink(), "the manifest of .* is not of its commits"),
        (_cut_data, r"1 of 3 data files of .* are missing or cut short, such as data/32x32/unit-000001"),
        (
            lambda f: (f / "data/32x32/unit-000002.parquet").unlink(),
            r"1 of 3 data files of .* are missing or cut short",
        ),
    ],
)
def test_a_damaged_dataset_is_refused_before_the_first_batch(
    write_latents: Callable[..., Path], tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    folder = write_latents(tmp_path / "d")
    spoil(folder)
    with pytest.raises(UserError, match=said):
        loader_of(folder)


def test_a_flipped_bit_in_the_data_is_found_when_it_is_read(
    write_latents: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_latents(tmp_path / "d")
    file = folder / "data/32x32/unit-000001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"unit-000001\.parquet cannot be read"):
        take(loader_of(folder), PER_EPOCH)
