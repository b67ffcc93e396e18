"""Latents in two sizes, for upsamplers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def write_pairs(vae_folder: Path) -> Callable[..., Path]:
    """(folder, count=100, …) → a dataset of random latents in two sizes, as ENCODE's last stage writes it.

    The small latents are 4 × 4, or where ``wide_every`` says so 4 × 8; the large ones repeat each value 2 × 2
    times and add a tenth of its scale in noise. Keys ``k0``, ``k1``, …, units of 50.
    """
    import numpy as np

    from ldm.autoencoder import load
    from ldm.preprocess import Preprocess
    from pipelines.dataset import LatentDataset
    from pipelines.dataset_records import DatasetHeader
    from pipelines.encode.encoder import _stats
    from pipelines.encode.rows import EncodedUnit, EncoderTrace, SampleColumns
    from pipelines.encode.units import Unit
    from pipelines.encode.write import write_unit
    from pipelines.shards import Shard
    from pipelines.storage_form import StorageForm

    fingerprint = load(vae_folder).fingerprint

    def views(index: int, side: int, wide_every: int, ratio: int) -> list[Any]:
        rng = np.random.default_rng((index, side))
        shape = (3, 4, 8) if wide_every and index % wide_every == 0 else (3, 4, 4)
        small = rng.normal(3, 2, shape)
        large = small.repeat(ratio, 1).repeat(ratio, 2)
        return [small.astype(np.float16), (large + 0.2 * rng.normal(size=large.shape)).astype(np.float16)]

    def write(
        folder: Path,
        count: int = 100,
        *,
        sizes_px: Sequence[int] = (16, 32),
        wide_every: int = 0,
        mirrored: bool = False,
        ratio: int = 2,
    ) -> Path:
        header = DatasetHeader(
            vae=str(vae_folder),
            vae_fingerprint=fingerprint,
            f=4,
            channels=3,
            form=StorageForm(mirrored=mirrored),
            preprocess=Preprocess(sizes_px=tuple(sizes_px)),
            unit_size=50,
            class_names=("cat", "dog"),
        )
        dataset = LatentDataset.create_or_check(folder, header)
        for first in range(0, count, 50):
            rows = range(first, min(first + 50, count))
            sides = [[v for i in rows for v in views(i, side, wide_every, ratio)] for side in (0, 1)]
            stds = [np.full_like(mean, 0.05) for mean in sides[0]]
            none = [None] * len(rows)
            index, last = first // 50, first + len(rows) - 1
            write_unit(
                dataset,
                EncodedUnit(
                    unit=Unit(
                        f"unit-{index:06d}",
                        Shard("file:///a.tar", "a", "1"),
                        index,
                        first,
                        last,
                        last + 1 == count,
                    ),
                    num_inputs=len(rows),
                    rejected=[],
                    samples=SampleColumns(
                        [f"k{i}" for i in rows], [i % 2 for i in rows], none, none, list(rows)
                    ),
                    stats=_stats(list(zip(sides[0], stds, strict=True))),
                    decode_s=0.0,
                    trace=EncoderTrace("node", 0, "cpu", 0.0, 0.0),
                    means_N=sides[0],
                    stds_N=stds,
                    mirrored_means_N=sides[1] if mirrored else (),
                    mirrored_stds_N=stds if mirrored else (),
                ),
            )
        dataset.write_derived()
        return folder

    return write
