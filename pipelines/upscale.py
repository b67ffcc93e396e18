"""A cascade of upsamplers over one latent, stage by stage, each of which goes on where it was interrupted.

A folder holds, for stage n: ``stage<n>.npy``, its latent, once it is finished; until then ``stage<n>.npz``,
from which it goes on; and ``stage<n>.png``, a preview. ``run.json`` says what the run is of.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from ldm.autoencoder import Autoencoder
from ldm.cascade import Denoise, Sampling, Upsampler, Upsampling
from ldm.checkpoint import check_vae
from ldm.errors import UserError
from ldm.images import encode_png
from ldm.sampling import MAX_SEED, Trajectory
from pipelines.publish import publish
from pipelines.train.run_record import read_record, write_record

__all__ = ["Upscaling", "Watch", "check", "open_run", "upscale"]

# Called after every step that was taken: stage, from 1 on; steps taken; steps in all.
Watch = Callable[[int, int, int], None]
Preview = Callable[[Tensor], NDArray[np.uint8]]
SCALES = {"shift", "scale", "residual_shift", "residual_scale"}


class Upscaling(BaseModel, frozen=True, extra="forbid"):
    """How latents are upscaled; the same for every stage."""

    seed: int = Field(0, ge=0, le=MAX_SEED, description="of all noise and of where windows lie")
    steps: PositiveInt = Field(25, description="of each stage")
    scheduler: str = Field(
        "", description="ddim, ddpm, euler, dpmpp, flow_euler; default ddim, or flow_euler"
    )
    noise_level: NonNegativeInt = Field(
        0, description="DDPM timestep to which the low-resolution latent is noised; hides its faults"
    )
    window_overlap: float = Field(0.25, ge=0, lt=1, description="least share of a window's side")
    window_batch: PositiveInt = Field(8, description="windows in one call of the U-Net")
    snapshot_every: PositiveInt = Field(5, description="steps that an interruption loses at most")
    preview: bool = Field(True, description="write a small PNG at every snapshot")

    def sampling(self, upsampler: Upsampler) -> Sampling:
        """What `Upsampling` takes."""
        return Sampling(
            seed=self.seed,
            num_inference_steps=self.steps,
            scheduler=self.scheduler or upsampler.default_scheduler,
            noise_level=self.noise_level,
            window_overlap=self.window_overlap,
            window_batch=self.window_batch,
        )


def check(
    low_Chw: NDArray[np.float32], folders: Sequence[Path], config: Upscaling, autoencoder: Autoencoder
) -> list[Upsampler]:
    """Check everything before Ray is started.

    UserError for a latent of other channels than the VAE's, a folder that is no upsampler or one of another
    VAE, and for what its sampler cannot do.
    """
    autoencoder.check_latents(torch.from_numpy(low_Chw)[None])
    return [_checked(Upsampler.read(folder), config, autoencoder) for folder in folders]


def _checked(upsampler: Upsampler, config: Upscaling, autoencoder: Autoencoder) -> Upsampler:
    folder, info = upsampler.folder, upsampler.info
    check_vae(autoencoder, info.vae_fingerprint, f"checkpoint {folder}")
    if info.max_noise_level is None or config.noise_level > info.max_noise_level:
        raise UserError(
            f"noise level {config.noise_level} for upsampler {folder}",
            allowed=f"0 to {info.max_noise_level}, with which it was trained",
        )
    Trajectory(
        shape=(1, 1, 1),
        scheduler=config.scheduler or upsampler.default_scheduler,
        scheduler_config=upsampler.scheduler_config,
        num_inference_steps=config.steps,
        guidance=1.0,
        seed=0,
    )
    return upsampler


def open_run(
    work: Path,
    low_Chw: NDArray[np.float32],
    upsamplers: Sequence[Upsampler],
    config: Upscaling,
    threads: int,
) -> None:
    """Make the folder of a run, or find it again. UserError where it holds a run of something else.

    threads: of torch, where the U-Net runs.
    """
    record = _record(low_Chw, upsamplers, config, threads)
    stored = read_record(work)
    if stored is not None and stored != record:
        names = sorted(n for n in stored.keys() | record.keys() if stored.get(n) != record.get(n))
        shown = "; ".join(f"{name}: {record.get(name)}, was {stored.get(name)}" for name in names)
        raise UserError(
            f"{work} holds a run of another kind ({shown})",
            do="give the settings of that run, remove it, or give another folder with --work",
        )
    write_record(work, record)


def upscale(
    low_Chw: NDArray[np.float32],
    upsamplers: Sequence[Upsampler],
    config: Upscaling,
    open_stage: Callable[[Upsampler], Denoise],
    work: Path,
    preview: Preview,
    watch: Watch,
) -> Tensor:
    """The last stage's latent (C, H, W) float32, in the VAE's own scale.

    low_Chw: the first stage's input, in the VAE's own scale; open_stage: upsampler → what predicts its
    windows (`pipelines.window_pool`); work: as `open_run` made it; preview: latent → picture.
    """
    latent_CHW = torch.from_numpy(low_Chw)
    for stage, upsampler in enumerate(upsamplers, start=1):
        files = _StageFiles(work, stage, preview if config.preview else None)
        if not files.latent.exists():
            upsampling = Upsampling(latent_CHW, upsampler, config.sampling(upsampler), stage)
            _run(upsampling, files, open_stage(upsampler), config.snapshot_every, watch)
        latent_CHW = torch.from_numpy(np.load(files.latent, allow_pickle=False))
    return latent_CHW


def _run(upsampling: Upsampling, files: "_StageFiles", denoise: Denoise, every: int, watch: Watch) -> None:
    files.restore(upsampling)
    trajectory = upsampling.trajectory
    while not trajectory.done:
        upsampling.step(denoise)
        if trajectory.step_index % every == 0 and not trajectory.done:
            files.snapshot(upsampling)
        watch(upsampling.stage, trajectory.step_index, trajectory.num_steps)
    files.finish(upsampling)


class _StageFiles:
    """What a stage leaves in the folder; every file appears when it is whole."""

    def __init__(self, work: Path, stage: int, preview: Preview | None) -> None:
        self.latent, self.progress, self.image = (
            work / f"stage{stage}.{kind}" for kind in ("npy", "npz", "png")
        )
        self.preview = preview

    def restore(self, upsampling: Upsampling) -> None:
        """Go on from the snapshot, if there is one."""
        if self.progress.exists():
            with np.load(self.progress, allow_pickle=False) as arrays:
                upsampling.restore({name: torch.from_numpy(arrays[name]) for name in arrays.files})

    def snapshot(self, upsampling: Upsampling) -> None:
        """Write what the stage goes on from, and its preview."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: value.numpy() for name, value in upsampling.state().items()}
        np.savez(buffer, **arrays)
        _publish(self.progress, buffer)
        if self.preview is not None:
            _publish(self.image, io.BytesIO(encode_png(self.preview(upsampling.preview_CHW))))

    def finish(self, upsampling: Upsampling) -> None:
        """Write the stage's latent, and its preview; the snapshot is not needed any more."""
        buffer = io.BytesIO()
        np.save(buffer, upsampling.latent_CHW.numpy())
        if self.preview is not None:
            _publish(self.image, io.BytesIO(encode_png(self.preview(upsampling.latent_CHW))))
        _publish(self.latent, buffer)
        self.progress.unlink(missing_ok=True)


def _publish(path: Path, buffer: io.BytesIO) -> None:
    publish(LocalFileSystem(), str(path), buffer.getvalue())


def _record(
    low_Chw: NDArray[np.float32], upsamplers: Sequence[Upsampler], config: Upscaling, threads: int
) -> dict[str, object]:
    """All that the bits depend on, as JSON has it."""
    # Of a job that has these options and others, too.
    choices = Upscaling.model_fields.keys() - {"snapshot_every", "preview"}
    record: dict[str, object] = {
        **config.model_dump(include=choices),
        "input": f"{low_Chw.shape} {hashlib.sha256(low_Chw.tobytes()).hexdigest()}",
        "stages": [upsampler.fingerprint for upsampler in upsamplers],
        "scales": [upsampler.info.model_dump(include=SCALES) for upsampler in upsamplers],
        "samplers": [upsampler.scheduler_config for upsampler in upsamplers],
        "threads": threads,
    }
    return dict(json.loads(json.dumps(record)))
