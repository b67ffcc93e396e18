"""Publishing a file: nobody sees it before it is whole, whatever dies in between."""

import os
import tempfile
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

__all__ = ["publish"]


def publish(filesystem: AbstractFileSystem, path: str, data: bytes) -> None:
    """Make ``data`` appear under ``path`` in one step, replacing what was there.

    On a local file system: a hidden temporary file in the same folder, flushed to the disk, then
    renamed. On an object store: one PUT, which is atomic there. OSError where it cannot be written;
    then nothing has changed under ``path``.
    """
    if isinstance(filesystem, LocalFileSystem):
        _publish_local(Path(path), data)
    else:
        filesystem.pipe_file(path, data)


def _publish_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name: two attempts at one unit may overlap when Ray retries a task it takes for dead.
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(partial).chmod(0o644)  # mkstemp makes files that only the owner reads
        Path(partial).replace(path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the folder's own entries: a rename that a power cut undoes was not a commit."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
