"""One image on 1, 2 and 4 Ray actors: the same bits, and how much sooner."""

import hashlib
import time
from collections.abc import Iterator
from statistics import median

import torch

from jobs.cluster import ClusterConfig, connected
from ldm.tiling.config import Tiling
from ldm.tiling.exact import Rows
from pipelines.tile_actors import TileActors
from pipelines.tiled_decode import SharedDecoder

__all__ = ["measure"]


def measure(size_px: int, tile: int, rounds: int) -> dict[str, float | bool]:
    """Both modes on 1, 2 and 4 actors with a thread each: ``two_actor_speedup``, in turns, and ``same_bits``.

    What is timed is one image with the actors there, not their start.
    """
    latent_Chw = torch.randn(4, size_px // 8, size_px // 8, generator=torch.Generator().manual_seed(0))
    found: dict[str, float | bool] = {}
    with connected(ClusterConfig(num_cpus=8)):
        decoders = {n: SharedDecoder("f8", TileActors(size=n, threads=1)) for n in (1, 2, 4)}
        for mode, prefix in (("exact", ""), ("fast", "fast_")):
            tiling = Tiling.model_validate({"mode": mode, "tile": tile})
            digests = {n: _digest(decoder.decode_rows(latent_Chw, tiling)) for n, decoder in decoders.items()}
            seconds: dict[int, list[float]] = {1: [], 2: []}
            for index in range(rounds):
                for n in (1, 2) if index % 2 == 0 else (2, 1):
                    start = time.perf_counter()
                    _digest(decoders[n].decode_rows(latent_Chw, tiling))
                    seconds[n].append(time.perf_counter() - start)
            one, two = (median(taken) for taken in seconds.values())
            found[f"{prefix}same_bits"] = len(set(digests.values())) == 1
            found[f"{prefix}one_actor_s"] = one
            found[f"{prefix}two_actor_speedup"] = one / two
    return found


def _digest(bands: Iterator[Rows]) -> str:
    sha256 = hashlib.sha256()
    for band in bands:
        sha256.update(band.values_rWC.numpy().tobytes())
    return sha256.hexdigest()
