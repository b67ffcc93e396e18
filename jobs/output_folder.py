"""The folder that a job writes."""

from pathlib import Path

from ldm.errors import UserError

__all__ = ["require_new_folder"]


def require_new_folder(out: Path) -> None:
    """UserError unless ``out`` is not there, or is an empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file", do="give a new folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"output folder {out} is not empty", do="give a new folder")
