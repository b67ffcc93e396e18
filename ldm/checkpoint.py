"""A trained model's folder: diffusers' layout, plus ``ldm.json`` with what diffusers has no place for.

unet/        EMA weights: what is sampled      scheduler/  a diffusers scheduler's config
unet_last/   the weights of the last step      ldm.json    CheckpointInfo
lora/        of a LoRA training: the update that unet/ has and the U-Net it began with has not
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ldm import lora
from ldm import unet as unets
from ldm.autoencoder import Autoencoder
from ldm.errors import UserError
from ldm.latents import Whitening

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["INFO_FILE", "CheckpointInfo", "check_vae", "read_info", "read_scheduler_config", "save"]

INFO_FILE = "ldm.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
FORMAT_VERSION: Final = 1


class CheckpointInfo(BaseModel):
    """What a U-Net needs around it to make images.

    latent_shape: (C, h, w) it was trained on; shift and scale: `ldm.latents.Whitening`; ``vae``:
    where the VAE was loaded from, by whose fingerprint it is known. embedding_width: features of the
    embeddings that the U-Net attends to, whose null is one token of zeros; ``text_*``: their encoder,
    None where they were made beforehand. init_fingerprint: `ldm.unet.fingerprint` of the U-Net that
    training began with, None where that was random. Of an upsampler only (`ldm.upsampling`):
    upsampling_factor, rows of its latents to those of the low-resolution ones; the max_noise_level that it
    was trained with; and residual_shift and residual_scale, the whitening of what it makes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    step: int
    latent_shape: tuple[int, int, int]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    vae: str
    vae_fingerprint: str
    class_names: tuple[str, ...] | None
    text_encoder: str | None = None
    text_fingerprint: str | None = None
    embedding_width: int | None = None
    init_fingerprint: str | None = None
    upsampling_factor: int | None = None
    max_noise_level: int | None = None
    residual_shift: tuple[float, ...] | None = None
    residual_scale: tuple[float, ...] | None = None

    @property
    def whitening(self) -> Whitening:
        return Whitening(self.shift, self.scale)

    @property
    def residual_whitening(self) -> Whitening:
        """Of an upsampler only."""
        assert self.residual_shift is not None and self.residual_scale is not None
        return Whitening(self.residual_shift, self.residual_scale)


def save(
    folder: Path,
    *,
    ema: "UNet2DConditionModel",
    last: "UNet2DConditionModel",
    scheduler_config: dict[str, object],
    info: CheckpointInfo,
) -> None:
    """Write a checkpoint into ``folder``; ``ldm.json`` comes last, so its presence means complete.

    One that is there already, of an earlier step, is replaced. Adapters are merged into their U-Nets.
    """
    (folder / INFO_FILE).unlink(missing_ok=True)
    for part in ("unet", "unet_last", "lora", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    if lora.has_adapter(ema):
        lora.save_adapter(ema, folder / "lora")
        lora.merge_adapter(ema)
        lora.merge_adapter(last)
    unets.save(ema, folder / "unet")
    unets.save(last, folder / "unet_last")
    (folder / "scheduler").mkdir()
    (folder / SCHEDULER_FILE).write_text(json.dumps(scheduler_config, indent=1, sort_keys=True) + "\n")
    (folder / INFO_FILE).write_text(info.model_dump_json(indent=1) + "\n")


def read_info(folder: Path) -> CheckpointInfo:
    """UserError where ``folder`` is no complete checkpoint of ``ldm train``."""
    path = folder / INFO_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is no checkpoint: it has no {INFO_FILE}", do="give a folder that ldm train wrote"
        )
    try:
        return CheckpointInfo.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "JSON"
        raise UserError(f"{path} cannot be read ({where}: {problem['msg']})") from error


def read_scheduler_config(folder: Path) -> dict[str, object]:
    """The checkpoint's diffusers scheduler config. UserError where it is missing or no JSON object."""
    try:
        config = json.loads((folder / SCHEDULER_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SCHEDULER_FILE} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / SCHEDULER_FILE} is no JSON object")
    return config


def check_vae(autoencoder: Autoencoder, fingerprint: str, what: str) -> None:
    """UserError unless ``autoencoder`` is the VAE whose latents ``what`` (a dataset, a checkpoint) holds."""
    if autoencoder.fingerprint != fingerprint:
        raise UserError(
            f"{what} has latents of another VAE ({fingerprint[:12]}) than {autoencoder.name} "
            f"({autoencoder.fingerprint[:12]})",
            do="give the VAE that encoded it",
        )
