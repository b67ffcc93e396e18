"""Embeddings that a sample brings along, as ``.npy``.

Imports no torch, so that decode workers can use it.
"""

import io
import math
import tokenize
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ldm.errors import BadSampleError

__all__ = ["Embedding", "precomputed_embedding"]

Embedding: TypeAlias = NDArray[np.float16]

# A header is a Python literal, so a damaged one can end in any of its parser's errors.
NOT_NPY = (ValueError, KeyError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError)
NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def precomputed_embedding(sample_fields: Mapping[str, bytes], name: str) -> Embedding:
    """The embedding (L, D), L and D at least 1, in a sample's field ``name``, rounded to float16.

    The field is an ``.npy`` of float16, float32 or float64 in either byte order and memory layout.
    BadSampleError ``missing_embedding``, or ``bad_embedding``: not such a file, another shape, a value
    that is not finite or that fp16 cannot hold.
    """
    if name not in sample_fields:
        raise BadSampleError("missing_embedding", f"no field {name!r}")
    values = _npy_array(sample_fields[name], name)
    if values.ndim != 2 or 0 in values.shape:
        raise _bad(name, f"shape {values.shape}, not (tokens, features)")
    if not np.isfinite(values).all():
        raise _bad(name, "a value that is not finite")
    largest, fp16_max = float(np.abs(values).max()), float(np.finfo(np.float16).max)
    if largest > fp16_max:
        raise _bad(name, f"{largest:.3g}, fp16 holds up to {fp16_max:.0f}")
    return np.ascontiguousarray(values, dtype=np.float16)


def _npy_array(content: bytes, name: str) -> NDArray[np.generic]:
    """The array of an ``.npy``, as a view of its bytes.

    Not np.load: that would also open a zip, and allocate whatever size a header claims.
    """
    stream = io.BytesIO(content)
    try:
        read_header = NPY_HEADERS[npy.read_magic(stream)]
        shape, is_fortran, dtype = read_header(stream)
    except NOT_NPY as error:
        raise _bad(name, "no .npy file of version 1.0 or 2.0") from error
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise _bad(name, f"dtype {dtype}, not float16, float32 or float64")
    stated, present = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if stated != present or min(shape, default=0) < 0:
        raise _bad(name, f"{present} bytes of values where the shape {shape} takes {stated}")
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _bad(name: str, detail: str) -> BadSampleError:
    return BadSampleError("bad_embedding", f"{name}: {detail}")
