"""What can be sampled: a checkpoint of ``ldm train``, or a Stable Diffusion folder, told in one way.

A card has no weights. It goes wherever a request is checked, and says where the weights are.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict

from ldm import autoencoder as autoencoders
from ldm import checkpoint, unet
from ldm.autoencoder import Autoencoder
from ldm.checkpoint import CheckpointInfo
from ldm.conditioning import ClassConditioner, Conditioning
from ldm.errors import UserError
from ldm.feature_reuse import check_cut
from ldm.latents import Whitening
from ldm.objective import kind_of
from ldm.preview import LatentPreview
from ldm.sampling import Trajectory
from ldm.schedulers import SCHEDULERS, default_scheduler
from ldm.text import load_text_encoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["ModelCard", "read_card"]


class ModelCard(BaseModel):
    """One model.

    latent_shape: (C, h, w) it was trained on; f: pixels per latent along a side; vae: as for
    `ldm.autoencoder.load`; shift, scale: `ldm.latents.Whitening`; size_multiple: of a latent's sides;
    fingerprint: `ldm.unet.fingerprint`; can_reuse: whether `ldm.feature_reuse` can cut it.

    preview: `ldm.preview.LatentPreview.map_D3`.

    What it is conditioned on: class_names; or text by text_encoder (as for `ldm.text.load_text_encoder`),
    whose embeddings have embedding_width features, with padded_text padded to the encoder's length and guided
    by the empty text, as Stable Diffusion has it; or nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    fingerprint: str
    latent_shape: tuple[int, int, int]
    size_multiple: int
    f: int
    vae: str
    vae_fingerprint: str
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    scheduler_config: dict[str, object]
    class_names: tuple[str, ...] | None = None
    text_encoder: str | None = None
    text_fingerprint: str | None = None
    padded_text: bool = False
    embedding_width: int | None = None
    can_reuse: bool = True
    preview: tuple[tuple[float, float, float], ...]

    @property
    def whitening(self) -> Whitening:
        return Whitening(self.shift, self.scale)

    @property
    def latent_preview(self) -> LatentPreview:
        return LatentPreview(torch.tensor(self.preview))

    @property
    def condition(self) -> Literal["classes", "text", "none"]:
        if self.text_encoder is not None:
            return "text"
        return "none" if self.class_names is None else "classes"

    @property
    def schedulers(self) -> tuple[str, ...]:
        """Those of `ldm.schedulers.SCHEDULERS` that can sample it."""
        kind = kind_of(self.scheduler_config)
        return tuple(name for name, row in SCHEDULERS.items() if row.kind == kind)

    @property
    def default_scheduler(self) -> str:
        return default_scheduler(kind_of(self.scheduler_config))

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width that it was trained on."""
        return self.latent_shape[1] * self.f, self.latent_shape[2] * self.f

    def shape_of(self, size_px: tuple[int, int]) -> tuple[int, int, int]:
        """Of the latent of an image of that height and width, which are multiples of `size_multiple_px`."""
        return (self.latent_shape[0], size_px[0] // self.f, size_px[1] // self.f)

    @property
    def size_multiple_px(self) -> int:
        return self.size_multiple * self.f

    def check(self, scheduler: str, num_inference_steps: int, guidance: float) -> int:
        """How many steps such a request takes. UserError for what cannot be sampled."""
        row = ClassConditioner(["any"]).null if self.condition != "none" else Conditioning()
        trajectory = Trajectory(
            shape=(1, 1, 1),
            scheduler=scheduler,
            scheduler_config=self.scheduler_config,
            num_inference_steps=num_inference_steps,
            guidance=guidance,
            seed=0,
            condition=row,
            null=row,
        )
        return trajectory.num_steps


def read_card(folder: Path, vae: str | None = None) -> ModelCard:
    """Of a checkpoint, or of a diffusers folder with ``unet/``, ``vae/`` and ``scheduler/``.

    vae: another place where the VAE is. UserError where something is missing, damaged or does not fit, and
    for an upsampler.
    """
    folder = folder.expanduser().absolute()
    if (folder / checkpoint.INFO_FILE).is_file():
        return _of_checkpoint(folder, vae)
    if (folder / "unet").is_dir():
        return _of_stable_diffusion(folder, vae)
    raise UserError(
        f"{folder} is no model",
        allowed=f"a checkpoint of ldm train, with {checkpoint.INFO_FILE}; or a diffusers folder, with unet/",
    )


def _of_checkpoint(folder: Path, vae: str | None) -> ModelCard:
    info = checkpoint.read_info(folder)
    if info.upsampling_factor is not None:
        raise UserError(f"{folder} is an upsampler, which cannot be sampled alone", do="name it as a stage")
    if info.embedding_width is not None and info.text_encoder is None:
        raise UserError(
            f"{folder} was trained with embeddings made beforehand", do="serve one with a text encoder"
        )
    model, source = unet.load(folder), vae or info.vae
    autoencoder = autoencoders.load(source)
    checkpoint.check_vae(autoencoder, info.vae_fingerprint, f"checkpoint {folder}")
    _check_text_encoder(info)
    return ModelCard(
        folder=folder,
        fingerprint=unet.fingerprint(model),
        latent_shape=info.latent_shape,
        size_multiple=unet.size_multiple(model),
        can_reuse=_can_reuse(model),
        preview=_preview(autoencoder, info.whitening),
        f=autoencoder.f,
        vae=source,
        vae_fingerprint=info.vae_fingerprint,
        shift=info.shift,
        scale=info.scale,
        scheduler_config=checkpoint.read_scheduler_config(folder),
        class_names=info.class_names,
        text_encoder=info.text_encoder,
        text_fingerprint=info.text_fingerprint,
        embedding_width=info.embedding_width,
    )


def _of_stable_diffusion(folder: Path, vae: str | None) -> ModelCard:
    model, source = unet.load(folder), vae or str(folder / "vae")
    autoencoder = autoencoders.load(source)
    side = int(model.config["sample_size"])
    whitening = autoencoder.whitening
    return ModelCard(
        folder=folder,
        fingerprint=unet.fingerprint(model),
        latent_shape=(autoencoder.channels, side, side),
        size_multiple=unet.size_multiple(model),
        can_reuse=_can_reuse(model),
        preview=_preview(autoencoder, whitening),
        f=autoencoder.f,
        vae=source,
        vae_fingerprint=autoencoder.fingerprint,
        shift=whitening.shift_C,
        scale=whitening.scale_C,
        scheduler_config=checkpoint.read_scheduler_config(folder),
        text_encoder=str(folder / "text_encoder"),
        padded_text=True,
        embedding_width=int(model.config["cross_attention_dim"]),
    )


def _check_text_encoder(info: CheckpointInfo) -> None:
    if info.text_encoder is None:
        return
    encoder = load_text_encoder(info.text_encoder)
    if encoder.fingerprint != info.text_fingerprint:
        raise UserError(
            f"text encoder {info.text_encoder} is not the one of the checkpoint, or not with its options",
            allowed="the encoder that it was trained with, its output and its longest texts",
        )


def _preview(autoencoder: Autoencoder, whitening: Whitening) -> tuple[tuple[float, float, float], ...]:
    rows: list[list[float]] = LatentPreview.fit_to_any(autoencoder, whitening).map_D3.tolist()
    return tuple((red, green, blue) for red, green, blue in rows)


def _can_reuse(model: "UNet2DConditionModel") -> bool:
    try:
        check_cut(model)
    except UserError:
        return False
    return True
