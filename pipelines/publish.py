"""Publishing a file: nobody sees it before it is whole, whatever dies in between."""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from ldm.errors import UserError

__all__ = ["create", "publish"]


def publish(filesystem: AbstractFileSystem, path: str, data: bytes) -> None:
    """Make ``data`` appear under ``path`` in one step, replacing what was there.

    On a local file system: a hidden temporary file in the same folder, flushed to the disk, then
    renamed. On an object store: one PUT, which is atomic there. UserError where the disk is full,
    OSError where it cannot be written for another reason; then nothing has changed under ``path``.
    """
    if isinstance(filesystem, LocalFileSystem):
        with _written_beside(Path(path), data) as partial:
            partial.replace(path)
    else:
        filesystem.pipe_file(path, data)


def create(filesystem: AbstractFileSystem, path: str, data: bytes) -> bool:
    """As `publish`, but only where ``path`` does not exist: of many callers at once one gets True.

    Locally a hard link, on S3 a PUT on condition. On other stores whatever fsspec has, which for some
    is a look before the write. Errors as `publish`.
    """
    if isinstance(filesystem, LocalFileSystem):
        with _written_beside(Path(path), data) as partial:
            return _link(partial, path)
    return _create_object(filesystem, path, data)


def _link(partial: Path, path: str) -> bool:
    try:
        os.link(partial, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and then finds the link that it made itself.
        return partial.stat().st_nlink == 2
    return True


def _create_object(filesystem: AbstractFileSystem, path: str, data: bytes) -> bool:
    # As with NFS: the PUT that is refused may be the second attempt at one that did succeed.
    writer = uuid.uuid4().hex
    signed = {"Metadata": {"writer": writer}} if "s3" in filesystem.protocol else {}
    try:
        filesystem.pipe_file(path, data, mode="create", **signed)
    except FileExistsError:
        return bool(signed) and _is_signed(filesystem, path, writer)
    return True


def _is_signed(filesystem: AbstractFileSystem, path: str, writer: str) -> bool:
    try:
        return bool(filesystem.metadata(path).get("writer") == writer)
    except FileNotFoundError:
        return False


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A whole, flushed, hidden file in ``path``'s folder; gone afterwards, unless it was renamed."""
    with _plain_error_when_full(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A random name: two attempts at one unit may overlap when Ray retries a task it takes for dead.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            _write(descriptor, data)
            Path(name).chmod(0o644)  # mkstemp makes files that only the owner reads
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
        _sync_folder(path.parent)


def _write(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _plain_error_when_full(path: Path, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = next(parent for parent in path.parents if parent.exists())
        free_bytes = shutil.disk_usage(folder).free
        raise UserError(
            f"disk full or over quota: {path} needs {needed_bytes} bytes, {free_bytes} are free",
            do="free space, then run again: what is committed stays",
        ) from error


def _sync_folder(folder: Path) -> None:
    """Flush the folder's own entries: a rename that a power cut undoes was not a commit."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
