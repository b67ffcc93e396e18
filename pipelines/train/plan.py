"""Everything that can be wrong with a training, found before Ray is started."""

from typing import TYPE_CHECKING

from ldm import checkpoint, lora, unet
from ldm.checkpoint import CheckpointInfo
from ldm.errors import UserError
from ldm.latents import LatentStats, Whitening
from ldm.upsampling import NUM_NOISE_LEVELS
from pipelines.dataset import LatentDataset
from pipelines.text_table import read_width
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentLoader
from pipelines.train.residual import residual_stats
from pipelines.train.wandb_run import check_wandb

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["build_unet", "open_loader", "plan"]


def plan(dataset: LatentDataset, config: UnetTraining, vae: str | None) -> CheckpointInfo:
    """Check all that can be wrong; returns what the checkpoint will say.

    vae: the VAE that will decode, or None for the dataset's own. UserError where it is not the one
    that encoded, where batch, layout or latent size do not fit, and as `LatentLoader` and `check_wandb`
    raise it.
    """
    from ldm import autoencoder

    if config.wandb:
        check_wandb(config.wandb)
    header = dataset.header
    vae_model = autoencoder.load(vae or header.vae)
    checkpoint.check_vae(vae_model, header.vae_fingerprint, f"latent dataset {dataset.url}")
    loader = open_loader(dataset, config)
    if config.whitening == "data":
        summary = dataset.stored_summary()
        whitening = Whitening.from_stats(LatentStats(summary["count"], summary["mean"], summary["m2"]))  # type: ignore[arg-type]
    else:
        whitening = vae_model.whitening
    text, factor = header.text, loader.upsampling_factor
    residual = Whitening.from_stats(residual_stats(loader)) if factor else None
    info = CheckpointInfo(
        step=0,
        init_fingerprint=unet.fingerprint(unet.load(config.init)) if config.init else None,
        latent_shape=_main_shape(loader),
        shift=tuple(whitening.shift_C),
        scale=tuple(whitening.scale_C),
        vae=vae or header.vae,
        vae_fingerprint=header.vae_fingerprint,
        # An upsampler's class labels are noise levels, as diffusers has it: the low-resolution latent shows
        # of which class the image is.
        class_names=None if text or factor else header.class_names,
        text_encoder=text.config.encoder if text else None,
        text_fingerprint=text.fingerprint if text else None,
        embedding_width=(text.width or _stored_width(dataset, loader)) if text else None,
        upsampling_factor=factor,
        max_noise_level=config.max_noise_level if factor else None,
        residual_shift=residual.shift_C if residual else None,
        residual_scale=residual.scale_C if residual else None,
    )
    _check_shapes(build_unet(config, info), config, loader)
    return info


def open_loader(dataset: LatentDataset, config: UnetTraining) -> LatentLoader:
    """The loader of a training; the same on every rank."""
    return LatentLoader(
        dataset,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        condition_dropout=config.condition_dropout,
    )


def build_unet(config: UnetTraining, info: CheckpointInfo) -> "UNet2DConditionModel":
    """The U-Net before its first step. UserError where ``init`` is of another kind than the data."""
    channels, is_upsampler = info.latent_shape[0], info.upsampling_factor is not None
    if config.init is None:
        return unet.build(
            config.preset,
            in_channels=2 * channels if is_upsampler else channels,
            out_channels=channels,
            num_noise_levels=NUM_NOISE_LEVELS if is_upsampler else None,
            num_classes=len(info.class_names) if info.class_names else None,
            sample_size=info.latent_shape[1],
            cross_attention_dim=info.embedding_width,
        )
    model = unet.load(config.init)
    _check_fit(model, config.init, info)
    if config.lora is not None:
        lora.add_adapter(model, config.lora, config.seed)
    return model


def _check_fit(model: "UNet2DConditionModel", name: str, info: CheckpointInfo) -> None:
    found, wanted = model.config, _wanted(info)
    wrong = [f"{name} {found[name]}, not {value}" for name, value in wanted.items() if found[name] != value]
    if wrong:
        raise UserError(f"U-Net {name} does not fit the dataset: {'; '.join(wrong)}")


def _wanted(info: CheckpointInfo) -> dict[str, object]:
    channels, num_labels = info.latent_shape[0], len(info.class_names) + 1 if info.class_names else None
    wanted: dict[str, object] = {
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": num_labels,
    }
    if info.upsampling_factor is not None:
        wanted |= {"in_channels": 2 * channels, "num_class_embeds": NUM_NOISE_LEVELS}
    return wanted | ({"cross_attention_dim": info.embedding_width} if info.embedding_width else {})


def _main_shape(loader: LatentLoader) -> tuple[int, int, int]:
    """The shape of most rows."""
    return max(loader.buckets, key=lambda bucket: (bucket.num_rows, bucket.shape)).shape


def _check_shapes(model: "UNet2DConditionModel", config: UnetTraining, loader: LatentLoader) -> None:
    multiple = unet.size_multiple(model)
    for _, height, width in loader.shapes:
        if height % multiple or width % multiple:
            raise UserError(
                f"U-Net preset {config.preset} cannot take {height}×{width} latents",
                allowed=f"multiples of {multiple}",
            )


def _stored_width(dataset: LatentDataset, loader: LatentLoader) -> int:
    """Features of precomputed embeddings, as the first unit has them."""
    path = dataset.path("text", loader.buckets[0].paths[0].rsplit("/", 1)[-1])
    with dataset.filesystem.open(path, "rb") as stream:
        return read_width(stream)
