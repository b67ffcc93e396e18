"""``ldm evaluate recon``: how well a VAE reconstructs the images of some shards."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from ldm.bootstrap import BootstrapConfig, Figure, mean_interval
from ldm.preprocess import Preprocess
from pipelines.evaluate.pool import EvaluatePool

if TYPE_CHECKING:
    from ldm.autoencoder import Autoencoder
    from pipelines.evaluate import Measured, ReconModels, Reconstruction

__all__ = ["EvaluateReconJob"]

MAX_PRINTED_IMAGES = 64


class EvaluateReconJob(JobConfig):
    """Reconstruct the images in INPUT with a VAE; prints PSNR, SSIM and MS-SSIM per image and in the mean.

    The page shows the worst and the median images and pins what moves the figures.
    """

    input: CliPositionalArg[str] = Field(description="folder or URL of .tar shards, or one .tar")
    vae: str = Field("f8", description="default model, diffusers folder, URL or hub id")
    preprocess: Preprocess = Preprocess()
    extractor: str = Field(
        "", description="of features for rFID: inception, its file, mobilenet, random; none: no rFID"
    )
    perceptual: str = Field(
        "", description="perceptual distance: lpips-vgg, lpips-alex, stlpips, random or a folder of weights"
    )
    page: Path = Field(Path("out/recon.html"), description="HTML report to write")
    pictures: Path | None = Field(None, description="folder for PNGs of originals beside reconstructions")
    shown: PositiveInt = Field(4, description="worst and median images on the page, of each")
    keep: PositiveInt = Field(1000, description="images whose features are kept for KID and intervals")
    bootstrap: BootstrapConfig = BootstrapConfig()
    pool: EvaluatePool = EvaluatePool()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """Figures and intervals, per-image figures, pins, std of the latents after the VAE's own scaling."""
        from jobs.recon_page import choose, write_page
        from pipelines.evaluate import measure, reconstruct

        autoencoder, models, pins = self._checked()
        with connected(self.cluster):
            measured = measure(self.input, models, self.preprocess, self.pool, keep=self.keep)
            chosen = choose(measured.images, self.shown)
            ids = {image.id for image in (*chosen.worst, *chosen.median)}
            found = reconstruct(
                self.input, models.vae, self.preprocess, self.pool, None if self.pictures else ids
            )
            pictures = {}
            for picture in found:
                self._save_picture(picture)
                if picture.id in ids:
                    pictures[picture.id] = picture
        figures = self._figures(measured)
        pins = {"images": str(len(measured.images)), "set sha256": measured.digest, **pins}
        self._print(measured, figures)
        write_page(
            self.page,
            title=f"{self.vae} on {self.input}",
            figures=figures,
            chosen=chosen,
            pictures=pictures,
            pins=pins,
            rejected=measured.rejected,
            level=self.bootstrap.level,
        )
        return self._result(measured, figures, autoencoder, pins)

    def _checked(self) -> "tuple[Autoencoder, ReconModels, dict[str, str]]":
        """Everything that can be refused before Ray is started, and the pins known by then."""
        from jobs.evaluation_view import extractor_pins, preprocess_pins, protocol_pins
        from ldm.autoencoder import load
        from ldm.features import load_extractor
        from pipelines.evaluate import ReconModels
        from pipelines.shards import list_shards
        from pipelines.vae_source import on_every_node

        list_shards(self.input)
        autoencoder = load(self.vae)
        for height, width in self.preprocess.shapes():
            autoencoder.check_size(height, width)
        pins = {**preprocess_pins(self.preprocess), "VAE": self.vae, "VAE sha256": autoencoder.fingerprint}
        packages = ["torch", "torchmetrics", "pillow"]
        if self.extractor:
            pins |= extractor_pins(load_extractor(self.extractor), self.keep)
            pins["KID"] += "; no image with its own reconstruction"
            packages.append("torch-fidelity")
        if self.perceptual:
            from ldm.perceptual import load_perceptual

            perceptual = load_perceptual(self.perceptual)
            for height, width in self.preprocess.shapes():
                perceptual.check_size(height, width)
            pins |= {"perceptual distance": perceptual.name, "perceptual sha256": perceptual.fingerprint}
        sources = (_absolute(source) for source in (self.extractor, self.perceptual))
        models = ReconModels(on_every_node(self.vae), *sources)
        return autoencoder, models, pins | protocol_pins(self.bootstrap, packages)

    def _figures(self, measured: "Measured") -> dict[str, Figure | None]:
        from ldm.comparison import compare

        figures: dict[str, Figure | None] = {"ms_ssim": None}
        for name, values in measured.values().items():
            figures[name] = Figure(sum(values) / len(values), mean_interval(values, self.bootstrap))
        if measured.originals is not None and measured.reconstructions is not None:
            comparison = compare(measured.originals, measured.reconstructions, self.bootstrap, paired=True)
            figures |= {"rfid": comparison.fid, "rkid": comparison.kid}
        return figures

    def _save_picture(self, picture: "Reconstruction") -> None:
        if self.pictures is None:
            return
        import numpy as np

        from jobs.recon_page import picture_name
        from ldm.images import encode_png

        self.pictures.mkdir(parents=True, exist_ok=True)
        side_by_side = np.concatenate([picture.original, picture.reconstruction], axis=1)
        (self.pictures / picture_name(picture)).write_bytes(encode_png(side_by_side))

    def _print(self, measured: "Measured", figures: dict[str, Figure | None]) -> None:
        from rich.console import Console
        from rich.table import Table

        from jobs.evaluation_view import FIGURES, figure_rows

        names = list(measured.values())
        headings = (FIGURES[name].name for name in names)
        table = Table("image", *headings, title=f"{self.vae} on {self.input}", title_justify="left")
        if len(measured.images) <= MAX_PRINTED_IMAGES:
            for image in measured.images:
                cells = ((FIGURES[name].format, getattr(image, name)) for name in names)
                table.add_row(image.key, *("" if v is None else text.format(v) for text, v in cells))
            table.add_section()
        means = {row.name: row.value for row in figure_rows(figures)}
        table.add_row(f"mean of {len(measured.images)}", *(means[FIGURES[name].name] for name in names))
        Console().print(table)
        for row in figure_rows(figures):
            print(f"{row.name} {row.value}" + (f" ({row.interval})" if row.interval else ""))
        for rejected in measured.rejected:
            print(f"not used: {rejected.shard}: {rejected.key}: {rejected.reason}")
        print(f"report: {self.page}")

    def _result(
        self,
        measured: "Measured",
        figures: dict[str, Figure | None],
        autoencoder: "Autoencoder",
        pins: dict[str, str],
    ) -> dict[str, object]:
        from jobs.evaluation_view import as_json

        return {
            **as_json(figures),
            "num_images": len(measured.images),
            "processes": measured.processes,
            "rejected": [rejected._asdict() for rejected in measured.rejected],
            "scaled_std": measured.scaled_std,
            "fingerprint": autoencoder.fingerprint,
            "pins": pins,
            "page": str(self.page),
            "images": [asdict(image) for image in measured.images],
        }


def _absolute(source: str) -> str:
    """Workers have another working directory: a path that is there becomes absolute."""
    path = Path(source).expanduser()
    return str(path.resolve()) if source and path.exists() else source
