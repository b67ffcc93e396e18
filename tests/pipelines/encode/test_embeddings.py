import io
import pickle
import random
import zipfile

import numpy as np
import pytest
from numpy.lib import format as npy
from numpy.typing import NDArray

from ldm.errors import BadSampleError
from pipelines.encode.embeddings import (
    precomputed_embedding,
)

VALUES = np.array([[0.5, -1.25, 3.0], [65504.0, 0.0, -6e-8]])


def npy_bytes(array: NDArray[np.generic], version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    npy.write_array(stream, array, version)
    return stream.getvalue()


def header(text: str) -> bytes:
    """An ``.npy`` of version 1.0 with a header of the writer's choice and 24 bytes after it."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(24)


def refused(content: bytes) -> BadSampleError:
    with pytest.raises(BadSampleError) as caught:
        precomputed_embedding({"npy": content}, "npy")
    assert caught.value.reason == "bad_embedding"
    assert len(caught.value.detail) < 200
    return caught.value


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_every_float_layout_is_the_same_embedding(dtype: str, order: str, version: tuple[int, int]) -> None:
    content = npy_bytes(np.array(VALUES, dtype=dtype, order=order), version)
    found = precomputed_embedding({"txt": b"a cat", "t5.npy": content}, "t5.npy")
    assert found.dtype == np.float16 and found.flags.c_contiguous
    assert np.array_equal(found, VALUES.astype(np.float16))


def test_a_field_that_is_not_there_is_told() -> None:
    with pytest.raises(BadSampleError, match="missing_embedding: no field 'npy'"):
        precomputed_embedding({"txt": b"a cat"}, "npy")


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (0, 3), (3, 0), ()])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    assert f"npy: shape {shape}, not (tokens, features)" in str(refused(npy_bytes(np.zeros(shape))))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "S4", "M8[s]", "longdouble", "f4,f4"])
def test_another_dtype_is_refused(dtype: str) -> None:
    assert "not float16, float32 or float64" in str(refused(npy_bytes(np.zeros((2, 3), dtype))))


@pytest.mark.parametrize(
    ("value", "told"), [(np.nan, "not finite"), (-np.inf, "not finite"), (-65520.0, "fp16 holds up to 65504")]
)
def test_a_value_that_cannot_be_stored_is_refused(value: float, told: str) -> None:
    assert told in str(refused(npy_bytes(np.array([[1.0, value]]))))


class Exploit:
    ran = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Exploit, "ran", True)


def test_a_pickle_is_not_run() -> None:
    objects = np.empty((1, 1), object)
    objects[0, 0] = Exploit()
    for content in (npy_bytes(objects), pickle.dumps(Exploit())):
        refused(content)
    assert not Exploit.ran


def test_a_zip_is_not_opened() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.npy", npy_bytes(VALUES))
    assert "no .npy file" in str(refused(stream.getvalue()))


@pytest.mark.parametrize("shape", ["(1000000000, 1000000000)", "(2, 4)", "(2, 2)", "(-2, -3)", "(2, -3)"])
def test_a_header_that_states_another_size_is_refused(shape: str) -> None:
    refused(header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "(" * 9000,
        "-" * 9000 + "1",
        "[" * 90 + "]" * 90,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3L)",
        "{'descr': ('<f4', " * 300,
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 'ab'}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}",
        " " * 60000,
        "\x00\n'''",
    ],
)
def test_a_damaged_header_is_refused(text: str) -> None:
    refused(header(text))


def test_every_cut_is_refused() -> None:
    content = npy_bytes(VALUES)
    for length in range(len(content)):
        refused(content[:length])
    refused(content + b"\x00")


def test_no_flipped_byte_ends_in_anything_but_a_refusal_or_an_embedding() -> None:
    content, rng = npy_bytes(VALUES.astype(np.float32)), random.Random(0)
    outcomes = set()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] = rng.randrange(256)
        try:
            found = precomputed_embedding({"npy": bytes(damaged)}, "npy")
            assert found.ndim == 2 and np.isfinite(found).all()
            outcomes.add("embedding")
        except BadSampleError as error:
            outcomes.add(error.reason)
    assert outcomes == {"embedding", "bad_embedding"}
