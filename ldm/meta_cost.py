"""What a piece of torch code would cost, counted on the meta device: nothing is computed or allocated.

Attention counts as on a device with memory-efficient kernels: no matrix of positions by positions.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "LiveBytes", "count_params", "meta_cost", "weight_bytes"]

efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention


@dataclass(frozen=True)
class Cost:
    """flops: two per multiply-add; attention_flops: those of QKᵀ and of its product with V.

    activation_bytes: of all tensors that are alive at once, at most; weights are not among them.
    """

    flops: int
    attention_flops: int
    activation_bytes: int


def meta_cost(call: Callable[[], object]) -> Cost:
    """Run ``call``, whose tensors are all on the meta device; those that it makes count."""
    counter, live = FlopCounterMode(display=False), LiveBytes()
    with torch.device("meta"), torch.no_grad(), live, _EfficientAttention(), counter:
        call()
    by_operator = counter.get_flop_counts()["Global"]
    attention = by_operator.get(efficient_attention, 0)
    return Cost(int(counter.get_total_flops()), int(attention), live.peak)


def count_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, in the dtype that they have now; of quantised ones what they consist of."""
    return sum(_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _bytes(tensor: Any) -> int:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.numel() * tensor.element_size())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that are made inside: ``live`` bytes now, ``peak`` at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._followed: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view of a weight is no new storage.
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._followed:
            return
        self._followed.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage: int, num_bytes: int) -> None:
        self._followed.discard(storage)
        self.live -= num_bytes


class _EfficientAttention(TorchFunctionMode):
    """On the meta device torch would choose the kernel that writes all scores."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        raise ValueError("grouped queries are not counted")
    result = efficient_attention(query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale)
    attended: Tensor = result[0]
    return attended
