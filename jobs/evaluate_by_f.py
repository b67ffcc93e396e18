"""``ldm evaluate by-f``: what VAEs of several f keep of a picture, for how many bits and in what time."""

import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from ldm.bootstrap import BootstrapConfig, Figure, mean_interval
from ldm.preprocess import Preprocess
from pipelines.evaluate.pool import EvaluatePool

if TYPE_CHECKING:
    from jobs.by_f_page import Point
    from ldm.autoencoder import Autoencoder
    from pipelines.evaluate import Measured

__all__ = ["EvaluateByFJob"]

FORMS = ("float16", "int8")


class EvaluateByFJob(JobConfig):
    """Reconstruct the images in INPUT with several VAEs, from latents stored in fp16 and in int8.

    Writes one plot: PSNR, SSIM and MS-SSIM over bits per pixel, and images/s of encode and decode here.
    """

    input: CliPositionalArg[str] = Field(description="folder or URL of .tar shards, or one .tar")
    vaes: tuple[str, ...] = Field(
        ("f4", "f8", "f16"), min_length=1, description="default models, diffusers folders, URLs or hub ids"
    )
    preprocess: Preprocess = Preprocess()
    seconds: PositiveFloat = Field(10.0, description="of timing for each VAE, which take turns")
    threads: PositiveInt = Field(os.cpu_count() or 1, description="of torch while timing")
    plot: Path = Field(Path("out/by-f.png"), description="PNG to write")
    page: Path = Field(Path("out/by-f.html"), description="HTML report to write")
    bootstrap: BootstrapConfig = BootstrapConfig()
    pool: EvaluatePool = EvaluatePool()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """A point for each VAE and form of its latents, with intervals; pins and files."""
        from jobs.by_f_page import draw, point_json, print_points, write_page
        from pipelines.evaluate import ReconModels, measure
        from pipelines.vae_source import on_every_node

        autoencoders = self._checked()
        images_per_s = self._images_per_s(autoencoders)
        points, measured = [], None
        with connected(self.cluster):
            for (name, autoencoder), form in product(autoencoders.items(), FORMS):
                models = ReconModels(on_every_node(name), stored=form)
                measured = measure(self.input, models, self.preprocess, self.pool)
                points.append(self._point(autoencoder, form, measured, images_per_s[name]))
        assert measured is not None
        pins = self._pins(measured, autoencoders)
        png = draw(points)
        self.plot.parent.mkdir(parents=True, exist_ok=True)
        self.plot.write_bytes(png)
        write_page(self.page, points, png, pins, measured.rejected, self.bootstrap.level)
        print_points(points)
        print(f"plot: {self.plot}\nreport: {self.page}")
        return {
            "points": [point_json(point) for point in points],
            "num_images": len(measured.images),
            "rejected": [rejected._asdict() for rejected in measured.rejected],
            "pins": pins,
            "plot": str(self.plot),
            "page": str(self.page),
        }

    def _checked(self) -> "dict[str, Autoencoder]":
        """Everything that can be refused before Ray is started."""
        from ldm.autoencoder import load
        from pipelines.shards import list_shards

        list_shards(self.input)
        autoencoders = {name: load(name) for name in self.vaes}
        for autoencoder in autoencoders.values():
            for height, width in self.preprocess.shapes():
                autoencoder.check_size(height, width)
        return autoencoders

    def _images_per_s(self, autoencoders: "dict[str, Autoencoder]") -> dict[str, float]:
        """Of encode and decode, one image at a time; what an image shows makes no difference to it."""
        import torch

        from jobs.bench.bursts import median_seconds

        torch.set_num_threads(self.threads)
        image = torch.zeros(1, 3, *self.preprocess.shapes()[0])
        ways = {
            name: lambda vae=vae: vae.decode(vae.encode(image).mode()) for name, vae in autoencoders.items()
        }
        return {name: 1 / duration for name, duration in median_seconds(ways, self.seconds).items()}

    def _point(
        self, autoencoder: "Autoencoder", form: str, measured: "Measured", images_per_s: float
    ) -> "Point":
        from jobs.by_f_page import Point

        figures = {
            name: Figure(sum(values) / len(values), mean_interval(values, self.bootstrap))
            for name, values in measured.values().items()
        }
        return Point(autoencoder.name, autoencoder.f, autoencoder.channels, form, figures, images_per_s)

    def _pins(self, measured: "Measured", autoencoders: "dict[str, Autoencoder]") -> dict[str, str]:
        from jobs.evaluation_view import preprocess_pins, protocol_pins

        shape = "×".join(map(str, self.preprocess.shapes()[0]))
        return {
            "images": str(len(measured.images)),
            "set sha256": measured.digest,
            **preprocess_pins(self.preprocess),
            **{f"VAE {name} sha256": autoencoder.fingerprint for name, autoencoder in autoencoders.items()},
            "images/s": f"encode and decode of one {shape} image, fp32, {self.threads} torch threads, VAEs "
            "in turns",
            **protocol_pins(self.bootstrap, ["torch", "torchmetrics", "pillow"]),
        }
