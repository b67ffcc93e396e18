"""Attention in chunks of queries, for devices whose kernels would write all scores at once.

A map of 128² positions has 16384² scores, 1 GB in fp32 for each head. Shape suffixes: L queries, S keys,
D features; leading dimensions are batch and heads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["chunk_attention", "chunked_attention"]

Processor = Callable[..., Tensor]


class WithProcessors(Protocol):
    """A diffusers model with attention: its U-Nets and VAEs."""

    @property
    def attn_processors(self) -> Mapping[str, Processor]: ...

    def set_attn_processor(self, processor: Any) -> None: ...


def chunked_attention(
    query_LD: Tensor,
    key_SD: Tensor,
    value_SD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    max_queries: int,
    **options: Any,
) -> Tensor:
    """torch's scaled_dot_product_attention, at most ``max_queries`` rows of scores at a time.

    The softmax is over keys, so a query does not need the others. ValueError for a causal mask.
    """
    if is_causal:
        raise ValueError("chunks of queries have no causal mask")
    parts = []
    for start in range(0, query_LD.shape[-2], max_queries):
        rows = slice(start, start + max_queries)
        mask = attn_mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., rows, :]
        parts.append(
            scaled_dot_product_attention(query_LD[..., rows, :], key_SD, value_SD, mask, dropout_p, **options)
        )
    return torch.cat(parts, dim=-2)


def chunk_attention(model: WithProcessors, max_queries: int) -> None:
    """Have every attention of a diffusers model go through its processor in chunks."""
    processors = model.attn_processors.items()
    model.set_attn_processor({name: _Chunked(inner, max_queries) for name, inner in processors})


class _Chunked:
    """The processor ``inner``, whose attention is `chunked_attention`."""

    def __init__(self, inner: Processor, max_queries: int) -> None:
        self.inner, self.max_queries = inner, max_queries

    # diffusers looks at these names, and leaves out arguments that are not among them.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        with _ChunkedMode(self.max_queries):
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class _ChunkedMode(TorchFunctionMode):
    def __init__(self, max_queries: int) -> None:
        super().__init__()
        self.max_queries = max_queries

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return chunked_attention(*args, max_queries=self.max_queries, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
