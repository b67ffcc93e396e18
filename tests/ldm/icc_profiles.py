"""ICC profiles made by hand: just the tags that a colour engine needs (ICC.1:2001-04, version 2.4)."""

import itertools
import struct

import numpy as np
from numpy.typing import NDArray

D50 = (0.9642, 1.0, 0.8249)
# Adobe RGB (1998), annex B: primaries adapted to D50, one column each for red, green and blue.
ADOBE_XYZ = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
ADOBE_GAMMA = 563 / 256


def adobe_like() -> bytes:
    curve = struct.pack(">4sIIH", b"curv", 0, 1, 563)
    columns = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(_xyz, ADOBE_XYZ), strict=True))
    return _profile(b"RGB ", b"XYZ ", {**columns, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def linear_grey() -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": struct.pack(">4sII", b"curv", 0, 0)})


def inks() -> bytes:
    """CMYK on a table of 2⁴ colours: every ink takes its share of the lightness, and no hue."""
    corners = itertools.product((0, 1), repeat=4)
    lightness = [round(255 * max(0.0, 1 - 0.3 * (c + m + y) - 0.5 * k)) for c, m, y, k in corners]
    table = b"".join(bytes((level, 128, 128)) for level in lightness)
    matrix = struct.pack(">9i", *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    ramp = bytes(range(256))
    lut = struct.pack(">4sI4B", b"mft1", 0, 4, 3, 2, 0) + matrix + 4 * ramp + table + 3 * ramp
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut}, kind=b"prtr")


def adobe_to_srgb(levels_HW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The same conversion in closed form: levels 0 … 255 of sRGB (IEC 61966-2-1), by its D50 matrix."""
    to_linear_srgb = np.array(
        [
            [3.1338561, -1.6168667, -0.4906146],
            [-0.9787684, 1.9161415, 0.0334540],
            [0.0719453, -0.2289914, 1.4052427],
        ]
    )
    xyz = (levels_HW3 / 255) ** ADOBE_GAMMA @ np.array(ADOBE_XYZ)
    linear = (xyz @ to_linear_srgb.T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _xyz(values: tuple[float, float, float]) -> bytes:
    return struct.pack(">4sI3i", b"XYZ ", 0, *(round(value * 65536) for value in values))


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    tags = {b"wtpt": _xyz(D50), **tags}
    index, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        index += struct.pack(">4sII", name, start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(
        ">I4s4s4s4s4s12s4s", start + len(body), b"", b"\2\x40\0\0", kind, space, connection, b"", b"acsp"
    )
    header = header.ljust(68, b"\0") + struct.pack(">3i", *(round(value * 65536) for value in D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body
