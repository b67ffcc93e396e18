"""What the JSON line of `ldm bench encode` or `ldm bench train` says about rates, put into a plan."""

from collections.abc import Mapping
from datetime import date
from math import isfinite
from typing import TypeVar

from ldm.errors import UserError
from pipelines.planning.config import Measurement, PlanConfig, Rate, StagePlan, StoredRow

__all__ = ["with_bench"]

Stage = TypeVar("Stage", bound=StagePlan)

# Figure → size in pixels of the images that it is of (docs/benchmarks.md).
ENCODE_RATES = {"pipeline_images_per_s": 256}
TRAIN_RATES = {"train_images_per_s": 64, "cached_images_per_s": 256}
# Form of storage → its figure: of the f8 VAE's moments at 256 px.
STORED_ROWS = {"float16": "bytes_fp16", "int8": "bytes_int8"}
STORED_SIZE_PX = 256
# What they were measured with; a plan for anything else has other rates.
ENCODE_VAE, TRAIN_PRESET, LATENT_GEOMETRY = "f8", "small", (8, 4)


def with_bench(config: PlanConfig, found: Mapping[str, object], when: date, where: str) -> PlanConfig:
    """``config`` with the rates of one JSON line, measured on ``when``; they replace those of the same size.

    where: the file that the line is from, for what is said about it. UserError where it holds no rate that
    the plan has a use for, or one that was measured with another model than the plan's.
    """
    encode, train, dataset = config.encode, config.train, config.dataset
    of_encode = Measurement(command="ldm bench encode --json", when=when)
    encode_rates = _rates(found, ENCODE_RATES, of_encode, where)
    train_rates = _rates(found, TRAIN_RATES, Measurement(command="ldm bench train --json", when=when), where)
    row = _stored_row(config, found, of_encode, where)
    geometry = dataset.f, dataset.channels
    if encode is not None and encode_rates:
        _require(f"encode.vae {encode.vae}", encode.vae == ENCODE_VAE, where, f"VAE {ENCODE_VAE}")
        encode = _replaced(encode, encode_rates)
    if train is not None and train_rates:
        _require(f"train.preset {train.preset}", train.preset == TRAIN_PRESET, where, f"U-Net {TRAIN_PRESET}")
        told = f"latents of f = {dataset.f} and {dataset.channels} channels"
        _require(told, geometry == LATENT_GEOMETRY, where, "latents of f = 8 and 4 channels")
        train = _replaced(train, train_rates)
    if row is not None:
        dataset = dataset.model_copy(update={"stored_row": row})
    if not (row or (encode and encode_rates) or (train and train_rates)):
        raise UserError(
            f"{where} has no figure that this plan has a use for",
            allowed=", ".join((*ENCODE_RATES, *TRAIN_RATES, *STORED_ROWS.values())),
            do="give what `ldm bench encode --json` or `ldm bench train --json` prints",
        )
    return config.model_copy(update={"encode": encode, "train": train, "dataset": dataset})


def _rates(
    found: Mapping[str, object], sizes: Mapping[str, int], measured: Measurement, where: str
) -> list[Rate]:
    return [
        Rate(images_per_s=_number(found, name, where), size_px=size_px, measured=measured)
        for name, size_px in sizes.items()
        if name in found
    ]


def _stored_row(
    config: PlanConfig, found: Mapping[str, object], measured: Measurement, where: str
) -> StoredRow | None:
    """Only where the plan's rows are of the same VAE and form: nothing is known of others."""
    dataset, form = config.dataset, config.dataset.form
    name = STORED_ROWS[form.dtype]
    is_same = form.stored == "moments" and not form.mirrored
    has_vae = config.encode is not None and config.encode.vae == ENCODE_VAE
    if name not in found or not (is_same and has_vae and (dataset.f, dataset.channels) == LATENT_GEOMETRY):
        return None
    return StoredRow(num_bytes=_number(found, name, where), size_px=STORED_SIZE_PX, measured=measured)


def _number(found: Mapping[str, object], name: str, where: str) -> float:
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value > 0):
        raise UserError(f"{name} in {where} is {value!r}", allowed="a number greater than 0")
    return float(value)


def _replaced(stage: Stage, rates: list[Rate]) -> Stage:
    sizes = {rate.size_px for rate in rates}
    kept = [rate for rate in stage.rates if rate.size_px not in sizes]
    return stage.model_copy(update={"rates": (*kept, *rates)})


def _require(planned: str, is_same: bool, where: str, measured: str) -> None:
    if not is_same:
        raise UserError(
            f"the rates in {where} were measured with {measured}, and the plan has {planned}",
            do="leave that file out, and write the rates of your own model into the plan",
        )
