"""What a VAE training is made of on one rank: VAE, EMA, optimisers; one step of it; its state."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ldm import autoencoder
from ldm.discriminator import Discriminator
from ldm.ema import averaged, constant_decay
from ldm.latents import LatentStats
from ldm.perceptual import load_perceptual
from ldm.seeds import keyed_seed
from ldm.vae_loss import VaeLoss
from pipelines.train.adversary import Adversary, Wrap
from pipelines.train.schedule import lr_factor
from pipelines.train.vae_config import VaeTraining
from pipelines.train.vae_step import Step, VaeOptimisation

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["VaeState", "start_vae", "stats_of", "stats_state", "trained_parts"]


class VaeState:
    """One rank's part of a run. Built the same on every rank, from the config alone.

    wrap: puts a module on its device and, where there are several workers, into DDP. latents: statistics
    of the finished VAE's latents, which its export needs; none before the last step.
    """

    def __init__(self, config: VaeTraining, device: torch.device, wrap: Wrap, *, rank: int = 0) -> None:
        self.config, self.device, self.rank = config, device, rank
        torch.manual_seed(config.seed)
        vae = trained_parts(start_vae(config), config.parts)
        self.vae: AutoencoderKL = vae.to(memory_format=torch.channels_last)
        self.ema = averaged(self.vae, constant_decay(config.ema_decay)).to(device)
        self.optimisation = _optimisation(self.vae, config, wrap)
        self.adversary = self.optimisation.adversary
        channels = int(self.vae.config["latent_channels"])
        self.latents = LatentStats(0, (0.0,) * channels, (0.0,) * channels)
        _begin(self.vae, self.optimisation.optimizer)
        if self.adversary is not None:
            _begin(self.adversary.model, self.adversary.optimizer)

    def step(self, images_B3HW: Tensor, step: int) -> Step:
        """Learn from this rank's share of a global batch; ``step`` counts from 1.

        The posterior's noise depends on (seed, step, rank), and the learning rate on the step alone.
        """
        torch.manual_seed(keyed_seed("posterior", self.config.seed, step, self.rank) % 2**63)
        made = self.optimisation.step(step, images_B3HW.to(self.device))
        self.ema.update_parameters(self.vae)
        return made

    def weight_norm(self) -> Tensor:
        """Norm of all weights that are trained: no finite number where one of them is none."""
        models = [self.vae] if self.adversary is None else [self.vae, self.adversary.model]
        return nn.utils.get_total_norm([p.detach() for model in models for p in model.parameters()])

    def state(self) -> dict[str, Any]:
        """All that the next step and the export depend on, as tensors."""
        state = {
            "vae": get_model_state_dict(self.vae),
            "ema": get_model_state_dict(self.ema),
            "optimizer": get_optimizer_state_dict(self.vae, self.optimisation.optimizer),
            "latents": stats_state(self.latents),
        }
        if self.adversary is not None:
            model, optimizer = self.adversary.model, self.adversary.optimizer
            state["discriminator"] = get_model_state_dict(model)
            state["discriminator_optimizer"] = get_optimizer_state_dict(model, optimizer)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Set all from what `state` gave."""
        set_model_state_dict(self.vae, state["vae"])
        set_model_state_dict(self.ema, state["ema"])
        set_optimizer_state_dict(self.vae, self.optimisation.optimizer, state["optimizer"])
        self.latents = stats_of(state["latents"])
        if self.adversary is not None:
            model, optimizer = self.adversary.model, self.adversary.optimizer
            set_model_state_dict(model, state["discriminator"])
            set_optimizer_state_dict(model, optimizer, state["discriminator_optimizer"])
            for group in optimizer.param_groups:
                group["lr"] = self.config.discriminator_lr  # the stored one may have been changed since


def start_vae(config: VaeTraining) -> "AutoencoderKL":
    """The VAE before its first step; a preset's weights are drawn from the global random state."""
    vae: AutoencoderKL = (
        autoencoder.load(config.init).vae if config.init else autoencoder.build(config.preset)
    )
    return vae


def trained_parts(vae: "AutoencoderKL", parts: str) -> "AutoencoderKL":
    """In training mode, with gradients for "all" or for the "decoder", behind the latent, alone."""
    vae = vae.train().requires_grad_(True)
    if parts == "decoder":
        for frozen in (vae.encoder, vae.quant_conv):
            if frozen is not None:  # a VAE may have no quant_conv
                frozen.requires_grad_(False)
    return vae


def stats_state(stats: LatentStats) -> dict[str, Tensor]:
    """Statistics as they lie in a snapshot."""
    return {
        "count": torch.tensor(stats.count),
        "mean_C": torch.tensor(stats.mean_C, dtype=torch.float64),
        "m2_C": torch.tensor(stats.m2_C, dtype=torch.float64),
    }


def stats_of(state: dict[str, Tensor]) -> LatentStats:
    """The inverse of `stats_state`."""
    return LatentStats(int(state["count"]), tuple(state["mean_C"].tolist()), tuple(state["m2_C"].tolist()))


def _begin(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the moments that a first step would make, so that a snapshot before it is of the same form.

    torch's own way to make them is a step without gradients; here it does not count as one.
    """
    get_optimizer_state_dict(model, optimizer)
    for moments in optimizer.state.values():
        moments["step"].zero_()


def _optimisation(vae: "AutoencoderKL", config: VaeTraining, wrap: Wrap) -> VaeOptimisation:
    perceptual = load_perceptual(config.perceptual) if config.perceptual else None
    adversary = None
    if config.gan_weight:
        adversary = Adversary(
            Discriminator(),
            wrap,
            weight=config.gan_weight,
            learning_rate=config.discriminator_lr,
            start_step=config.gan_start_step,
        )
    return VaeOptimisation(
        VaeLoss(vae, config.loss, config.kl_weight, perceptual, config.perceptual_weight),
        wrap,
        learning_rate=config.learning_rate,
        lr_factor=lambda step: lr_factor(step, config.steps, config.warmup_steps),
        clip_norm=config.clip_norm,
        adversary=adversary,
    )
