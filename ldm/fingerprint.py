"""The fingerprint of a network: by it a model is known, wherever its files lie and in whatever precision."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NamedArray", "named_arrays", "sha256_of"]

# (name, shape, values) of a weight.
NamedArray: TypeAlias = tuple[str, tuple[int, ...], NDArray[np.float32]]


def sha256_of(class_name: str, structure: Mapping[str, object], weights: Iterable[NamedArray]) -> str:
    """sha256 over class, structure and weights: equal for equal functions.

    structure: what of the config decides what the class computes. weights: in the order of their names.
    They count as float32, so an fp16 file has the fingerprint of its own values.
    """
    digest = hashlib.sha256(class_name.encode())
    digest.update(json.dumps(structure, sort_keys=True, default=list).encode())
    for name, shape, values in weights:
        digest.update(f"{name}{tuple(shape)}".encode())
        digest.update(np.ascontiguousarray(values, np.dtype("<f4")).tobytes())
    return digest.hexdigest()


def named_arrays(module: "nn.Module") -> Iterator[NamedArray]:
    """The weights of a module for `sha256_of`."""
    for name, tensor in sorted(module.state_dict().items()):
        yield name, tuple(tensor.shape), tensor.detach().float().contiguous().cpu().numpy()
