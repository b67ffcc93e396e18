"""``ldm demo``: the whole chain on the photographs that scikit-image and scikit-learn carry."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from ldm.errors import UserError
from pipelines.train.config import UnetTraining

if TYPE_CHECKING:
    from jobs.demo_report import Grid
    from pipelines.evaluate import Reconstruction

__all__ = ["PHOTOS", "DemoJob"]

# Class name → (package, file). Each photograph is a class: its crops share colours and textures.
PHOTOS = {
    "astronaut": ("skimage", "astronaut.png"),
    "cat": ("skimage", "chelsea.png"),
    "coffee": ("skimage", "coffee.png"),
    "flower": ("sklearn", "flower.jpg"),
    "galaxies": ("skimage", "hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "motorcycle_left.png"),
    "retina": ("skimage", "retina.jpg"),
    "rocket": ("skimage", "rocket.jpg"),
    "temple": ("sklearn", "china.jpg"),
    "tissue": ("skimage", "ihc.png"),
}
CROP_PX = 64


class DemoJob(JobConfig):
    """Real photos → tars → latents → trained U-Net → images, all on Ray, with a report in OUT."""

    out: CliPositionalArg[Path] = Field(
        Path("out/demo"), description="folder; an earlier demo there is replaced"
    )
    vae: str = Field("f8", description="VAE to encode and decode with")
    crops_per_photo: PositiveInt = 300
    train_steps: PositiveInt = 1200
    images_per_class: PositiveInt = 8
    guidance: PositiveFloat = 3.0
    inference_steps: PositiveInt = 30
    cluster: ClusterConfig = ClusterConfig(num_cpus=max(4, os.cpu_count() or 1))

    def run(self) -> dict[str, object]:
        """The report's path, class control, rates and seconds of each stage."""
        from jobs.demo_report import Report, write

        _clear(self.out)
        report = Report(guidance=self.guidance, inference_steps=self.inference_steps)
        with connected(self.cluster, worker_logs=True):
            with _stage(report.seconds, "shards"):
                self._shards()
            with _stage(report.seconds, "encode"):
                report.encode = self._encode()
            report.stats = self._stats()
            with _stage(report.seconds, "reconstruct"):
                report.reconstructions = self._reconstruct()
            with _stage(report.seconds, "train"):
                report.train = self._train()
            for guidance in (1.0, self.guidance):
                with _stage(report.seconds, f"sample at guidance {guidance:g}"):
                    report.grids.append(self._sample(guidance))
        path = write(report, self.out)
        print(f"report: {path}")
        return {"report": str(path), **report.figures()}

    def _shards(self) -> None:
        from jobs.shards import ShardsJob

        for name, photo in photo_paths().items():
            folder = self.out / "photos" / name
            folder.mkdir(parents=True)
            shutil.copyfile(photo, folder / photo.name)
        ShardsJob(
            src=self.out / "photos",
            out=self.out / "shards",
            crop_px=CROP_PX,
            crops_per_image=self.crops_per_photo,
            zoom_max=4.0,
            samples_per_shard=500,
        ).run()

    def _encode(self) -> dict[str, object]:
        from jobs.encode import EncodeJob
        from ldm.preprocess import Preprocess
        from pipelines.encode.pools import EncoderPool

        return EncodeJob(
            input=str(self.out / "shards"),
            output=str(self.out / "latents"),
            vae=self.vae,
            preprocess=Preprocess(sizes_px=(CROP_PX,)),
            unit_size=100,
            encoder=EncoderPool(micro_batch=50),
        ).run()

    def _stats(self) -> dict[str, object]:
        from jobs.stats import StatsJob

        return StatsJob(dataset=str(self.out / "latents")).run()

    def _reconstruct(self) -> "list[Reconstruction]":
        """Each photograph at 256 px through the VAE."""
        from jobs.shards import ShardsJob
        from ldm.preprocess import Preprocess
        from pipelines.evaluate import EvaluatePool, reconstruct

        ShardsJob(src=self.out / "photos", out=self.out / "photo_shards").run()
        found = reconstruct(
            str(self.out / "photo_shards"), self.vae, Preprocess(sizes_px=(256,)), EvaluatePool()
        )
        return sorted(found, key=lambda r: r.key)

    def _train(self) -> dict[str, object]:
        from jobs.train import TrainJob

        training = UnetTraining(
            preset="tiny",
            steps=self.train_steps,
            batch_size=64,
            learning_rate=1e-3,
            log_every=100,
            checkpoint_every=self.train_steps,
            threads=os.cpu_count(),
        )
        return TrainJob(dataset=str(self.out / "latents"), out=self.out / "checkpoint", train=training).run()

    def _sample(self, guidance: float) -> "Grid":
        from jobs.demo_report import Grid
        from pipelines.generate import GeneratePools, Pool, Request, check, generate

        names = list(photo_paths())
        requests = [
            Request(label, seed, guidance, self.inference_steps, "ddim")
            for label in range(len(names))
            for seed in range(self.images_per_class)
        ]
        checkpoint = self.out / "checkpoint"
        pools = GeneratePools(sampler=Pool(batch_size=len(requests), threads=os.cpu_count()))
        made = generate(checkpoint, requests, check(checkpoint, requests, self.vae), pools)
        labels = [request.label or 0 for request in requests]
        return Grid.of(guidance, names, labels, made, self.out / "shards")


def photo_paths() -> dict[str, Path]:
    """Class name → photograph, in class order. UserError where the packages are not installed."""
    try:
        import skimage
        import sklearn.datasets
    except ImportError as error:
        raise UserError(
            f"the demo's photographs are not installed ({error})", do="pip install 'ray-ldm[demo]'"
        ) from error
    folders = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.datasets.__file__).parent / "images",
    }
    return {name: folders[package] / file for name, (package, file) in sorted(PHOTOS.items())}


def _clear(out: Path) -> None:
    """Remove an earlier demo; anything else in the folder is somebody's, and is refused."""
    made_here = {"photos", "shards", "photo_shards", "latents", "checkpoint", "samples", "report.html"}
    if out.exists():
        foreign = sorted(p.name for p in out.iterdir() if p.name not in made_here)
        if foreign:
            raise UserError(
                f"{out} holds files that no demo wrote, such as {foreign[0]}", do="give another folder"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    print(f"— {name}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
