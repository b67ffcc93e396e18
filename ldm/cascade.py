"""One stage of a cascade: an upsampler denoises a latent several times as large, in overlapping windows.

The low-resolution latent is noised at a level that the U-Net is told, and stands beside the noisy one (Ho et
al. 2021, section 4.2). What is denoised is the difference to the enlarged low-resolution latent, without that
noise (`ldm.upsampling`). All noise is drawn over the whole canvas, so nothing but the
predictions depends on the windows, and those are averaged before every step (`ldm.windows`).

Shape suffixes: N windows of a U-Net call, C channels, H and W the canvas, h and w a window or the small
latent; B is 1.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm import checkpoint, unet
from ldm.checkpoint import CheckpointInfo
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.latents import keyed_normal
from ldm.objective import kind_of
from ldm.sampling import MAX_SEED, Trajectory
from ldm.schedulers import default_scheduler
from ldm.seeds import keyed_seed
from ldm.upsampling import enlarged, upsampler_input
from ldm.windows import Corner, WindowGrid, WindowMean

__all__ = ["Denoise", "Sampling", "Upsampler", "Upsampling", "WindowBatch", "WindowDenoiser"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a stage is sampled; window_overlap: share of a window's side; window_batch: windows of a call."""

    seed: int
    num_inference_steps: int
    scheduler: str
    noise_level: int
    window_overlap: float
    window_batch: int


@dataclass(frozen=True)
class Upsampler:
    """What is known of an upsampler's checkpoint without its weights."""

    folder: Path
    info: CheckpointInfo
    scheduler_config: dict[str, object]
    size_multiple: int
    fingerprint: str

    @classmethod
    def read(cls, folder: Path) -> "Upsampler":
        """UserError where ``folder`` is no complete checkpoint, or not that of an upsampler."""
        info, scheduler_config = checkpoint.read_info(folder), checkpoint.read_scheduler_config(folder)
        if info.upsampling_factor is None:
            raise UserError(
                f"{folder} is no upsampler",
                do="give a checkpoint that was trained with --train.data.low-size-px",
            )
        if info.residual_scale is None:
            raise UserError(f"upsampler {folder} is of an earlier version", do="train it again")
        model = unet.load(folder)
        return cls(folder, info, scheduler_config, unet.size_multiple(model), unet.fingerprint(model))

    @property
    def factor(self) -> int:
        assert self.info.upsampling_factor is not None
        return self.info.upsampling_factor

    @property
    def default_scheduler(self) -> str:
        return default_scheduler(kind_of(self.scheduler_config))


class WindowBatch(NamedTuple):
    """One U-Net call: windows (N, 2C, h, w) of noisy and low-resolution latent, timestep, noise level."""

    x_NChw: Tensor
    timestep: float
    level: int


# Batches → their predictions (N, C, h, w), in the same order.
Denoise = Callable[[Iterable[WindowBatch]], Iterable[Tensor]]


class WindowDenoiser:
    """An upsampler's U-Net, called with windows. One trained with embeddings gets their null."""

    def __init__(self, model: nn.Module, info: CheckpointInfo) -> None:
        self.model, self.embedding_width = model.eval(), info.embedding_width

    @torch.no_grad()
    def __call__(self, batch: WindowBatch) -> Tensor:
        """Predictions (N, C, h, w) float32, where the batch was."""
        count = len(batch.x_NChw)
        embeddings = None if self.embedding_width is None else torch.zeros(count, 1, self.embedding_width)
        condition = Conditioning(torch.full((count,), batch.level), embeddings)
        return unet.predict(self.model, batch.x_NChw, torch.full((count,), batch.timestep), condition)


class Upsampling:
    """A stage under way. The first steps may be taken by one process, the others by another (`state`)."""

    def __init__(self, low_Chw: Tensor, upsampler: Upsampler, sampling: Sampling, stage: int) -> None:
        """low_Chw: float32, in the VAE's own scale; stage: its place in the cascade, which keys its noise.

        UserError for a choice that is not allowed.
        """
        self.upsampler, self.sampling, self.stage = upsampler, sampling, stage
        self.size_HW = low_Chw.shape[1] * upsampler.factor, low_Chw.shape[2] * upsampler.factor
        self.padded_1Chw = _padded(low_Chw[None], upsampler)
        self.low_1Chw = upsampler.info.whitening.normalise(self.padded_1Chw)
        self.low_noise_1Chw = keyed_normal([self._key("augmentation")], self.low_1Chw.shape[1:])
        height, width = self.padded_1Chw.shape[2:]
        canvas_HW = (height * upsampler.factor, width * upsampler.factor)
        self.trajectory = Trajectory(
            shape=(low_Chw.shape[0], *canvas_HW),
            scheduler=sampling.scheduler,
            scheduler_config=upsampler.scheduler_config,
            num_inference_steps=sampling.num_inference_steps,
            guidance=1.0,
            seed=self._key("noise") & MAX_SEED,
        )
        trained_hw = upsampler.info.latent_shape[1:]
        # In training a window began where a low-resolution value began.
        self.grid = WindowGrid.of(canvas_HW, trained_hw, sampling.window_overlap, upsampler.factor)

    def corners(self, step_index: int) -> list[Corner]:
        """The windows of a step. Their grid moves from step to step, or seams would form at its lines."""
        return self.grid.corners(np.random.default_rng(self._key(f"windows {step_index}")))

    def step(self, denoise: Denoise) -> None:
        """Predict every window, average, and take one step."""
        trajectory = self.trajectory
        x_1CHW, timestep = trajectory.model_input()[None], trajectory.timestep
        level_1 = torch.tensor([self.sampling.noise_level])
        seen_CHW = upsampler_input(x_1CHW, self.low_1Chw, self.low_noise_1Chw, level_1)[0]
        prediction_CHW = self._predict(seen_CHW, float(timestep), denoise)
        trajectory.advance(prediction_CHW)

    @property
    def latent_CHW(self) -> Tensor:
        """The latent so far; when all steps are taken, the result in the VAE's own scale."""
        return self._of_vae(self.trajectory.latent)

    @property
    def preview_CHW(self) -> Tensor:
        """The clean latent that the last step's prediction implies, in the VAE's own scale."""
        return self._of_vae(self.trajectory.denoised)

    def state(self) -> dict[str, Tensor]:
        """What a process needs to go on, beside the arguments."""
        return self.trajectory.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of the same arguments, to the same bits."""
        self.trajectory.restore(state)

    def _predict(self, seen_CHW: Tensor, timestep: float, denoise: Denoise) -> Tensor:
        batches = _batched(self.corners(self.trajectory.step_index), self.sampling.window_batch)
        mean = WindowMean(len(self.trajectory.latent), self.grid)
        windows = (self._cut(seen_CHW, batch) for batch in batches)
        calls = (WindowBatch(x_NChw, timestep, self.sampling.noise_level) for x_NChw in windows)
        for batch, prediction_NChw in zip(batches, denoise(calls), strict=True):
            for corner, prediction_Chw in zip(batch, prediction_NChw, strict=True):
                mean.add(corner, prediction_Chw)
        return mean.result()

    def _cut(self, seen_CHW: Tensor, corners: Sequence[Corner]) -> Tensor:
        height, width = self.grid.window_hw
        return torch.stack([seen_CHW[:, top : top + height, left : left + width] for top, left in corners])

    def _of_vae(self, x_CHW: Tensor) -> Tensor:
        height, width = self.size_HW
        residual_1CHW = self.upsampler.info.residual_whitening.denormalise(x_CHW[None])
        whole_1CHW = residual_1CHW + enlarged(self.padded_1Chw, x_CHW.shape[1:])
        return whole_1CHW[0, :, :height, :width].contiguous()

    def _key(self, purpose: str) -> int:
        return keyed_seed("cascade", self.sampling.seed, self.stage, purpose)


def _padded(low_1Chw: Tensor, upsampler: Upsampler) -> Tensor:
    """With its last row and column repeated until the U-Net takes the size that its canvas has."""
    multiple = -(-upsampler.size_multiple // upsampler.factor)
    down, right = (-side % multiple for side in low_1Chw.shape[2:])
    return F.pad(low_1Chw, (0, right, 0, down), mode="replicate")


def _batched(corners: Sequence[Corner], size: int) -> list[Sequence[Corner]]:
    return [corners[start : start + size] for start in range(0, len(corners), size)]
