"""Image shards: list them, read samples from them, write them. WebDataset tars.

A shard is one tar. A sample is the group of members that share a key: the name without its
extensions (``a/0001.jpg`` and ``a/0001.json`` → ``a/0001``). Members are streamed, never extracted;
links, devices and folders in a tar are passed over.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from ldm.errors import BadSampleError, UserError

__all__ = ["IMAGE_EXTENSIONS", "Sample", "Shard", "list_shards", "read_samples", "write_tar"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
# Not in typeshed, though documented by what they do.
DAMAGED_HEADER = tuple(
    getattr(tarfile, name) for name in ("EmptyHeaderError", "TruncatedHeaderError", "InvalidHeaderError")
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Shard:
    """One input shard: ``url`` as fsspec reads it, ``name`` without folder and suffix, its ``version``.

    ``version`` changes when the content does: the store's etag where there is one, else size and time.
    """

    url: str
    name: str
    version: str


@dataclass(frozen=True)
class Sample:
    """One sample: its key, the image file's bytes (None where it has none), its other fields.

    fields: extension → bytes, such as ``{"json": b"...", "txt": b"...", "cls": b"3"}``.
    """

    key: str
    image: bytes | None = None
    fields: dict[str, bytes] = field(default_factory=dict)

    def label(self) -> int | None:
        """The class index from ``.cls`` or from ``label`` in ``.json``, or None.

        BadSampleError ``bad_label`` where there is one that is no whole number ≥ 0.
        """
        if "cls" in self.fields:
            return _label(self.fields["cls"].decode(errors="replace").strip())
        if "json" in self.fields:
            try:
                record = json.loads(self.fields["json"])
            except ValueError as error:
                raise BadSampleError("bad_json", str(error)) from error
            if isinstance(record, dict) and record.get("label") is not None:
                return _label(record["label"])
        return None


def list_shards(source: str | Path) -> list[Shard]:
    """The shards below a folder or URL in name order, or the one shard that a path names.

    UserError where nothing is there or no tar is found.
    """
    filesystem, root = _open_root(str(source))
    if not filesystem.exists(root):
        raise UserError(f"no such input: {source}", do="give a folder of .tar shards, or one .tar")
    paths = [root] if filesystem.isfile(root) else sorted(filesystem.find(root))
    tars = [path for path in paths if path.endswith(TAR_SUFFIXES)]
    if not tars:
        raise UserError(
            f"no shards in {source}", allowed=", ".join(f"*{s}" for s in TAR_SUFFIXES), do="run ldm shards"
        )
    names = [_stem(path.rsplit("/", 1)[-1]) for path in tars]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"two shards in {source} are named {twice!r}", do="rename one: units are named after shards"
        )
    return [
        Shard(filesystem.unstrip_protocol(path), name, _version(filesystem.info(path)))
        for path, name in zip(tars, names, strict=True)
    ]


def read_samples(shard: Shard) -> Iterator[Sample]:
    """The samples of a shard in their order; a tar is read forwards once.

    A sample's members must follow one another, as WebDataset demands; members out of order make a
    second sample of the same key, which shows as a duplicate rather than as a silent mix.
    BadSampleError ``broken_tar`` where the archive is damaged, after the samples before the damage.
    """
    with fsspec.open(shard.url, "rb") as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r|*", tarinfo=_StrictTarInfo) as archive:
                yield from _group(_members(archive))
        except (tarfile.TarError, EOFError) as error:
            raise BadSampleError("broken_tar", f"{shard.url}: {error}") from error


def write_tar(path: Path, samples: Iterable[Sample]) -> int:
    """Write one tar with equal bytes for equal samples (no times, no owners); returns the count.

    Appears under its name only when it is whole.
    """
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            members = {_image_extension(sample.image): sample.image} if sample.image else {}
            for extension, data in sorted({**members, **sample.fields}.items()):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            count += 1
    partial.replace(path)
    return count


class _StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged header an error. The standard library takes any but the first for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(archive)
        except DAMAGED_HEADER as error:
            raise tarfile.ReadError(f"damaged at byte {archive.offset}: {error}") from error


def _open_root(source: str) -> tuple[AbstractFileSystem, str]:
    try:
        filesystem, root = fsspec.url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot read {source}: {error}") from error
    return filesystem, root


def _version(info: dict[str, object]) -> str:
    etag = info.get("ETag") or info.get("etag")
    return str(etag).strip('"') if etag else f"{info.get('size')}-{info.get('mtime', '')}"


def _stem(name: str) -> str:
    for suffix in sorted(TAR_SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, data) of every regular file; the key keeps its folder, as WebDataset does."""
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not member.isreg() or not dot or not stem:
            continue
        stream = archive.extractfile(member)
        assert stream is not None  # a regular file always has one
        yield (f"{folder}/{stem}" if folder else stem), extension.lower(), stream.read()


def _group(members: Iterable[tuple[str, str, bytes]]) -> Iterator[Sample]:
    key: str | None = None
    parts: dict[str, bytes] = {}
    for member_key, extension, data in members:
        if key is not None and member_key != key:
            yield _sample(key, parts)
            parts = {}
        key = member_key
        parts[extension] = data
    if key is not None:
        yield _sample(key, parts)


def _sample(key: str, parts: dict[str, bytes]) -> Sample:
    image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
    return Sample(key, image, {name: data for name, data in parts.items() if name not in IMAGE_EXTENSIONS})


def _label(value: object) -> int:
    try:
        label = int(value) if isinstance(value, int | str) else -1
    except ValueError:
        label = -1
    if label < 0:
        raise BadSampleError("bad_label", f"{value!r}: a label is a whole number from 0")
    return label


def _image_extension(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[8:12] == b"WEBP" else "jpg"
