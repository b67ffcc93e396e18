"""int8 weights against rounding done here, and decoding in half precision with its guard."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.autoencoder import load
from ldm.errors import UserError
from ldm.half_decoder import HalfDecoder
from ldm.meta_cost import weight_bytes
from ldm.quantise import linear_share, quantise


def layers() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 32)).eval()


@pytest.mark.filterwarnings("ignore")  # torchao warns of its own parts
@pytest.mark.parametrize("how", ["int8", "int8-dynamic"])
def test_linear_weights_are_rounded_to_127_levels_a_row(how: str) -> None:
    pytest.importorskip("torchao")
    model = layers()
    weight = model[2].weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 127.5
    x = torch.linspace(-1, 1, 2 * 3 * 36).view(2, 3, 6, 6)
    hidden = model[1](model[0](x))
    exact = model(x)
    before = weight_bytes(model)
    quantise(model, how)
    assert before - weight_bytes(model) >= weight.numel() * 3 - 32 * 16  # a byte each, and scales
    # An error of half a step in every weight, and in activations too where they are rounded.
    bound = (hidden.abs().sum(1).max() * step.max()) * (1 if how == "int8" else 3)
    error = (model(x) - exact).abs().max()
    assert 0 < float(error) < float(bound)


def test_only_linear_layers_count() -> None:
    model = layers()
    assert linear_share(model) == 64 * 32 / (64 * 32 + 32 + 4 * 27 + 4)
    with pytest.raises(UserError, match="no quantisation 'int4'; allowed: int8, int8-dynamic"):
        quantise(model, "int4")


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision_is_near(vae_folder: Path, dtype: torch.dtype, atol: float) -> None:
    latents = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 4, 4)
    exact = load(vae_folder).decode(latents)
    decoder = HalfDecoder(load(vae_folder), dtype)
    torch.testing.assert_close(decoder.decode(latents), exact, rtol=0, atol=atol)
    assert decoder.num_repeated == 0
    assert weight_bytes(decoder.autoencoder.vae) * 2 == weight_bytes(load(vae_folder).vae)


def test_what_overflows_is_decoded_again_in_fp32(vae_folder: Path) -> None:
    latents = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 4, 4)
    latents[1] *= 1e6  # beyond fp16
    rounded = load(vae_folder)
    rounded.vae.half().float()
    exact = rounded.decode(latents)
    decoder = HalfDecoder(load(vae_folder))
    for repeated in (1, 2):
        images = decoder.decode(latents)
        torch.testing.assert_close(images[1], exact[1], rtol=0, atol=1e-5)
        assert decoder.num_repeated == repeated
        assert decoder.autoencoder.vae.dtype == torch.float16
    assert images.isfinite().all()


def test_an_overflow_is_seen_before_the_clamp_makes_white_of_it(vae_folder: Path) -> None:
    model = load(vae_folder)
    model.vae.decoder.conv_out.bias.data.fill_(7e4)
    with pytest.raises(UserError, match=r"overflow float16; allowed: bfloat16 or float32"):
        HalfDecoder(model)
    model = load(vae_folder)
    model.vae.decoder.conv_out.bias.data.fill_(6e4)
    model.vae.decoder.conv_out.weight.data.mul_(1e4)
    decoder = HalfDecoder(model)
    decoder.decode(torch.ones(1, 3, 4, 4))
    assert decoder.num_repeated == 1
