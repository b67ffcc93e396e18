"""Edits of a latent by a denoiser: part of the way to noise and back, and new content inside a mask.

Latents come and go in the VAE's own scale; in between they are whitened as the checkpoint's are.
Shape suffixes: B edits, C, h, w a latent's channels, rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.denoiser import DenoiseOptions, Denoiser
from ldm.errors import UserError
from ldm.sampling import sample

__all__ = ["first_step", "inpaint", "latent_mask", "sdedit"]


def first_step(strength: float, num_steps: int) -> int:
    """The step at which an edit of this strength begins: ``strength`` of the steps are left, rounded.

    0 leaves none, 1 all of them. UserError outside of 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength:g}", allowed="0 (the input itself) to 1 (all of it made anew)")
    return num_steps - round(strength * num_steps)


def sdedit(
    denoiser: Denoiser, z_BChw: Tensor, strengths_B: Sequence[float], options: DenoiseOptions
) -> Tensor:
    """Each latent noised to its strength's step and denoised from there (B, C, h, w).

    SDEdit (Meng et al. 2022, algorithm 1), all with the noise of one seed. At strength 0 the result is
    the input, bit for bit; at 1 it is plain sampling, and the input is not looked at.
    """
    denoiser.check_shape(z_BChw.shape[1:])
    whitening = denoiser.info.whitening
    x0_BChw = whitening.normalise(z_BChw)
    trajectories = [
        denoiser.trajectory(
            _shape(x0_Chw), options, x0=x0_Chw, first_step=first_step(strength, options.steps)
        )
        for x0_Chw, strength in zip(x0_BChw, strengths_B, strict=True)
    ]
    # Whitening and back rounds: what has no step to take is taken from the input.
    is_edited = torch.tensor([not trajectory.done for trajectory in trajectories])
    edited_BChw = whitening.denormalise(sample(denoiser.unet, trajectories, options.batch_size))
    return torch.where(is_edited.view(-1, 1, 1, 1), edited_BChw, z_BChw)


def inpaint(
    denoiser: Denoiser,
    z_Chw: Tensor,
    mask_hw: Tensor,
    seeds_B: Sequence[int],
    options: DenoiseOptions,
    strength: float = 1.0,
) -> Tensor:
    """One latent for each seed (B, C, h, w): new where ``mask_hw`` (bool) is True, ``z`` itself elsewhere.

    The known part is held as `ldm.sampling.Trajectory` does it. strength below 1 begins the masked part from
    ``z`` as `sdedit` does.
    """
    if mask_hw.dtype != torch.bool or mask_hw.shape != z_Chw.shape[1:]:
        raise ValueError(f"mask {mask_hw.dtype} {tuple(mask_hw.shape)} for a latent {tuple(z_Chw.shape)}")
    denoiser.check_shape(z_Chw.shape)
    whitening = denoiser.info.whitening
    x0_Chw = whitening.normalise(z_Chw[None])[0]
    begin = first_step(strength, options.steps)
    trajectories = [
        denoiser.trajectory(_shape(x0_Chw), options, seed=seed, x0=x0_Chw, first_step=begin, mask=mask_hw)
        for seed in seeds_B
    ]
    painted_BChw = whitening.denormalise(sample(denoiser.unet, trajectories, options.batch_size))
    return torch.where(mask_hw, painted_BChw, z_Chw)


def latent_mask(mask_HW: Tensor, f: int) -> Tensor:
    """bool (H, W), multiples of ``f`` → bool (h, w), True where any of the f × f pixels is."""
    return F.max_pool2d(mask_HW[None, None].float(), f)[0, 0].bool()


def _shape(x_Chw: Tensor) -> tuple[int, int, int]:
    channels, height, width = x_Chw.shape
    return channels, height, width
