"""Fast tiling on photographs: how far it is from one call of the VAE, and whether its tiles show."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from jobs.bench.photos import squares
from jobs.bench.tiling_ways import diffusers_tiling, psnr_db, whole_decode
from ldm.autoencoder import load
from ldm.seams import seam_ratio
from ldm.tiling.config import Tiling
from ldm.tiling.decode import decode
from ldm.tiling.encode import encode

__all__ = ["Photo", "measure"]


class Photo(NamedTuple):
    """PSNR against the whole decode; the step across tile borders over that of the whole decode's image."""

    name: str
    fast_db: float
    diffusers_db: float
    fast_seam: float
    diffusers_seam: float


def measure(folder: Path | None, size_px: int, tile: int, count: int) -> list[Photo]:
    """The first ``count`` photographs at size_px × size_px through the f8 VAE."""
    autoencoder = load("f8").to("cpu")
    exactly = load("f8").to("cpu", channels_last=False)
    borders = range(tile * autoencoder.f, size_px, tile * autoencoder.f)
    found = []
    for name, image_HW3 in islice(squares(folder, size_px), count):
        latent_Chw = encode(autoencoder, image_HW3, Tiling(mode="exact", tile=tile)).mean_BChw[0]
        images = {
            "whole": whole_decode(exactly, latent_Chw),
            "fast": decode(autoencoder, latent_Chw, Tiling(mode="fast", tile=tile)),
            "diffusers": diffusers_tiling(autoencoder, latent_Chw, tile),
        }
        seams = {
            way: seam_ratio(image.permute(1, 2, 0).numpy(), borders, borders, period=autoencoder.f)
            for way, image in images.items()
        }
        found.append(
            Photo(
                name,
                psnr_db(images["fast"], images["whole"]),
                psnr_db(images["diffusers"], images["whole"]),
                seams["fast"] / seams["whole"],
                seams["diffusers"] / seams["whole"],
            )
        )
        print(f"  {size_px} px {name}: {found[-1].fast_db:.1f} dB", flush=True)
    return found
