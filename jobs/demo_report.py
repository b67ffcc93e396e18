"""The demo's report: one HTML page without outside references, and the figures in it."""

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipelines.evaluate import Reconstruction
    from pipelines.generate import Generated

__all__ = ["Grid", "Report", "write"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Grid:
    """Samples at one guidance: a row of images per class, and how well the class was met."""

    guidance: float
    rows: list[tuple[str, list[Pixels]]]
    share: float
    chance: float
    where: list[str]

    @classmethod
    def of(
        cls, guidance: float, names: list[str], labels: list[int], made: "Generated", shards: Path
    ) -> "Grid":
        """Measure samples against the training crops in ``shards``."""
        import torch

        from ldm.image_tensors import to_model
        from ldm.metrics import nearest_label_share

        images = made.images
        crops, crop_labels = _training_crops(shards)
        share = nearest_label_share(
            to_model(np.stack(images)), torch.tensor(labels), to_model(crops), torch.from_numpy(crop_labels)
        )
        rows = [
            (name, [im for im, la in zip(images, labels, strict=True) if la == i])
            for i, name in enumerate(names)
        ]
        chance = float(np.mean([np.mean(crop_labels == label) for label in labels]))
        return cls(guidance, rows, share, chance, made.where)


@dataclass
class Report:
    """What the stages of a demo left behind; filled as they end."""

    guidance: float
    inference_steps: int
    seconds: dict[str, float] = field(default_factory=dict)
    encode: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    reconstructions: "list[Reconstruction]" = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)

    def figures(self) -> dict[str, object]:
        """What ``--json`` prints."""
        num_samples = sum(len(images) for _, images in self.grids[-1].rows)
        return {
            "class_share": self.grids[-1].share,
            "class_share_unguided": self.grids[0].share,
            "chance": self.grids[-1].chance,
            "times_chance": self.grids[-1].share / self.grids[-1].chance,
            "psnr_db": float(np.mean([r.psnr_db for r in self.reconstructions])),
            "encode_images_per_s": self.encode["images_per_s"],
            "train_steps_per_s": self.train["step"] / self.train["elapsed_s"],
            "loss": self.train["loss"],
            "sample_images_per_s": num_samples / list(self.seconds.values())[-1],
            "seconds": self.seconds,
        }


def write(report: Report, out: Path) -> Path:
    """Write ``report.html`` and the grids as PNGs into ``out``; returns the page's path."""
    from jobs.pages import data_url, render, svg_of_line
    from ldm.image_tensors import image_grid

    (out / "samples").mkdir()
    for grid in report.grids:
        images = [image for _, images in grid.rows for image in images]
        sheet = image_grid(np.stack(images), columns=len(grid.rows[0][1]))
        (out / "samples" / f"guidance-{grid.guidance:g}.png").write_bytes(_png(sheet))
    history = _history(out / "checkpoint")
    steps, losses = ([h[name] for h in history] for name in ("step", "loss"))
    page = render(
        "demo.html",
        {"png": lambda image: data_url(_png(image), "image/png")},
        report=report,
        figures=report.figures(),
        curve=svg_of_line(steps, losses, "step", "loss (mean of the interval)"),
        host=_host(),
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _training_crops(shards: Path) -> tuple[Pixels, NDArray[np.int64]]:
    from ldm.images import decode_image
    from pipelines.shards import list_shards, read_samples

    samples = [sample for shard in list_shards(shards) for sample in read_samples(shard)]
    crops = np.stack([np.asarray(decode_image(sample.image or b"")) for sample in samples])
    return crops, np.array([sample.label() for sample in samples], np.int64)


def _history(checkpoint: Path) -> list[dict[str, float]]:
    import json

    from pipelines.train.unet import METRICS_FILE

    return [json.loads(line) for line in (checkpoint / METRICS_FILE).read_text().splitlines()]


def _png(image: Pixels) -> bytes:
    from ldm.images import encode_png

    return encode_png(image)


def _host() -> dict[str, object]:
    import os
    from importlib.metadata import version

    import torch

    gpus = torch.cuda.device_count()
    return {
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {gpus} GPUs",
        "threads": os.cpu_count(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "diffusers")),
    }
