"""Writing an image that comes in bands of rows: nothing holds it whole, and it appears when complete."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError

__all__ = ["SUFFIXES", "check_suffix", "write_image"]

TIFF_TILE_PX: Final = 256
# A TIFF's offsets have 32 bits; some room for its own tables.
MAX_PLAIN_TIFF_BYTES: Final = 2**32 - 2**25
PNG_COMPRESSION: Final = 3


def check_suffix(path: Path) -> None:
    """UserError unless the name says a format that `write_image` knows."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"output {path} has no known format", allowed=f"a name that ends in {', '.join(SUFFIXES)}"
        )


def write_image(path: Path, bands: Iterable[NDArray[np.uint8]], size: tuple[int, int]) -> None:
    """Write bands uint8 (rows, width, 3), from the top, as the image of ``size`` (height, width).

    The format is that of the name: PNG; TIFF in tiles, deflated, a BigTIFF where it has to be; or the bare
    array of a .npy. What is beyond ``size`` is cut off. If the bands end in an error, no file is left.
    """
    check_suffix(path)
    write = SUFFIXES[path.suffix.lower()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _appearing(path) as file:
        write(file, _cropped(bands, size), size)


def _write_png(file: BinaryIO, bands: Iterator[NDArray[np.uint8]], size: tuple[int, int]) -> None:
    import png

    height, width = size
    rows = (row.tobytes() for band in bands for row in band.reshape(len(band), -1))
    png.Writer(width, height, greyscale=False, compression=PNG_COMPRESSION).write_packed(file, rows)


def _write_tiff(file: BinaryIO, bands: Iterator[NDArray[np.uint8]], size: tuple[int, int]) -> None:
    import tifffile

    with tifffile.TiffWriter(file, bigtiff=size[0] * size[1] * 3 > MAX_PLAIN_TIFF_BYTES) as writer:
        writer.write(
            _tiles(bands, size[1]),
            shape=(*size, 3),
            dtype=np.uint8,
            photometric="rgb",
            tile=(TIFF_TILE_PX, TIFF_TILE_PX),
            compression="deflate",
            metadata=None,
            software="ray-ldm",
        )


def _write_npy(file: BinaryIO, bands: Iterator[NDArray[np.uint8]], size: tuple[int, int]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (*size, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    for band in bands:
        file.write(np.ascontiguousarray(band).data)


Writer = Callable[[BinaryIO, Iterator[NDArray[np.uint8]], tuple[int, int]], None]
SUFFIXES: Final[dict[str, Writer]] = {
    ".png": _write_png,
    ".tif": _write_tiff,
    ".tiff": _write_tiff,
    ".npy": _write_npy,
}


def _cropped(bands: Iterable[NDArray[np.uint8]], size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    height, width = size
    done = 0
    for band in bands:
        # All bands are taken, those that are cut off included: only the last one tells that nothing failed.
        part = band[: max(0, height - done), :width]
        done += len(part)
        if len(part):
            yield part
    if done != height:
        raise ValueError(f"{done} rows for an image of {height}")


def _tiles(bands: Iterator[NDArray[np.uint8]], width: int) -> Iterator[NDArray[np.uint8]]:
    """From left to right and down; those at the edges are filled up with black."""
    for rows in _regrouped(bands, TIFF_TILE_PX):
        for left in range(0, width, TIFF_TILE_PX):
            tile = np.zeros((TIFF_TILE_PX, TIFF_TILE_PX, 3), np.uint8)
            part = rows[:, left : left + TIFF_TILE_PX]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _regrouped(bands: Iterator[NDArray[np.uint8]], num_rows: int) -> Iterator[NDArray[np.uint8]]:
    """The same rows, ``num_rows`` at a time; at the end what is left."""
    waiting: list[NDArray[np.uint8]] = []
    for band in bands:
        waiting.append(band)
        if sum(map(len, waiting)) >= num_rows:
            joined = np.concatenate(waiting)
            whole = len(joined) // num_rows * num_rows
            yield from np.split(joined[:whole], whole // num_rows)
            waiting = [joined[whole:]]
    if rest := sum(map(len, waiting)):
        yield np.concatenate(waiting)[:rest]


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A hidden file beside ``path``, which takes its name after the block, and is removed if that fails."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        os.close(descriptor)
        with Path(name).open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
