"""A small model with random weights, for benches of serving: what a call costs does not depend on them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm import autoencoder, checkpoint, unet
from ldm.model_card import ModelCard, read_card
from ldm.objective import NoiseSchedule, Prediction
from pipelines.serve.config import JobsConfig, ModelSource, SamplerPool, ServeConfig, StagePool
from pipelines.serve.generation_request import Limits
from pipelines.serve.guard import AccessConfig
from pipelines.serve.messages import Condition, SampleRequest

__all__ = ["NUM_CLASSES", "bench_card", "bench_request", "bench_server"]

NUM_CLASSES = 10
VAE = "f8"
UNLIMITED = AccessConfig(requests_per_minute=10**6, max_concurrent=10**4)


def bench_card(folder: Path, preset: str, side: int, prediction: Prediction = "v_prediction") -> ModelCard:
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
    scheduler_config = NoiseSchedule(prediction=prediction).scheduler_config()
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


@contextmanager
def bench_server(
    preset: str,
    side: int,
    sampler: SamplerPool,
    decoder: StagePool,
    access: AccessConfig = UNLIMITED,
) -> Iterator[str]:
    """The URL of a whole server without a cache. Needs a connected Ray."""
    from jobs.cluster import ClusterConfig
    from jobs.serve import serving
    from pipelines.serve.application import Checked

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    with TemporaryDirectory() as folder:
        bench_card(Path(folder) / "model", preset, side)
        config = ServeConfig(
            models={"bench": ModelSource(folder=Path(folder) / "model")},
            ingress=StagePool(num_cpus=0.5, max_ongoing=10_000),
            sampler=sampler,
            decoder=decoder,
            limits=Limits(sizes_multiple_px=8),
            access=access,
            jobs=JobsConfig(url=f"{folder}/jobs"),
            cache_bytes=0,
        )
        with serving(Checked(config), ClusterConfig(), "127.0.0.1", port):
            yield f"http://127.0.0.1:{port}"
