"""A small model with random weights, for benches of serving: what a call costs does not depend on them."""

from pathlib import Path

from ldm import autoencoder, checkpoint, unet
from ldm.model_card import ModelCard, read_card
from ldm.objective import NoiseSchedule
from pipelines.serve.messages import Condition, SampleRequest

__all__ = ["NUM_CLASSES", "bench_card", "bench_request"]

NUM_CLASSES = 10
VAE = "f8"


def bench_card(folder: Path, preset: str, side: int) -> ModelCard:
    """A checkpoint in ``folder``: U-Net ``preset`` for classes, latents (4, side, side), VAE f8."""
    import torch

    vae = autoencoder.load(VAE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = unet.build(preset, in_channels=vae.channels, num_classes=NUM_CLASSES, sample_size=side)
    info = checkpoint.CheckpointInfo(
        step=1,
        latent_shape=(vae.channels, side, side),
        shift=vae.whitening.shift_C,
        scale=vae.whitening.scale_C,
        vae=VAE,
        vae_fingerprint=vae.fingerprint,
        class_names=tuple(f"class {index}" for index in range(NUM_CLASSES)),
    )
    scheduler_config = NoiseSchedule(prediction="v_prediction").scheduler_config()
    checkpoint.save(folder, ema=model, last=model, scheduler_config=scheduler_config, info=info)
    return read_card(folder)


def bench_request(
    card: ModelCard, num_steps: int, seed: int, *, deadline: float | None = None, preview_every: int = 0
) -> SampleRequest:
    """A guided image of the model's own size."""
    return SampleRequest(
        model="bench",
        shape=card.latent_shape,
        scheduler="ddim",
        num_steps=num_steps,
        guidance=3.0,
        seed=seed,
        condition=Condition(label=seed % NUM_CLASSES),
        null=Condition(label=NUM_CLASSES),
        deadline=deadline,
        preview_every=preview_every,
    )
