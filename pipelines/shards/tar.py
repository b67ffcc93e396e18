"""WebDataset tars. A sample is the group of members that share a key: the name without its extensions.

``a/0001.jpg`` and ``a/0001.json`` → ``a/0001``. Members are streamed, never extracted, and their
names are data; links, devices and folders are passed over.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from ldm import storage
from ldm.errors import BadSampleError
from pipelines.input_files import IMAGE_EXTENSIONS
from pipelines.shards.config import InputConfig
from pipelines.shards.sample import Sample, with_named_fields
from pipelines.shards.shard import Shard
from pipelines.shards.tar_stream import TarMember, TarStream

__all__ = ["TAR_SUFFIXES", "read_tar", "tar_bytes", "write_tar"]

TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar")
GZIP_MAGIC = b"\x1f\x8b"
BUFFER_BYTES = 1 << 16
MEMBER_COST_BYTES = 512  # what an empty member counts: its header, about what its name takes in memory
# BadGzipFile is an OSError; the others of that kind are the store's, and no damage of the archive.
DAMAGE = (tarfile.ReadError, EOFError, zlib.error, gzip.BadGzipFile)


def read_tar(shard: Shard, config: InputConfig) -> Iterator[Sample]:
    """The samples of a tar in their order; it is read forwards once.

    A sample's members must follow one another, as WebDataset demands; members out of order, and a
    second member of one extension, make a second sample of the same key, which shows as a duplicate
    rather than as a silent mix. BadSampleError ``broken_tar`` where the archive is damaged, after
    every sample that is known to be whole: one is when the next one's header was read.
    """
    filesystem, path = storage.filesystem(shard.url)
    with filesystem.open(path, "rb") as raw, io.BufferedReader(raw, BUFFER_BYTES) as packed:
        try:
            for sample in _samples(TarStream(_unpacked(packed)), config.max_member_bytes):
                yield with_named_fields(sample, config)
        except DAMAGE as error:
            raise BadSampleError("broken_tar", f"{shard.url}: {error}") from error


def write_tar(path: Path, samples: Iterable[Sample]) -> int:
    """Write one tar with equal bytes for equal samples (no times, no owners); returns the count.

    Appears under its name only when it is whole.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        count = _write(stream, samples)
    partial.replace(path)
    return count


def tar_bytes(samples: Iterable[Sample]) -> bytes:
    """What `write_tar` writes, in memory: for a store without renaming."""
    stream = io.BytesIO()
    _write(stream, samples)
    return stream.getvalue()


def _write(stream: IO[bytes], samples: Iterable[Sample]) -> int:
    count = 0
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            members = {_image_extension(sample.image): sample.image} if sample.image else {}
            for extension, data in sorted({**members, **sample.fields}.items()):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            count += 1
    return count


class _Group:
    """The members of one sample; what is too large is passed over and makes the sample unusable."""

    def __init__(self, key: str, limit_bytes: int) -> None:
        self.key = key
        self._left_bytes = limit_bytes
        self._parts: dict[str, bytes] = {}
        self._problem: BadSampleError | None = None

    def takes(self, key: str, extension: str) -> bool:
        return key == self.key and extension not in self._parts

    def add(self, extension: str, member: TarMember, stream: TarStream) -> None:
        self._problem = self._problem or self._refusal(member)
        if self._problem is None:
            self._left_bytes -= member.size + MEMBER_COST_BYTES
            self._parts[extension] = stream.read()

    def sample(self) -> Sample:
        if self._problem is not None:
            return Sample.unusable(self.key, self._problem)
        return _sample(self.key, self._parts)

    def _refusal(self, member: TarMember) -> BadSampleError | None:
        if member.is_sparse:
            return BadSampleError(
                "sparse_member", f"{member.name}: holes are left out; pack it without --sparse"
            )
        if member.size > self._left_bytes:
            self._parts.clear()
            return BadSampleError("member_too_large", f"{member.name}: {member.size} bytes")
        return None


def _samples(stream: TarStream, limit_bytes: int) -> Iterator[Sample]:
    group: _Group | None = None
    try:
        for member in stream:
            key, extension = _split(member.name)
            if not (member.is_file and key and extension):
                continue
            if group is not None and not group.takes(key, extension):
                yield group.sample()
                group = None
            group = group or _Group(key, limit_bytes)
            group.add(extension, member, stream)
    except DAMAGE as error:
        cut = f"; sample {group.key!r} may be cut" if group else ""
        raise tarfile.ReadError(f"{error}{cut}") from error
    if group is not None:
        yield group.sample()
    stream.check_end()


def _unpacked(packed: io.BufferedReader) -> BinaryIO:
    if packed.peek(len(GZIP_MAGIC))[: len(GZIP_MAGIC)] != GZIP_MAGIC:
        return packed
    return cast(BinaryIO, gzip.GzipFile(fileobj=packed))


def _split(name: str) -> tuple[str, str]:
    """(key, extension); the key keeps its folder, as WebDataset does. Empty where there is none."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), extension.lower()


def _sample(key: str, parts: dict[str, bytes]) -> Sample:
    image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
    return Sample(key, image, {name: data for name, data in parts.items() if name not in IMAGE_EXTENSIONS})


def _image_extension(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[8:12] == b"WEBP" else "jpg"
