"""Generated images without Ray: what its actors must make, computed in this process."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm import unet
from ldm.autoencoder import load
from ldm.checkpoint import read_info, read_scheduler_config
from ldm.conditioning import ClassConditioner
from ldm.image_tensors import from_model
from ldm.sampling import Trajectory, sample
from pipelines.generate import Request

__all__ = ["images_by_hand"]


def images_by_hand(folder: Path, vae: Path, requests: Sequence[Request]) -> list[np.ndarray]:
    """(H, W, 3) uint8 of each request, all in one batch, by a checkpoint that has classes."""
    info = read_info(folder)
    conditioner = ClassConditioner(info.class_names or ())
    trajectories = [
        Trajectory(
            shape=info.latent_shape,
            scheduler=request.scheduler,
            scheduler_config=read_scheduler_config(folder),
            num_inference_steps=request.num_inference_steps,
            guidance=request.guidance,
            seed=request.seed,
            condition=conditioner.encode([request.label]),
            null=conditioner.null,
        )
        for request in requests
    ]
    latents = sample(unet.load(folder).eval(), trajectories, batch_size=len(trajectories))
    return list(from_model(load(vae).decode(info.whitening.denormalise(latents))))
