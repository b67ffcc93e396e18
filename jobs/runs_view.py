"""Runs as a person sees them: a table of them, and what differs between two."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from jobs.run_record import RunRecord

__all__ = ["differences", "duration", "print_differences", "print_runs"]

# command → the figures of a row, by their names in its result; of other commands the first ones.
KEY_FIGURES: Mapping[str, tuple[str, ...]] = {
    "shards": ("samples", "shards"),
    "encode": ("rows", "images_per_s", "bytes_per_image"),
    "train": ("step", "loss", "images_per_s"),
    "train-vae": ("step", "loss", "images_per_s"),
    "evaluate recon": ("psnr_db", "ssim", "rfid"),
    "evaluate samples": ("points.0.fid", "num_images"),
    "sample": ("images_per_s",),
}
SHOWN = 3
MAX_CELL = 60


def print_runs(records: Sequence[RunRecord]) -> None:
    """One row each."""
    rows = [("run", "command", "output", "started", "took", "status", "figures")]
    rows += [
        (
            record.run,
            record.command,
            PurePosixPath(record.output).name,
            record.started[:16].replace("T", " "),
            "-" if record.seconds is None else duration(record.seconds),
            record.shown_status,
            ", ".join(f"{name} {_told(record.figures[name])}" for name in _key_figures(record)),
        )
        for record in records
    ]
    _print_columns(rows)


def differences(one: RunRecord, other: RunRecord) -> dict[str, tuple[object, object]]:
    """name → (of the one, of the other), where they differ: config, versions, commit, inputs, figures."""
    mine, theirs = _comparable(one), _comparable(other)
    names = dict.fromkeys((*mine, *theirs))
    return {name: (mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)}


def print_differences(pair: Sequence[RunRecord], found: Mapping[str, tuple[object, object]]) -> None:
    """A row for each name, a column for each run."""
    heading = ("", *(f"{record.run} ({record.command})" for record in pair))
    if found:
        _print_columns([heading, *((name, *map(_told, values)) for name, values in found.items())])
    else:
        print("no differences")


def duration(seconds: float) -> str:
    """``75`` → ``1:15``; below a minute ``7.5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def _comparable(record: RunRecord) -> dict[str, object]:
    inputs = {f"{artifact.kind} {artifact.url}": artifact.fingerprint[:12] for artifact in record.inputs}
    parts = {
        "command": record.command,
        "status": record.shown_status,
        "seconds": record.seconds,
        "commit": record.commit,
        "config": record.config,
        "versions": record.versions,
        "machine": record.machine.model_dump(),
        "input": inputs,
        "figures": record.figures,
    }
    return dict(_flat(parts, ""))


def _flat(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _key_figures(record: RunRecord) -> list[str]:
    known = [name for name in KEY_FIGURES.get(record.command, ()) if name in record.figures]
    numbers = [name for name, value in record.figures.items() if isinstance(value, int | float)]
    return (known or numbers)[:SHOWN]


def _told(value: object) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}…"


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    """A line each, however long: ids are there to be copied."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
