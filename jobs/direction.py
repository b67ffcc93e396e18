"""``ldm direction``: the direction of an attribute, from a latent dataset with labels or captions."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from ldm.directions import DirectionMethod, fit
from ldm.errors import UserError
from pipelines.attribute_rows import By, attribute_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ldm.directions import Direction

__all__ = ["DirectionJob"]

HELD_OUT_EVERY = 5


class DirectionJob(JobConfig):
    """Write the direction of ATTRIBUTE in the latents of DATASET to OUT, for ldm edit --direction.

    Adding it once to a latent goes as far as from the mean of the latents without ATTRIBUTE to the mean
    of those with it.
    """

    dataset: CliPositionalArg[str] = Field(description="latent dataset, folder or URL")
    attribute: CliPositionalArg[str] = Field(description="class name or index; or a word of the captions")
    out: CliPositionalArg[Path] = Field(description="file to write, .safetensors")
    against: str = Field("", description="what to go away from: another class or word; default: all others")
    by: By = Field("label", description="label or caption: where the attribute stands")
    method: DirectionMethod = Field(
        "mean", description="mean, the difference of means; or logistic, of a logistic regression"
    )
    l2: PositiveFloat = Field(1.0, description="logistic: weight of the penalty; 1 ÷ scikit-learn's C")
    max_rows: PositiveInt = Field(2000, ge=10, description="at most so many latents of each side")
    bucket: str = Field("", description="shape to take, such as 64x64, of a dataset that has several")

    def run(self) -> dict[str, object]:
        """The file, rows of each side, and how well the direction tells held-out rows apart."""
        import torch

        from ldm.direction_file import write_direction
        from ldm.latents import Whitening
        from pipelines.dataset import LatentDataset

        if self.out.suffix != ".safetensors":
            raise UserError(f"output {self.out}", allowed="a name that ends in .safetensors")
        dataset = LatentDataset.open(self.dataset)
        has, has_not = attribute_rows(
            dataset, self.attribute, self.against, self.by, self.max_rows, self.bucket
        )
        about = {
            "attribute": self.attribute,
            "against": self.against,
            "method": self.method,
            "vae": dataset.header.vae,
            "vae_fingerprint": dataset.header.vae_fingerprint,
        }
        stats = dataset.derived().stats
        assert stats is not None  # there are rows
        fitted = partial(
            fit, method=self.method, whitening=Whitening.from_stats(stats), l2=self.l2, about=about
        )
        held_out_auc = _held_out_auc(fitted, has.latents_NChw, has_not.latents_NChw)
        latents = torch.from_numpy(has.latents_NChw), torch.from_numpy(has_not.latents_NChw)
        write_direction(fitted(*latents), self.out)
        said = "too few rows" if held_out_auc is None else f"{held_out_auc:.3f}"
        print(f"{len(has.keys)} rows with, {len(has_not.keys)} without; AUC of held-out rows: {said}")
        return {
            "out": str(self.out),
            "rows_with": len(has.keys),
            "rows_without": len(has_not.keys),
            "held_out_auc": held_out_auc,
        }


def _held_out_auc(
    fitted: "Callable[[Tensor, Tensor], Direction]",
    has_NChw: "NDArray[np.float32]",
    has_not_NChw: "NDArray[np.float32]",
) -> float | None:
    """How well a direction fitted to four fifths orders the rest; None where there are too few rows.

    The rows come in the order of keyed hashes, so every fifth is a random fifth.
    """
    import torch

    if min(len(has_NChw), len(has_not_NChw)) < HELD_OUT_EVERY:
        return None
    sides = torch.from_numpy(has_NChw), torch.from_numpy(has_not_NChw)
    held_out = [torch.arange(len(side)) % HELD_OUT_EVERY == 0 for side in sides]
    direction = fitted(*(side[~out] for side, out in zip(sides, held_out, strict=True)))
    above, below = (direction.position(side[out]) for side, out in zip(sides, held_out, strict=True))
    # Mann–Whitney: the share of pairs in the right order, ties by half.
    difference = above[:, None] - below[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())
