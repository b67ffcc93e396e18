"""What a run is of: kept in its output, and compared when it is resumed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from ldm.checkpoint import CheckpointInfo
from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.publish import publish
from pipelines.train.config import UnetTraining

__all__ = ["check_resume", "flat", "read_record", "record_of", "write_record"]

RECORD_FILE = "run.json"
# What may change from one start to the next without changing what is learned, but for rounding.
FREE = {
    "train.num_workers", "train.min_workers", "train.resize_check_s", "train.num_gpus", "train.threads",
    "train.log_every",
    "train.validate_every", "train.checkpoint_every", "train.keep_checkpoints", "train.max_failures",
    "train.compile", "train.gradient_checkpointing", "train.parallel", "train.data.prefetch_batches",
    "train.data.max_quarantined_share", "train.init", "info.vae", "info.step", "info.text_encoder",
    "dataset.url", "train.dtype", "input.url",
}  # fmt: skip
# Of groups of settings, with all that is in them.
FREE_GROUPS = ("train.samples.", "train.wandb", "train.resources.")


def record_of(dataset: LatentDataset, config: UnetTraining, info: CheckpointInfo) -> dict[str, object]:
    """Flat, ``name: value``: the config, the checkpoint's description, and which rows the dataset has."""
    summary = dataset.stored_summary()
    content = {
        "train": config.model_dump(mode="json"),
        "info": info.model_dump(mode="json"),
        "dataset": {
            "url": dataset.url,
            "units": summary["units_sha256"],
            "header": hashlib.sha256(dataset.header.json_bytes()).hexdigest(),
        },
    }
    return flat(content)


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """``{"train": {"steps": 3}}`` → ``{"train.steps": 3}``: names as options have them."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def write_record(out: Path, record: Mapping[str, object]) -> None:
    """Write ``run.json``."""
    data = json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"
    publish(LocalFileSystem(), str(out / RECORD_FILE), data)


def read_record(out: Path) -> dict[str, object] | None:
    """``run.json`` of an output, or None where there is none. UserError where it is damaged."""
    try:
        return dict(json.loads((out / RECORD_FILE).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{out / RECORD_FILE} is damaged: {error}") from error


def check_resume(
    out: Path, stored: Mapping[str, object], record: Mapping[str, object], allow: Sequence[str]
) -> None:
    """UserError that shows the differences, unless all of them are free or in ``allow``."""
    free = {*FREE, *allow, *(f"train.{name}" for name in allow)}
    names = sorted((stored.keys() | record.keys()) - free)
    different = [n for n in names if stored.get(n) != record.get(n) and not n.startswith(FREE_GROUPS)]
    if different:
        shown = "; ".join(f"{n}: {record.get(n)}, was {stored.get(n)}" for n in different)
        raise UserError(
            f"{out} holds a run of another kind ({shown})",
            do=f"give the settings of that run, or another folder, or --allow {','.join(different)}",
        )
