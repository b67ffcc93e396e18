"""``ldm generate``: a dataset of a checkpoint's images, as WebDataset tars."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig, resolved
from pipelines.generate import GeneratePools, check, labels_of, scheduler_of

if TYPE_CHECKING:
    from ldm.checkpoint import CheckpointInfo
    from pipelines.generated_shards import ImagePlan

__all__ = ["GenerateJob"]


class GenerateJob(JobConfig):
    """Make a dataset of images with the checkpoint CHECKPOINT: WebDataset tars in OUT, labels in their JSON.

    Run it again after any interruption: tars that are there are not made again, and the others have the bytes
    that they would have had.
    """

    checkpoint: CliPositionalArg[Path] = Field(
        description="folder written by ldm train, the same on every node"
    )
    out: CliPositionalArg[str] = Field(description="folder or URL for the tars, new or of this run")
    num_images: PositiveInt = Field(description="to make in all; classes take turns")
    classes: tuple[str, ...] = Field((), description="class names or indices; none for all of them")
    images_per_shard: PositiveInt = Field(256, description="of a tar, made and published together")
    seed: int = Field(0, ge=0, description="of the first image; the next ones count up")
    guidance: NonNegativeFloat = Field(3.0, description="classifier-free guidance scale; 1 is none")
    steps: PositiveInt = 50
    scheduler: str = Field(
        "", description="ddim, ddpm, euler, dpmpp, flow_euler; default ddim, or flow_euler"
    )
    vae: str | None = Field(None, description="VAE to decode with; default: the checkpoint's")
    pools: GeneratePools = GeneratePools()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """Numbers of images: in all, and made by this run; ``out`` and images per second."""
        import time

        from ldm.checkpoint import read_info
        from pipelines.generated_shards import GeneratedShards, write_units
        from pipelines.lease import writer_lease

        info = read_info(self.checkpoint)
        plan = self._plan(info)
        vae = check(self.checkpoint, [plan.request(0), plan.request(self.num_images - 1)], self.vae)
        shards = GeneratedShards.at(self.out)
        record = self._record(plan, info)
        shards.check(record)
        start, made = time.perf_counter(), 0
        with writer_lease(shards.filesystem, shards.root, self.out) as lease:
            shards.begin(record, info.class_names)
            missing = sorted({*range(plan.num_units)} - shards.done())
            if missing:
                with connected(self.cluster):
                    for count in write_units(self.checkpoint, info, vae, plan, shards, missing, self.pools):
                        lease.check()
                        made += count
                        print(f"{made} images made", flush=True)
            shards.publish("generate.yaml", resolved(self).encode())
        seconds = time.perf_counter() - start
        print(f"{self.num_images} images in {plan.num_units} tars, {made} of them made now: {self.out}")
        return {
            "out": self.out,
            "images": self.num_images,
            "made": made,
            "seconds": seconds,
            "images_per_s": made / seconds,
        }

    def _plan(self, info: "CheckpointInfo") -> "ImagePlan":
        from pipelines.generated_shards import ImagePlan

        return ImagePlan(
            num_images=self.num_images,
            unit_size=self.images_per_shard,
            labels=tuple(labels_of(info, self.classes)),
            seed=self.seed,
            guidance=self.guidance if info.class_names else 1.0,
            num_inference_steps=self.steps,
            scheduler=scheduler_of(self.checkpoint, self.scheduler),
        )

    def _record(self, plan: "ImagePlan", info: "CheckpointInfo") -> dict[str, object]:
        """What the images depend on, batches and threads too: they change the last bits of a sum."""
        from dataclasses import asdict

        from ldm import unet
        from ldm.checkpoint import read_scheduler_config

        pools = self.pools
        return {
            **asdict(plan),
            "unet": unet.fingerprint(unet.load(self.checkpoint)),
            "scheduler_config": read_scheduler_config(self.checkpoint),
            "vae": info.vae_fingerprint,
            "shift": info.shift,
            "scale": info.scale,
            "batch_sizes": [pools.sampler.batch_size, pools.decoder.batch_size],
            "threads": [pools.sampler.fixed_threads, pools.decoder.fixed_threads],
        }
