"""``ldm sample``: generate images from a checkpoint."""

import time
from pathlib import Path

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig, save_resolved
from pipelines.generate import GeneratePools, Request, check, generate, labels_of, scheduler_of

__all__ = ["SampleJob"]


class SampleJob(JobConfig):
    """Generate images with the checkpoint CHECKPOINT; one PNG for each class and seed."""

    checkpoint: CliPositionalArg[Path] = Field(description="folder written by ldm train")
    out: Path = Field(Path("out/samples"), description="folder for the PNGs")
    classes: tuple[str, ...] = Field((), description="class names or indices; none for all of them")
    images_per_class: PositiveInt = 4
    seed: int = Field(0, ge=0, description="of the first image of each class; the next ones count up")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance scale; 1 is none")
    steps: PositiveInt = 50
    scheduler: str = Field(
        "", description="ddim, ddpm, euler, dpmpp, flow_euler; default ddim, or flow_euler"
    )
    vae: str | None = Field(None, description="VAE to decode with; default: the checkpoint's")
    pools: GeneratePools = GeneratePools()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """The files written and images per second."""
        from ldm.images import encode_png

        names, requests = self._requests()
        vae = check(self.checkpoint, requests, self.vae)
        start = time.perf_counter()
        with connected(self.cluster):
            images = generate(self.checkpoint, requests, vae, self.pools).images
        seconds = time.perf_counter() - start
        self.out.mkdir(parents=True, exist_ok=True)
        files = []
        for name, request, image in zip(names, requests, images, strict=True):
            files.append(self.out / f"{name}-seed{request.seed}-guidance{request.guidance:g}.png")
            files[-1].write_bytes(encode_png(image))
        save_resolved(self, self.out / "sample.yaml")
        print(f"{len(files)} images in {seconds:.1f} s: {self.out}")
        return {
            "files": [str(file) for file in files],
            "seconds": seconds,
            "images_per_s": len(files) / seconds,
        }

    def _requests(self) -> tuple[list[str], list[Request]]:
        """File name stem and request of each image."""
        from ldm.checkpoint import read_info

        info = read_info(self.checkpoint)
        scheduler = scheduler_of(self.checkpoint, self.scheduler)
        labels = labels_of(info, self.classes)
        requests = [
            Request(label, self.seed + i, self.guidance if info.class_names else 1.0, self.steps, scheduler)
            for label in labels
            for i in range(self.images_per_class)
        ]
        names = [
            # A class's name comes from outside: no part of it may be a folder.
            info.class_names[r.label].replace("/", "_")
            if info.class_names and r.label is not None
            else "image"
            for r in requests
        ]
        return names, requests
