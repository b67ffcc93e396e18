"""One image on 1, 2 and 4 Ray actors: the same bits, and how much sooner."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from jobs.bench.rounds import median_seconds
from jobs.cluster import ClusterConfig, connected
from ldm.tiling.config import Tiling
from ldm.tiling.exact import Rows
from pipelines.tile_actors import TileActors
from pipelines.tiled_decode import SharedDecoder

__all__ = ["measure"]


def measure(size_px: int, tile: int, rounds: int) -> dict[str, float | bool]:
    """Both modes on 1, 2 and 4 actors with a thread each: ``two_actor_speedup``, in turns, and ``same_bits``.

    What is timed is one image with the actors there, not their start. ``two_images_speedup`` is what the
    machine has to give: two images at the same time, each on an actor of its own, against one.
    """
    latent_Chw = torch.randn(4, size_px // 8, size_px // 8, generator=torch.Generator().manual_seed(0))
    found: dict[str, float | bool] = {}
    with connected(ClusterConfig(num_cpus=8)):
        decoders = {n: SharedDecoder("f8", TileActors(size=n, threads=1)) for n in (1, 2, 4)}
        another = SharedDecoder("f8", TileActors(size=1, threads=1))
        for mode, prefix in (("exact", ""), ("fast", "fast_")):
            tiling = Tiling.model_validate({"mode": mode, "tile": tile})
            digests = {n: _digest(decoder.decode_rows(latent_Chw, tiling)) for n, decoder in decoders.items()}

            def on(*chosen: SharedDecoder, tiling: Tiling = tiling) -> Callable[[], None]:
                return lambda: _decode_at_once(chosen, latent_Chw, tiling)

            ways = {"one": on(decoders[1]), "two": on(decoders[2]), "images": on(decoders[1], another)}
            seconds = median_seconds(ways, rounds)
            found[f"{prefix}same_bits"] = len(set(digests.values())) == 1
            found[f"{prefix}one_actor_s"] = seconds["one"]
            found[f"{prefix}two_actor_speedup"] = seconds["one"] / seconds["two"]
            found[f"{prefix}two_images_speedup"] = 2 * seconds["one"] / seconds["images"]
    return found


def _decode_at_once(decoders: Sequence[SharedDecoder], latent_Chw: torch.Tensor, tiling: Tiling) -> None:
    with ThreadPoolExecutor(len(decoders)) as pool:
        list(pool.map(lambda decoder: _digest(decoder.decode_rows(latent_Chw, tiling)), decoders))


def _digest(bands: Iterator[Rows]) -> str:
    sha256 = hashlib.sha256()
    for band in bands:
        sha256.update(band.values_rWC.numpy().tobytes())
    return sha256.hexdigest()
