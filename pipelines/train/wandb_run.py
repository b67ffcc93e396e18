"""A training as a run of Weights & Biases. That service may fail; the training goes on without it."""

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ldm.errors import UserError
from pipelines.publish import create

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["RUN_ID", "WandbConfig", "WandbRun", "check_wandb"]

# In the output: the id under which every start goes on with the same run.
RUN_ID = "wandb_run_id"
# wandb uploads in a process of its own and tries again by itself. Left alone it would do so without
# end after the last step; what is not uploaded by then stays on the disk for `wandb sync`.
FINISH_TIMEOUT_S = 300


class WandbConfig(BaseModel):
    """The run's place in Weights & Biases. The key is wandb's own affair: ``wandb login``, WANDB_API_KEY."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str
    entity: str | None = Field(None, description="user or team; default: that of the key")
    name: str | None = Field(None, description="of the run; default: one that W&B makes up")
    mode: Literal["online", "offline"] = Field("online", description="offline: files for wandb sync in OUT")


def check_wandb(config: WandbConfig) -> None:
    """UserError where wandb is not installed, or is to go online without a key."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"Weights & Biases is not installed ({error})", do="pip install 'ray-ldm[wandb]'"
        ) from error
    if config.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError(
            "no key for Weights & Biases",
            do="run wandb login, or set WANDB_API_KEY, or --train.wandb.mode offline",
        )


class WandbRun:
    """A monitor (see `pipelines.train.monitor`); says so once where W&B fails, and is silent from then on."""

    def __init__(self, config: WandbConfig, out: Path, settings: Mapping[str, object]) -> None:
        """settings: what W&B shows as the run's config."""
        self._run: Run | None = None
        self._run = self._tried(_start, config, out, settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Steps that W&B has already, of before a restart, are left out by wandb."""
        if self._run:
            self._tried(self._run.log, dict(metrics), step=step)

    def show(self, step: int, image_HW3: NDArray[np.uint8]) -> None:
        import wandb

        if self._run:
            self._tried(self._run.log, {"samples": wandb.Image(image_HW3)}, step=step)

    def close(self) -> None:
        if self._run:
            self._tried(self._run.finish)

    def _tried(self, call: Callable[..., Any], *args: object, **options: object) -> Any:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            return call(*args, **options)
        # The server's refusals; wandb's own process that died, as it is seen by who writes and who waits.
        except (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError) as error:
            print(f"Weights & Biases is left out from here on: {error}", flush=True)
            self._run = None
            return None


def _start(config: WandbConfig, out: Path, settings: Mapping[str, object]) -> "Run":
    import wandb

    create(LocalFileSystem(), str(out / RUN_ID), uuid.uuid4().hex.encode())
    return wandb.init(
        project=config.project,
        entity=config.entity,
        name=config.name,
        mode=config.mode,
        id=(out / RUN_ID).read_text(),
        resume="allow" if config.mode == "online" else None,
        dir=out,
        config=dict(settings),
        # Ray has the worker's output already.
        settings=wandb.Settings(console="off", finish_timeout=FINISH_TIMEOUT_S),
    )
