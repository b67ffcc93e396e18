"""The training order: a pure function of (seed, epoch, batch index), whoever reads it."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.latents import keyed_normal
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.train.loader import LatentBatch, LatentRows, batches, load_rows, row_order

NUM_ROWS, BATCH = 20, 8
PER_EPOCH = NUM_ROWS // BATCH


@pytest.fixture(scope="module")
def rows(latent_folder: Path) -> LatentRows:
    return load_rows(LatentDataset.open(latent_folder))


def take(
    rows: LatentRows, count: int, *, seed: int = 5, rank: int = 0, world: int = 1, first: int = 0
) -> list[LatentBatch]:
    return list(
        islice(batches(rows, seed=seed, batch_size=BATCH, rank=rank, world=world, first=first), count)
    )


def assert_equal(got: Sequence[LatentBatch], expected: Sequence[LatentBatch]) -> None:
    """Bit for bit."""
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.z_BChw, b.z_BChw)
        assert torch.equal(a.labels_B, b.labels_B)
        assert a.positions_B == b.positions_B


def joined(ranks: Sequence[LatentBatch]) -> LatentBatch:
    """The global batch of one step's shares: row i is rank i mod w's."""
    return LatentBatch(
        torch.stack([share.z_BChw for share in ranks], 1).flatten(0, 1),
        torch.stack([share.labels_B for share in ranks], 1).flatten(),
        tuple(p for group in zip(*(share.positions_B for share in ranks), strict=True) for p in group),
    )


def chosen_rows(rows: LatentRows, epoch: int, batch: int, seed: int = 5) -> np.ndarray:
    return row_order(seed, epoch, len(rows.keys))[batch * BATCH : (batch + 1) * BATCH]


def test_rows_are_all_of_the_dataset_in_unit_order(rows: LatentRows) -> None:
    assert rows.keys == tuple(f"k{i}" for i in range(NUM_ROWS))
    assert rows.labels_N.tolist() == [0, 1] * 9 + [0, -1]
    assert (rows.mean_NChw.shape, rows.mean_NChw.dtype) == ((NUM_ROWS, 3, 8, 8), np.float16)
    assert (rows.std_NChw.shape, rows.std_NChw.dtype) == ((NUM_ROWS, 3, 8, 8), np.float16)


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    orders = [row_order(5, epoch, NUM_ROWS).tolist() for epoch in range(4)] + [
        row_order(6, 0, NUM_ROWS).tolist()
    ]
    assert all(sorted(order) == list(range(NUM_ROWS)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert row_order(5, 2, NUM_ROWS).tolist() == orders[2]


def test_batches_are_slices_of_the_epochs_order_with_a_posterior_keyed_by_epoch_and_key(
    rows: LatentRows,
) -> None:
    for index, batch in enumerate(take(rows, 3 * PER_EPOCH)):
        epoch, within = divmod(index, PER_EPOCH)
        chosen = chosen_rows(rows, epoch, within)
        seeds = [keyed_seed("posterior", 5, epoch, rows.keys[row]) for row in chosen]
        mean, std = (torch.from_numpy(a[chosen]).float() for a in (rows.mean_NChw, rows.std_NChw))
        assert torch.equal(batch.z_BChw, mean + std * keyed_normal(seeds, (3, 8, 8)))
        assert batch.z_BChw.dtype == torch.float32
        assert batch.labels_B.tolist() == rows.labels_N[chosen].tolist()
        assert batch.positions_B == tuple(range(index * BATCH, (index + 1) * BATCH))


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_together_see_the_batches_of_one(rows: LatentRows, world: int) -> None:
    shares = [take(rows, 2 * PER_EPOCH + 1, rank=rank, world=world) for rank in range(world)]
    assert {len(share.labels_B) for rank in shares for share in rank} == {BATCH // world}
    assert_equal([joined(step) for step in zip(*shares, strict=True)], take(rows, 2 * PER_EPOCH + 1))


@pytest.mark.parametrize("first", [1, PER_EPOCH, 2 * PER_EPOCH + 1])
def test_first_is_skipping(rows: LatentRows, first: int) -> None:
    whole = take(rows, first + 3, rank=1, world=2)
    assert_equal(take(rows, 3, rank=1, world=2, first=first), whole[first:])


def test_the_posterior_is_fresh_in_every_epoch_and_the_same_whatever_the_batch_size(rows: LatentRows) -> None:
    def by_key(batch_size: int) -> list[dict[str, torch.Tensor]]:
        stream = batches(rows, seed=5, batch_size=batch_size, rank=0, world=1)
        epochs = []
        for epoch in range(2):
            order = row_order(5, epoch, NUM_ROWS)
            z = torch.cat([next(stream).z_BChw for _ in range(NUM_ROWS // batch_size)])
            epochs.append({rows.keys[row]: z[i] for i, row in enumerate(order)})
        return epochs

    (first, second), (again, _) = by_key(NUM_ROWS), by_key(1)
    assert first.keys() == second.keys() == set(rows.keys)
    assert all(torch.equal(first[key], again[key]) for key in rows.keys)
    assert not any(torch.equal(first[key], second[key]) for key in rows.keys)


def test_another_seed_is_another_order_and_another_sample(rows: LatentRows) -> None:
    (a,), (b,) = take(rows, 1, seed=5), take(rows, 1, seed=6)
    assert not torch.equal(a.z_BChw, b.z_BChw)


def test_too_few_rows_for_a_batch(rows: LatentRows) -> None:
    with pytest.raises(UserError, match="20 latents cannot fill a batch of 21; allowed: 1 to 20"):
        next(batches(rows, seed=0, batch_size=21, rank=0, world=1))


def test_a_damaged_file_is_refused_before_it_is_parsed(
    write_latents: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_latents(tmp_path / "d")
    file = folder / "data/32x32/unit-000001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = r"unit-000001\.parquet is damaged.*remove commits/unit-000001\.json and encode again"
    with pytest.raises(UserError, match=said):
        load_rows(LatentDataset.open(folder))


def test_a_missing_file_is_named(write_latents: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_latents(tmp_path / "d")
    (folder / "data/32x32/unit-000002.parquet").unlink()
    with pytest.raises(UserError, match=r"unit-000002\.parquet of unit unit-000002 is missing; encode again"):
        load_rows(LatentDataset.open(folder))


def test_latents_of_two_sizes_are_refused(write_latents: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_latents(tmp_path / "d", count=16, unit_sizes_px=(32, 16))
    with pytest.raises(UserError, match=r"several sizes.*\(3, 4, 4\), \(3, 8, 8\).*allowed: one size"):
        load_rows(LatentDataset.open(folder))
