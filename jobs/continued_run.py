"""A training's output across interruptions: what it is a run of, one writer, the step to go on from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs.output_folder import require_new_folder
from ldm.errors import UserError

__all__ = ["continued", "stored_record"]


def stored_record(out: Path) -> dict[str, object] | None:
    """What the run in ``out`` was begun with; None, and UserError unless it is empty, where there is none."""
    from pipelines.train.run_record import read_record

    stored = read_record(out) if out.is_dir() else None
    if stored is None:
        require_new_folder(out)
    return stored


@contextmanager
def continued(
    out: Path, stored: Mapping[str, object] | None, record: Mapping[str, object], allow: Sequence[str]
) -> Iterator[int]:
    """Hold ``out`` as its one writer; yields the step of the newest valid snapshot, 0 where there is none.

    stored: as the run was begun; record: as it is now. UserError where the two differ in more than what
    ``allow`` names, the folder cannot be written, or another process writes to it.
    """
    from fsspec.implementations.local import LocalFileSystem

    from pipelines.lease import writer_lease
    from pipelines.train.run_record import check_resume, write_record
    from pipelines.train.snapshots import SNAPSHOTS, find_snapshot

    if stored is not None:
        check_resume(out, stored, record, allow)
    _make_folder(out)
    with writer_lease(LocalFileSystem(), str(out.absolute()), str(out)):
        found = find_snapshot(out / SNAPSHOTS)
        for skipped in found.skipped:
            print(f"skipped a snapshot, {skipped}")
        if stored is not None:
            print(
                f"resuming from step {found.step}" if found.step else "no snapshot: from step 0", flush=True
            )
        write_record(out, record)
        yield found.step


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot write to {out}: {error.strerror}"
        raise UserError(problem, do="give another folder") from error
