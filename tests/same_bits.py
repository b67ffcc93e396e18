"""Where two nested states of tensors differ."""

from typing import Any

import torch

__all__ = ["differing"]


def differing(a: Any, b: Any, name: str = "") -> list[str]:
    """Dotted names of the leaves whose bits are not the same."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [found for key in a for found in differing(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list):
        return [found for x, y in zip(a, b, strict=True) for found in differing(x, y, name)]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]
