"""What a training run is made of on one rank: model, EMA, optimizer; one step of it; its state."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ldm.checkpoint import CheckpointInfo
from ldm.ema import averaged, share_frozen
from ldm.seeds import keyed_seed
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentBatch
from pipelines.train.loss import loss_of
from pipelines.train.plan import build_unet
from pipelines.train.schedule import lr_factor

if TYPE_CHECKING:
    from torch.optim.swa_utils import AveragedModel

__all__ = ["TrainState", "trained_weights"]


class TrainState:
    """One rank's part of a run. Built the same on every rank, from the config alone."""

    def __init__(self, config: UnetTraining, info: CheckpointInfo, device: torch.device) -> None:
        self.config, self.info, self.device = config, info, device
        torch.manual_seed(config.seed)
        self.raw: nn.Module = build_unet(config, info).train().to(device)
        if config.gradient_checkpointing:
            self.raw.enable_gradient_checkpointing()
        self.ema: AveragedModel = averaged(self.raw, _ema_decay(config))
        share_frozen(self.ema, self.raw)
        self.model = self._distributed(self.raw)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            # One kernel for all weights, where there is one: not for sharded tensors on a CPU.
            fused=config.parallel == "ddp" or device.type == "cuda",
        )

    def _distributed(self, raw: nn.Module) -> nn.Module:
        model = raw
        if self.config.parallel == "fsdp2" and dist.is_initialized():
            from torch.distributed.fsdp import fully_shard

            fully_shard(raw)
            # Not the average's wrapper: what is called, to validate, is the module in it.
            fully_shard(self.ema.module)
        elif dist.is_initialized() and dist.get_world_size() > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            # Views: no second copy of all gradients.
            model = nn.parallel.DistributedDataParallel(raw, device_ids=ids, gradient_as_bucket_view=True)
        return torch.compile(model) if self.config.compile else model  # type: ignore[return-value]

    def step(self, batch: LatentBatch, step: int) -> tuple[Tensor, Tensor]:
        """Learn from this rank's share of a global batch; returns loss and gradient norm.

        The mean of all ranks' losses is the mean over the global batch.
        step: from 1. The learning rate and whatever the layers draw depend on it alone, so a run that
        goes on after a restart needs no state of a schedule or a generator.
        """
        torch.manual_seed(keyed_seed("layers", self.config.seed, step) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._lr_factor(step - 1)
            group["weight_decay"] = self.config.weight_decay  # the stored one may have been changed since
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.ema.update_parameters(self.raw)
        return loss, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _backward(self, batch: LatentBatch) -> Tensor:
        world = dist.get_world_size() if dist.is_initialized() else 1
        parts = batch.split(self.config.parts(world))
        losses = []
        for index, part in enumerate(parts):
            with nullcontext() if index == len(parts) - 1 else self._no_sync():
                loss_B = loss_of(self.model, part, self.config, self.info, self.device)
                # Of this the mean over ranks is the batch's mean, however many rows a rank has.
                loss = loss_B.sum() * (world / self.config.batch_size)
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _no_sync(self) -> Any:
        """Gradients of this part stay on the rank: the last part brings all of them together."""
        no_sync = getattr(self.model, "no_sync", None)
        return no_sync() if no_sync else nullcontext()

    def _lr_factor(self, step: int) -> float:
        steps = self.config.steps if self.config.schedule == "cosine" else None
        return lr_factor(step, steps, self.config.warmup_steps)

    @torch.no_grad()
    def validate(self, batches: list[LatentBatch]) -> tuple[float, float]:
        """Sum of the EMA model's losses over these rows, and their number."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            loss_B = loss_of(self.ema.module, batch, self.config, self.info, self.device)
            total, count = total + loss_B.double().sum().cpu(), count + len(loss_B)
        return float(total), float(count)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors; on FSDP this rank's shards."""
        optimizer = get_optimizer_state_dict(self.raw, self.optimizer)
        return {**trained_weights(self.raw, self.ema), "optimizer": optimizer}

    def restore(self, state: dict[str, Any]) -> None:
        """Set all from what `state` gave."""
        # What is frozen is in no state: it is as the config's init has it.
        trained = StateDictOptions(strict=False)
        set_model_state_dict(self.raw, state["model"], options=trained)
        set_model_state_dict(self.ema, state["ema"], options=trained)
        set_optimizer_state_dict(self.raw, self.optimizer, state["optimizer"])


def trained_weights(model: nn.Module, ema: "AveragedModel") -> dict[str, dict[str, Any]]:
    """The weights of ``model`` that are not frozen, and the average's weights of the same names."""
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    names = {"n_averaged", *(f"module.{name}" for name in trained)}
    averages = get_model_state_dict(ema)
    return {"model": trained, "ema": {name: averages[name] for name in averages if name in names}}


def _ema_decay(config: UnetTraining) -> Any:
    from ldm.ema import constant_decay, power_decay

    return power_decay(config.ema_width) if config.ema == "power" else constant_decay(config.ema_decay)
