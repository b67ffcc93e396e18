"""Which kernel attention goes through, and attention in chunks against attention in one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ldm import unet
from ldm.autoencoder import load
from ldm.chunked_attention import chunk_attention, chunked_attention
from ldm.conditioning import Conditioning
from ldm.meta_cost import LiveBytes


class Calls(TorchFunctionMode):
    """Number of calls of fused attention, and of the softmax that a hand-written one would have."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.softmax = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func is scaled_dot_product_attention
        self.softmax += "softmax" in getattr(func, "__name__", "")
        return func(*args, **(kwargs or {}))


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small_unet(cross_attention_dim: int | None) -> Any:
    with seeded():
        return unet.build(
            "tiny", in_channels=4, num_classes=None, sample_size=16, cross_attention_dim=cross_attention_dim
        ).eval()


def predicted(model: Any, cross_attention_dim: int | None) -> torch.Tensor:
    with seeded(), torch.no_grad():
        x = torch.randn(2, 4, 16, 16)
        text = None if cross_attention_dim is None else torch.randn(2, 5, cross_attention_dim)
        return unet.predict(model, x, torch.tensor([1, 900]), Conditioning(embeddings=text))


@pytest.mark.parametrize("cross_attention_dim", [None, 24])
def test_every_attention_of_a_unet_is_fused(cross_attention_dim: int | None) -> None:
    model = small_unet(cross_attention_dim)
    with Calls() as calls:
        predicted(model, cross_attention_dim)
    expected = sum(isinstance(module, Attention) for module in model.modules())
    assert (calls.fused, calls.softmax) == (expected, 0)
    assert expected > 0


def vae_with_attention() -> Any:
    from diffusers import AutoencoderKL

    with seeded():
        return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()


def test_every_attention_of_a_vae_is_fused() -> None:
    vae = vae_with_attention()
    with Calls() as calls, torch.no_grad():
        vae.decode(vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode())
    assert (calls.fused, calls.softmax) == (2, 0)
    assert not any(isinstance(module, Attention) for module in load("f8").vae.modules())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("mask_shape", [None, (2, 1, 1, 40), (2, 3, 50, 40)])
def test_chunks_change_nothing(dtype: torch.dtype, tolerance: float, mask_shape: Any) -> None:
    with seeded():
        query, key, value = (torch.randn(2, 3, length, 8, dtype=dtype) for length in (50, 40, 40))
        mask = None if mask_shape is None else torch.randn(mask_shape, dtype=dtype)
    whole = scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    for max_queries in (1, 7, 50, 99):
        parts = chunked_attention(query, key, value, mask, scale=0.3, max_queries=max_queries)
        torch.testing.assert_close(parts, whole, rtol=0, atol=tolerance)


def test_a_causal_mask_is_refused() -> None:
    query = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="no causal mask"):
        chunked_attention(query, query, query, is_causal=True, max_queries=2)


def test_memory_of_scores_is_that_of_a_chunk() -> None:
    positions, chunk = 1024, 64

    def peak(max_queries: int) -> int:
        query = torch.zeros(1, 1, positions, 8)
        with sdpa_kernel(SDPBackend.MATH), LiveBytes() as live, torch.no_grad():
            chunked_attention(query, query, query, max_queries=max_queries)
        return live.peak

    assert peak(positions) >= positions * positions * 4
    assert peak(chunk) <= 3 * chunk * positions * 4 + 8 * positions * 8 * 4


@pytest.mark.parametrize("cross_attention_dim", [None, 24])
def test_a_unet_in_chunks_predicts_the_same(cross_attention_dim: int | None) -> None:
    model = small_unet(cross_attention_dim)
    whole = predicted(model, cross_attention_dim)
    with Calls() as before:
        predicted(model, cross_attention_dim)
    chunk_attention(model, 16)
    with Calls() as calls:
        parts = predicted(model, cross_attention_dim)
    assert calls.fused > before.fused
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_a_vae_in_chunks_decodes_the_same() -> None:
    vae: nn.Module = vae_with_attention()
    latent = torch.ones(1, 4, 8, 8).cumsum(3)
    with torch.no_grad():
        whole = vae.decode(latent).sample
        chunk_attention(vae, 5)
        torch.testing.assert_close(vae.decode(latent).sample, whole, rtol=0, atol=1e-5)
