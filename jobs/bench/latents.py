"""Latent datasets of any size, without an encoder: random moments under the default VAE's name."""

from pathlib import Path

import numpy as np

__all__ = ["write_latents"]

SIZE_PX_OF_SIDE = 8


def write_latents(folder: Path, num_rows: int, side: int, unit_size: int) -> Path:
    """``num_rows`` latents (4, side, side) in units of ``unit_size``, of two classes; manifest and all."""
    from ldm.preprocess import Preprocess
    from ldm.vae_identity import identify
    from pipelines.dataset import LatentDataset
    from pipelines.dataset_records import Commit, DatasetHeader, StoredStats
    from pipelines.latent_table import LatentRows, MomentArrays, data_bytes

    vae = identify("f8")
    header = DatasetHeader(
        vae="f8",
        vae_fingerprint=vae.fingerprint,
        f=vae.f,
        channels=vae.channels,
        preprocess=Preprocess(sizes_px=(side * SIZE_PX_OF_SIDE,)),
        unit_size=unit_size,
        class_names=("a", "b"),
    )
    dataset = LatentDataset.create_or_check(folder, header)
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((unit_size, vae.channels, side, side), np.float32).astype(np.float16)
    std = np.full_like(mean, 0.1)
    bucket = f"{side * SIZE_PX_OF_SIDE}px-{side * SIZE_PX_OF_SIDE}x{side * SIZE_PX_OF_SIDE}"
    for index, start in enumerate(range(0, num_rows, unit_size)):
        count = min(unit_size, num_rows - start)
        none = [None] * count
        rows = LatentRows(
            [f"{start + row:09d}" for row in range(count)],
            [row % 2 for row in range(count)],
            none,
            none,
            MomentArrays(mean[:count], std[:count]),
        )
        unit = f"synthetic-00000000-{index:06d}"
        file = dataset.publish(f"data/{bucket}/{unit}.parquet", data_bytes(rows, header.form), count)
        values, channels = count * side * side, vae.channels
        commit = Commit(
            unit=unit,
            shard="synthetic",
            shard_version="1",
            index=index,
            is_final=start + count >= num_rows,
            num_inputs=count,
            num_rows=count,
            num_quarantined=0,
            quarantined={},
            files=(file,),
            quarantine_file=None,
            stats=StoredStats(count=values, mean=(0.0,) * channels, m2=(float(values),) * channels),
        )
        dataset.commit(commit)
    dataset.write_derived()
    return folder
