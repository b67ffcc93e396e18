"""Snapshots of a training run: sharded, written in the background, published whole, checked when read.

    snapshots/step-00000200/*.distcp, .metadata   torch distributed checkpoint, a part by every rank
    snapshots/step-00000200/snapshot.json         size and SHA-256 of each file: written last, in one step
    snapshots/latest.json                         the newest step that was ever published

A snapshot counts if it has its snapshot.json and every file is as that says. Ray Train's own register of
checkpoints is not used: it starts again at step 0 where its file is lost, and takes a torn checkpoint for
a whole one (docs/decisions/0009).
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import tree_map

from ldm.errors import UserError
from pipelines.publish import publish

__all__ = [
    "SNAPSHOTS",
    "FoundSnapshot",
    "SnapshotWriter",
    "find_snapshot",
    "load_snapshot",
    "resume",
    "snapshot_folder",
]

# In the output of a run.
SNAPSHOTS = "snapshots"
MANIFEST, LATEST = "snapshot.json", "latest.json"
FOLDER_NAME = re.compile(r"step-(\d{8,})")
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FoundSnapshot:
    """step: of the newest valid snapshot, 0 where none was ever published; skipped: newer ones, and why."""

    step: int
    skipped: tuple[str, ...]


def snapshot_folder(root: Path, step: int) -> Path:
    """Where the snapshot of a step is kept."""
    return root / f"step-{step:08d}"


def find_snapshot(root: Path) -> FoundSnapshot:
    """The newest valid snapshot under ``root``; every byte of it is read.

    UserError where snapshots were published and none of them is valid: training would silently start again.
    """
    latest = _latest(root)
    steps = sorted({*_steps(root), *([latest] if latest else [])}, reverse=True)
    skipped: list[str] = []
    for step in steps:
        problem = _problem(snapshot_folder(root, step))
        if problem is None:
            return FoundSnapshot(step, tuple(skipped))
        # What was being written when a run was killed is no loss worth a word, unless it was published.
        if step <= latest:
            skipped.append(f"step {step}: {problem}")
    if latest:
        raise UserError(
            f"no snapshot in {root} is valid ({'; '.join(skipped)})",
            do="restore one of them, or train into another folder",
        )
    return FoundSnapshot(0, ())


def load_snapshot(root: Path, step: int, state: dict[str, Any]) -> None:
    """Read a snapshot into the tensors of ``state``, whatever number of ranks wrote it."""
    reader = FileSystemReader(snapshot_folder(root, step))
    with _without_a_word_on_single_processes():
        load(state, storage_reader=reader, no_dist=not dist.is_initialized())


class Resumable(Protocol):
    """A run's state on one rank, as nested dicts of tensors."""

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


def resume(state: Resumable, root: Path) -> int:
    """Load the newest valid snapshot, the same on every rank; returns its step."""
    found = [find_snapshot(root).step if not dist.is_initialized() or dist.get_rank() == 0 else 0]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[0]:
        stored = state.state()
        load_snapshot(root, found[0], stored)
        state.restore(stored)
    return found[0]


class SnapshotWriter:
    """Writes snapshots in a thread, one at a time; every rank has one and calls it at the same steps."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # Collectives of this thread and of the training must not meet in one group.
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1, "snapshot")
        self.pending: Future[None] | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Copy ``state`` to host memory now, and write it while training goes on.

        Waits for the snapshot before it, and raises what went wrong with that one.
        """
        self.wait()
        copied = tree_map(_to_host, state)
        self.pending = self.thread.submit(self._write, step, copied)

    def wait(self) -> None:
        """Until the last snapshot is published. Raises what went wrong with it."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _write(self, step: int, state: dict[str, Any]) -> None:
        folder = snapshot_folder(self.root, step)
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        if self.group is not None:
            dist.barrier(self.group)
        writer = FileSystemWriter(folder, sync_files=True)
        with _without_a_word_on_single_processes():
            save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        if self.rank == 0:
            self._publish(folder, step)

    def _publish(self, folder: Path, step: int) -> None:
        # Read back from the disk: what is published is what is there.
        files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
        _publish_json(folder / MANIFEST, {"step": step, "files": files})
        _publish_json(self.root / LATEST, {"step": step})
        for old in sorted(_steps(self.root))[: -self.keep]:
            shutil.rmtree(snapshot_folder(self.root, old), ignore_errors=True)


def _to_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


@contextmanager
def _without_a_word_on_single_processes() -> Iterator[None]:
    """torch warns where there is no process group, which ``no_dist`` has told it already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(match[1]) for path in root.iterdir() if (match := FOLDER_NAME.fullmatch(path.name))]


def _latest(root: Path) -> int:
    try:
        return int(json.loads((root / LATEST).read_text())["step"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{root / LATEST} is damaged: {error}"
        raise UserError(problem, do="remove it, if the snapshots are good") from error
    # It is lost. A snapshot that is there was published all the same.
    published = (step for step in _steps(root) if (snapshot_folder(root, step) / MANIFEST).exists())
    return max(published, default=0)


def _problem(folder: Path) -> str | None:
    """What is wrong with a snapshot, or None."""
    if not folder.is_dir():
        return "the folder is missing"
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != expected["bytes"]:
            return f"{name} has {(folder / name).stat().st_size} of {expected['bytes']} bytes"
        if _digest(folder / name) != expected:
            return f"{name} is damaged: its SHA-256 is another"
    return None


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _publish_json(path: Path, content: dict[str, Any]) -> None:
    # Without a newline at the end: whatever is cut off, what is left is no JSON.
    publish(LocalFileSystem(), str(path), json.dumps(content, indent=1, sort_keys=True).encode())
