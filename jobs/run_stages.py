"""Which commands leave something behind: where, and from what. These have run records."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from jobs.config import JobConfig

__all__ = ["STAGES", "RunStage", "values_at"]


class RunStage(NamedTuple):
    """Options, by their path in the config: of the output, of inputs at a path or URL, of VAEs by name.

    A checkpoint names its VAE itself: what is named here is what a person can give.
    """

    output: str
    inputs: tuple[str, ...] = ()
    vaes: tuple[str, ...] = ()


# command → its options. A command that is not here leaves nothing.
STAGES: Mapping[str, RunStage] = {
    "demo": RunStage("out", vaes=("vae",)),
    "shards": RunStage("out", ("src",)),
    "encode": RunStage("output", ("input",), ("vae",)),
    "train": RunStage("out", ("dataset", "train.init"), ("vae",)),
    "train-vae": RunStage("out", ("input",), ("train.init",)),
    "evaluate recon": RunStage("page", ("input",), ("vae",)),
    "evaluate by-f": RunStage("page", ("input",), ("vaes",)),
    "evaluate samples": RunStage("page", ("checkpoint", "reference"), ("vae",)),
    "savings": RunStage("page", ("checkpoint",)),
    "serve": RunStage("jobs.url", ("model", "more_models", "upsamplers")),
    "sample": RunStage("out", ("checkpoint",), ("vae",)),
    "generate": RunStage("out", ("checkpoint",), ("vae",)),
    "upscale": RunStage("out", ("input", "stages"), ("vae",)),
    "interpolate": RunStage("out", ("ends", "checkpoint"), ("vae",)),
    "edit": RunStage("out", ("input", "checkpoint", "direction"), ("vae",)),
    "inpaint": RunStage("out", ("image", "mask", "checkpoint"), ("vae",)),
    "direction": RunStage("out", ("dataset",)),
    "decode": RunStage("out", ("latent",), ("vae",)),
}
# Of a group that is one of several models: the option that says where it is.
PLACES = ("folder", "checkpoint")


def values_at(config: JobConfig, path: str) -> list[str]:
    """What is given at an option: none, one, or each of several."""
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return list(_texts(value))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, Path | str):
        yield str(value)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, BaseModel):
        yield from (str(getattr(value, name)) for name in PLACES if hasattr(value, name))
