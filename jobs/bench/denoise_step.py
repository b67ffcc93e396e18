"""Times steps of a new U-Net in a process of its own, for ``ldm savings``.

usage: python -m jobs.bench.denoise_step sampling|training PRESET LATENTS.npy SECONDS THREADS

LATENTS: float32 (B, C, h, w), the batch of every step. Prints a JSON line: ``seconds`` a step (median),
``peak_bytes`` (model and steps), ``weight_bytes``.
"""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor


def main(kind: str, preset: str, latents: str, seconds: str, threads: str) -> None:
    import numpy as np
    import torch

    from jobs.bench.bursts import median_seconds
    from jobs.bench.peak_rss import PeakRss
    from ldm.meta_cost import weight_bytes

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    x_BChw = torch.from_numpy(np.load(latents, allow_pickle=False))
    # The process reads libraries as it first needs them: they are no part of what a step takes.
    STEPS[kind](_new(preset, 3, 16), torch.zeros(1, 3, 16, 16))()
    peak = PeakRss()
    model = _new(preset, x_BChw.shape[1], x_BChw.shape[2])
    found = median_seconds({kind: STEPS[kind](model, x_BChw)}, float(seconds))
    figures = {"peak_bytes": peak.growth_bytes(), "weight_bytes": weight_bytes(model)}
    print(json.dumps({"seconds": found[kind], **figures}))


def _new(preset: str, channels: int, side: int) -> "UNet2DConditionModel":
    from ldm import unet

    return unet.build(preset, in_channels=channels, num_classes=None, sample_size=side)


def _sampling(model: "UNet2DConditionModel", x_BChw: "Tensor") -> Callable[[], object]:
    """A step of DDIM, as ``ldm sample`` takes it."""
    from ldm.objective import NoiseSchedule
    from ldm.sampling import MAX_STEPS, Trajectory, denoise_step

    channels, height, width = x_BChw.shape[1:]
    schedule = NoiseSchedule(prediction="v_prediction").scheduler_config()
    model.eval()

    def start() -> list[Trajectory]:
        return [
            Trajectory(
                shape=(channels, height, width),
                scheduler="ddim",
                scheduler_config=schedule,
                num_inference_steps=MAX_STEPS,
                guidance=1.0,
                seed=seed,
            )
            for seed in range(len(x_BChw))
        ]

    trajectories = start()

    def step() -> None:
        if trajectories[0].done:
            trajectories[:] = start()
        denoise_step(model, trajectories)

    return step


def _training(model: "UNet2DConditionModel", x_BChw: "Tensor") -> Callable[[], object]:
    """Loss, gradients and AdamW."""
    import torch

    from ldm.conditioning import Conditioning
    from ldm.objective import NoiseSchedule, diffusion_loss
    from ldm.unet import predict

    schedule = NoiseSchedule(prediction="v_prediction")
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-4, fused=True)

    def step() -> None:
        noise, t_B = torch.randn_like(x_BChw), schedule.timesteps(torch.rand(len(x_BChw)))
        prediction = predict(model, schedule.add_noise(x_BChw, noise, t_B), t_B, Conditioning())
        loss = diffusion_loss(prediction, schedule.target(x_BChw, noise, t_B)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


STEPS = {"sampling": _sampling, "training": _training}

if __name__ == "__main__":
    main(*sys.argv[1:])
