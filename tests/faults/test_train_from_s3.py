"""Latents on S3, through a proxy that injects faults: the batches are those of the local folder."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Protocol

import pytest
import torch

from ldm.storage import filesystem
from pipelines.dataset import LatentDataset
from pipelines.train.loader import LatentBatch, LatentLoader, LoaderConfig


class FaultyS3(Protocol):
    """What the fixture ``faulty_s3`` returns."""

    def num_faults(self) -> int: ...


def batches(url: str | Path, *, rank: int = 0, world: int = 1) -> list[LatentBatch]:
    loader = LatentLoader(LatentDataset.open(url), LoaderConfig(validation_rows=4), batch_size=8, seed=1)
    stream = islice(loader.batches(rank=rank, world=world), 2 * loader.batches_per_epoch)
    return [*stream, *loader.validation(rank=rank, world=world)]


@pytest.mark.parametrize("fault_rate", [0.0, 0.1])
def test_batches_from_s3_are_those_of_the_folder(
    write_latents: Callable[..., Path],
    tmp_path: Path,
    s3_url: str,
    faulty_s3: Callable[..., FaultyS3],
    fault_rate: float,
) -> None:
    folder = write_latents(tmp_path / "d", count=128, unit_sizes_px=(32, 16) * 8)
    store, root = filesystem(f"{s3_url}/latents")
    store.put(f"{folder}/", root, recursive=True)
    proxy = faulty_s3(fault_rate)
    for rank, world in ((0, 1), (1, 2)):
        expected = batches(folder, rank=rank, world=world)
        for got, local in zip(batches(f"{s3_url}/latents", rank=rank, world=world), expected, strict=True):
            assert got.keys_B == local.keys_B
            assert torch.equal(got.z_BChw, local.z_BChw)
    assert (proxy.num_faults() > 0) == (fault_rate > 0)
