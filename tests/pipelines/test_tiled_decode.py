"""One image on several actors: the bits of one process."""

from pathlib import Path

import pytest
import torch

from ldm.autoencoder import load
from ldm.errors import UserError
from ldm.tiling.config import Tiling
from ldm.tiling.decode import decode
from pipelines.tile_actors import TileActors
from pipelines.tiled_decode import SharedDecoder

LATENT = torch.randn(4, 22, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def attending_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """f = 8, with attention and two layers."""
    from jobs.bench.random_vaes import random_kl

    folder = tmp_path_factory.mktemp("attending")
    random_kl(8, torch.float32, layers=2, attention=True).vae.save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("ray_cluster")
def test_actors_give_the_bits_of_one_process(attending_vae: str) -> None:
    three = SharedDecoder(attending_vae, TileActors(size=3, num_cpus=0.5, threads=1))
    autoencoder = load(attending_vae).to("cpu")
    for mode in ("exact", "fast"):
        tiling = Tiling.model_validate({"mode": mode, "tile": 4})
        alone = decode(autoencoder, LATENT, tiling)
        shared = torch.cat([band.values_rWC for band in three.decode_rows(LATENT, tiling)])
        assert torch.equal(shared.permute(2, 0, 1), alone)


def test_a_whole_decode_cannot_be_shared(vae_folder: Path) -> None:
    none = SharedDecoder(str(vae_folder), TileActors())
    with pytest.raises(UserError, match="mode whole is one call of the VAE; allowed: exact, fast"):
        none.decode_rows(torch.zeros(3, 8, 8), Tiling(mode="whole"))
