"""Walk a tar forwards: members in order, bounded memory, every damage told.

The headers are decoded by the standard library; its own walk is not used on files from outside. It
follows a claimed size step by step beyond the end of the file, holds pax headers of any size,
recurses once per header, and takes a damaged header for the end of the archive.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["TarMember", "TarStream"]

BLOCK_BYTES = 512
CHUNK_BYTES = 1 << 20
MAX_EXTENSION_BYTES = 1 << 20  # of a long name or pax header; PATH_MAX is 4 KiB
SPARSE_FLAG = 482  # byte of a GNU sparse header
LONG_NAME = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


@dataclass(frozen=True)
class TarMember:
    """A member: its name as it stands there, bytes of its data; ``is_sparse`` where holes are left out."""

    name: str
    size: int
    is_file: bool
    is_sparse: bool


class TarStream:
    """Iterate over the members; `read` gives the data of the current one.

    tarfile.ReadError where the archive is damaged or ends without its end mark.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._offset = 0
        self._member_bytes = 0  # of data of the current member
        self._unread = 0  # of those, with the padding to a whole block
        self._has_sparse_map = False

    def __iter__(self) -> Iterator[TarMember]:
        """Members in order, up to the end mark."""
        overrides: dict[str, str] = {}
        while (header := self._header()) is not None:
            if header.type in LONG_NAME or header.type in PAX:
                overrides |= self._extension(header)
                continue
            yield self._member(header, overrides)
            overrides = {}
            self._skip(self._unread)

    def read(self) -> bytes:
        """The current member's data, all of it: look at its size first. Once only."""
        member = self._member_bytes
        data = self._take(member)
        self._unread -= member
        return data

    def check_end(self) -> None:
        """Read on to the end of the file. tarfile.ReadError unless nothing but zeros follows the end mark.

        Archives that were joined would lose all but the first; of a compressed one this also
        compares the checksum.
        """
        while chunk := self._stream.read(CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise tarfile.ReadError(f"data after the end mark at byte {self._offset}")
            self._offset += len(chunk)

    def _header(self) -> tarfile.TarInfo | None:
        start = self._offset
        block = self._stream.read(BLOCK_BYTES)
        self._offset += len(block)
        if not block:
            raise tarfile.ReadError(f"no end mark at byte {start}")
        if block == bytes(BLOCK_BYTES):
            return None
        self._has_sparse_map = bool(block[SPARSE_FLAG : SPARSE_FLAG + 1].strip(b"\0"))
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged at byte {start}: {error}") from error

    def _member(self, header: tarfile.TarInfo, overrides: dict[str, str]) -> TarMember:
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any(
            k.startswith("GNU.sparse.") for k in overrides
        )
        if header.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map()
        size = self._size(header, overrides)
        self._member_bytes = 0 if header.type in WITHOUT_DATA else size
        self._unread = -(-self._member_bytes // BLOCK_BYTES) * BLOCK_BYTES
        name = overrides.get("GNU.sparse.name") or overrides.get("path") or header.name
        return TarMember(name, size, header.isreg(), is_sparse)

    def _size(self, header: tarfile.TarInfo, overrides: dict[str, str]) -> int:
        text = overrides.get("size", "")
        size = int(text) if text.isdecimal() and len(text) < 20 else header.size
        if size < 0:
            raise tarfile.ReadError(f"a member of {size} bytes before byte {self._offset}")
        return size

    def _extension(self, header: tarfile.TarInfo) -> dict[str, str]:
        """What a long-name or pax header says of the member after it. Global ones are not about one."""
        if not 0 <= header.size <= MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes before byte {self._offset}")
        data = self._take(header.size)
        self._skip(-header.size % BLOCK_BYTES)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": _text(data.split(b"\0", 1)[0])}
        return _pax_records(data) if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) else {}

    def _skip_sparse_map(self) -> None:
        # GNU's old form: a flag in the header, and one in each block of the map, tells that a block follows.
        is_continued = self._has_sparse_map
        while is_continued:
            is_continued = bool(self._take(BLOCK_BYTES)[504])

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._offset += len(data)
        if len(data) < size:
            raise tarfile.ReadError(f"ends at byte {self._offset}, in the middle of a member")
        return data

    def _skip(self, size: int) -> None:
        while size > 0:
            size -= len(self._take(min(size, CHUNK_BYTES)))
        self._unread = 0


def _pax_records(data: bytes) -> dict[str, str]:
    """Records ``<length> <name>=<value>\\n`` (POSIX.1-2008, pax); what is not one ends them."""
    records = {}
    while data:
        digits, space, _ = data.partition(b" ")
        if not (space and digits.isdigit() and len(digits) < 8 and int(digits) > len(digits)):
            break
        name, _, value = data[len(digits) + 1 : int(digits)].rstrip(b"\n").partition(b"=")
        records[_text(name)] = _text(value)
        data = data[int(digits) :]
    return records


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")
