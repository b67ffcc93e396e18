"""Input files on any fsspec file system: list them, tell their versions, say in one line what is wrong."""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from ldm.errors import UserError

__all__ = [
    "IMAGE_EXTENSIONS",
    "InputFile",
    "access_explained",
    "file_version",
    "is_image",
    "visible_files",
]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
# What stores call the time of the last change, best first.
TIME_FIELDS = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """A file below a folder: ``name`` is its path from there, ``path`` the file system's own."""

    name: str
    path: str
    info: Mapping[str, object]


@contextmanager
def access_explained(source: str) -> Iterator[None]:
    """Turn what a store says of missing rights, credentials or connections into one line.

    For the listing, which runs before the job: an error in the middle of a job is not the user's.
    """
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"no access to {source}: {error}", do="check its permissions or your credentials"
        ) from error
    except _access_errors() as error:
        raise UserError(
            f"cannot read {source}: {error}", do="check the address and your credentials"
        ) from error


def visible_files(filesystem: AbstractFileSystem, root: str) -> list[InputFile]:
    """All files below ``root`` in the order of their names, but for hidden ones (``.name``).

    Links are followed to files, not to folders. A link to nowhere is listed: it can be reported then.
    """
    root = root.rstrip("/")
    found = (
        InputFile(path[len(root) :].lstrip("/"), path, _followed(filesystem, path, info))
        for path, info in filesystem.find(root, detail=True).items()
    )
    visible = (file for file in found if not any(part.startswith(".") for part in file.name.split("/")))
    return sorted((file for file in visible if file.info["type"] == "file"), key=lambda file: file.name)


def file_version(filesystem: AbstractFileSystem, file: InputFile, *, digest: bool = False) -> str:
    """What changes when the content does: etag, else size and time; with ``digest`` the content's SHA-256."""
    if digest:
        return _sha256(filesystem, file.path)
    etag = file.info.get("ETag") or file.info.get("etag")
    if etag:
        return str(etag).strip('"')
    time = next((file.info[name] for name in TIME_FIELDS if file.info.get(name) is not None), "")
    return f"{file.info.get('size')}-{time}"


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _followed(filesystem: AbstractFileSystem, path: str, info: Mapping[str, object]) -> Mapping[str, object]:
    # fsspec's local listing tells a link's own time, which an edit of its target does not change.
    if not info.get("islink"):
        return info
    try:
        followed: Mapping[str, object] = filesystem.info(path)
    except FileNotFoundError:
        return {"type": "file", "size": None}
    return followed


def _sha256(filesystem: AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    try:
        with filesystem.open(path, "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return "missing"
    return digest.hexdigest()


def _access_errors() -> tuple[type[Exception], ...]:
    # Only where S3 was used can its errors arise; to import botocore takes longer than to list a folder.
    if "botocore" not in sys.modules:
        return (OSError,)
    from botocore.exceptions import BotoCoreError

    return OSError, BotoCoreError
