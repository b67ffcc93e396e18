"""A VAE known by its files alone is the one that is loaded from them."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from ldm.autoencoder import load
from ldm.errors import UserError
from ldm.vae_files import default_names
from ldm.vae_identity import STRUCTURE, identify

WEIGHTS = "diffusion_pytorch_model.safetensors"
# What a class is told but does not compute with: sizes for people, and what its caller applies.
NOT_STRUCTURE = {
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
}


@pytest.mark.parametrize("vae_class", [AutoencoderKL, AutoencoderTiny, AutoencoderDC])
def test_the_defaults_are_those_of_diffusers(vae_class: type) -> None:
    parameters = inspect.signature(vae_class.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    as_json = {name: _listed(value) for name, value in defaults.items() if name not in NOT_STRUCTURE}
    assert STRUCTURE[vae_class.__name__] == as_json


def _listed(value: object) -> object:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", default_names())
def test_a_default_model_is_known_without_loading_it(name: str) -> None:
    identity, loaded = identify(name), load(name)
    assert (identity.fingerprint, identity.f, identity.channels) == (
        loaded.fingerprint,
        loaded.f,
        loaded.channels,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_counts_as_the_float32_that_is_loaded(
    vae_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text((vae_folder / "config.json").read_text())
    weights = {name: value.to(dtype) for name, value in load_file(vae_folder / WEIGHTS).items()}
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert identify(str(tmp_path)).fingerprint == load(tmp_path).fingerprint


def test_other_classes_and_shards(tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    identity, loaded = identify(str(tmp_path / "tiny")), load(tmp_path / "tiny")
    assert (identity.fingerprint, identity.f) == (loaded.fingerprint, loaded.f)
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert identify(str(tmp_path / "sharded")).fingerprint == load(tmp_path / "sharded").fingerprint


def test_damaged_weights_are_told(vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((vae_folder / "config.json").read_text())
    content = (vae_folder / WEIGHTS).read_bytes()
    for damaged in (b"", content[:5], content[:200], content[:-100], b"\xff" * 100):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read the weights of VAE"):
            identify(str(tmp_path))


def test_neither_torch_nor_diffusers_is_imported() -> None:
    code = (
        "import sys; from ldm.vae_identity import identify; identify('f8'); import jobs.encode,"
        " pipelines.encode.pipeline, pipelines.lease, pipelines.encode.backlog;"
        " assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
