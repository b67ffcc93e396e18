"""Maps that are larger than a device: bands of rows in host memory, or in files that are mapped into it."""

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import UserError
from ldm.image_tensors import to_model
from ldm.tiling.spans import Rect, Span

__all__ = ["BandedMap", "ImageMap", "Map", "Storage", "gigabytes", "give_back_freed", "keep_freed"]


class Map(Protocol):
    """What a step reads."""

    size: tuple[int, int]

    def read(self, rect: Rect, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(1, C, rows, columns) of it, not to be changed."""
        ...

    def drop_before(self, row: int) -> None:
        """Give back what holds no row from ``row`` on."""
        ...


class Storage:
    """Where maps lie: in memory, or in a ``folder`` as one file without a name for each band.

    The memory is the operating system's, not an allocator's: what is dropped is free at once, and a file is
    gone with the process, however that ends. What is given back with `recycle` is used again first, as far
    as it is large enough: the system clears new memory, which takes a tenth of a decoding's time.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._unused: list[Tensor] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def require(self, needed_bytes: int) -> None:
        """UserError with both figures where there is less room."""
        if self.folder is None:
            what, free_bytes = "memory", int(psutil.virtual_memory().available)
            do = "give a folder with --tiling.spill, or choose mode fast"
        else:
            what, free_bytes = f"spill folder {self.folder}", shutil.disk_usage(self.folder).free
            do = "give one with more room, or choose mode fast"
        if needed_bytes > free_bytes:
            raise UserError(
                f"feature maps need {gigabytes(needed_bytes)}, and {what} has {gigabytes(free_bytes)}", do=do
            )

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Values are zero or undefined. UserError where the disk is full."""
        count = torch.Size(shape).numel()
        num_bytes = count * dtype.itemsize
        if self._unused and self._unused[-1].nbytes >= num_bytes:
            memory_N = self._unused.pop().view(dtype)
            if len(memory_N) > count:
                self.recycle(memory_N[count:])
            return memory_N[:count].view(shape)
        self._unused.clear()
        memory = _anonymous(num_bytes) if self.folder is None else self._file(self.folder, num_bytes)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)

    def recycle(self, values: Tensor) -> None:
        """Take back what `empty` returned, which nobody uses any more."""
        self._unused.append(values.view(-1))

    def _file(self, folder: Path, num_bytes: int) -> mmap.mmap:
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                # Without room a write to a mapped hole would be a signal, not an error.
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                raise UserError(f"spill folder {folder} is full", do="free space, or give another") from error
            return mmap.mmap(file.fileno(), num_bytes)


def _anonymous(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # The system clears a page at its first use, and small pages cost it several times as long.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class BandedMap:
    """A map (C, height, width) in bands; some may be with others, or not be needed any more.

    In a band the channels of a position lie together, as convolutions on a CPU like it.
    """

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        self.channels, self.size = channels, size
        self._bands: dict[Span, Tensor] = {}
        self._storages: dict[Span, Storage] = {}

    @classmethod
    def whole(cls, x_CHW: Tensor, storage: Storage) -> "BandedMap":
        """A copy of a tensor, in one band."""
        channels, height, width = x_CHW.shape
        made = cls(channels, (height, width))
        made.new_band(Span(0, height), storage, x_CHW.dtype)
        made.write(Rect(Span(0, height), Span(0, width)), x_CHW[None])
        return made

    def new_band(self, rows: Span, storage: Storage, dtype: torch.dtype) -> None:
        """Room to `write` into."""
        self.put(rows, storage.empty((rows.size, self.size[1], self.channels), dtype))
        self._storages[rows] = storage

    def put(self, rows: Span, band_rWC: Tensor) -> None:
        assert band_rWC.shape == (rows.size, self.size[1], self.channels)
        self._bands[rows] = band_rWC

    def take(self, rows: Span) -> Tensor:
        """A band (rows, width, C), which is then no longer part of the map."""
        self._storages.pop(rows, None)
        return self._bands.pop(rows)

    def forget(self, rows: Span) -> None:
        """Drop a band, where it is still there."""
        self._bands.pop(rows, None)

    def write(self, rect: Rect, values_1Crc: Tensor) -> None:
        """Into the one band that holds all rows of ``rect``."""
        rows = next(r for r in self._bands if r.start <= rect.rows.start and rect.rows.stop <= r.stop)
        target = self._bands[rows][rect.rows.within(rows), rect.columns.start : rect.columns.stop]
        target.copy_(values_1Crc[0].permute(1, 2, 0))

    def read(self, rect: Rect, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As `Map.read`: a view where one band holds it, else a copy."""
        parts = [
            self._bands[rows][part.within(rows), rect.columns.start : rect.columns.stop]
            for rows in sorted(self._bands)
            if (part := rows.common(rect.rows)).size > 0
        ]
        assert sum(len(part) for part in parts) == rect.rows.size, f"not all of {rect.rows} is here"
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.to(device, dtype).permute(2, 0, 1)[None]

    def copy_rows(self, rows: Span) -> Tensor:
        """(rows, width, C), to be `put` into the same map elsewhere."""
        parts = (
            self._bands[r][rows.common(r).within(r)] for r in sorted(self._bands) if r.common(rows).size > 0
        )
        return torch.cat(list(parts))

    def drop_before(self, row: int) -> None:
        for rows in [rows for rows in self._bands if rows.stop <= row]:
            band = self._bands.pop(rows)
            if rows in self._storages:
                self._storages.pop(rows).recycle(band)


class ImageMap:
    """An image, uint8 (H, W, 3), as what an encoder reads: 3 channels in [-1, 1]."""

    def __init__(self, image_HW3: NDArray[Any]) -> None:
        self.image_HW3 = image_HW3
        self.size = (image_HW3.shape[0], image_HW3.shape[1])

    def read(self, rect: Rect, device: torch.device, dtype: torch.dtype) -> Tensor:
        part = self.image_HW3[rect.rows.start : rect.rows.stop, rect.columns.start : rect.columns.stop]
        return to_model(part[None]).to(device, dtype)

    def drop_before(self, row: int) -> None:
        """The image is the caller's."""


def keep_freed() -> None:
    """Let glibc keep what is freed in this process, until `give_back_freed`: see there.

    By itself it returns large buffers to the system at once, which has to clear them again for the next
    tile: one of two actors had up to 876,000 page faults at 2048² px, and at most 157,000 with this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, 2**30)


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def give_back_freed() -> None:
    """Let glibc return to the system what was freed: it keeps some hundred MB of a convolution's buffers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def gigabytes(num_bytes: int) -> str:
    """For people: in MB where it is less than one."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
