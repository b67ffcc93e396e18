"""``ldm evaluate samples``: how near a checkpoint's images are to a reference set, over a sweep."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from ldm.bootstrap import BootstrapConfig
from ldm.errors import UserError
from ldm.preprocess import Preprocess
from pipelines.evaluate.pool import EvaluatePool
from pipelines.generate import GeneratePools, Request, check, scheduler_of

if TYPE_CHECKING:
    from ldm.checkpoint import CheckpointInfo
    from pipelines.evaluate.samples import Beside, Generation, Reference, SweepPoint

__all__ = ["EvaluateSamplesJob"]


class EvaluateSamplesJob(JobConfig):
    """Generate images with CHECKPOINT and compare them with a reference set: FID, KID, precision, recall.

    Several values of guidance and steps, as --guidance 1,2,3 --steps 10,25, are all combined: one row
    and one point of the page's plot for each, all with the same seeds and classes.
    """

    checkpoint: CliPositionalArg[Path] = Field(description="folder written by ldm train")
    reference: str = Field(description="folder or URL of shards with the images to compare with")
    num_images: PositiveInt = Field(1000, description="to generate at every point; classes take turns")
    guidance: tuple[NonNegativeFloat, ...] = Field((1.0,), min_length=1, description="scales; 1 is none")
    steps: tuple[PositiveInt, ...] = Field((50,), min_length=1, description="numbers of inference steps")
    scheduler: str = Field(
        "", description="ddim, ddpm, euler, dpmpp, flow_euler; default ddim, or flow_euler"
    )
    seed: int = Field(0, ge=0, description="of the first image; the next ones count up")
    vae: str | None = Field(None, description="VAE to decode with; default: the checkpoint's")
    extractor: str = Field("inception", description="of features: inception, its file, mobilenet, random")
    preprocess: Preprocess = Field(
        Preprocess(), description="of the reference images; their size is the checkpoint's"
    )
    page: Path = Field(Path("out/samples.html"), description="HTML report to write")
    shown: PositiveInt = Field(4, description="worst and median images on the page, of each")
    keep: PositiveInt = Field(1000, description="images of each set whose features are kept for all but FID")
    bootstrap: BootstrapConfig = BootstrapConfig()
    pools: GeneratePools = GeneratePools()
    pool: EvaluatePool = Field(EvaluatePool(), description="actors that extract features")
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """Figures with intervals of every point, the pins, and the page's path."""
        from jobs.samples_page import point_json, point_line, write_page
        from ldm.checkpoint import read_info
        from pipelines.evaluate.samples import Generation, measure_point

        info = read_info(self.checkpoint)
        requests = self._requests(info)
        swept = [
            [replace(request, guidance=guidance, num_inference_steps=steps) for request in requests]
            for guidance, steps in product(self.guidance, self.steps)
        ]
        vae = check(self.checkpoint, [at[index] for at in swept for index in (0, -1)], self.vae)
        made_by = Generation(self.checkpoint, vae, self.pools)
        preprocess, pins = self._preprocess(info, vae), self._pins(info, vae, requests)
        with connected(self.cluster):
            reference = self._reference(preprocess)
            points = []
            for at in swept:
                points.append(
                    measure_point(made_by, at, reference, self.pool, self.bootstrap, keep=self.keep)
                )
                print(point_line(points[-1]), flush=True)
            best = min(range(len(points)), key=lambda index: points[index].comparison.fid.value)
            groups = self._groups(made_by, points[best], swept[best], reference)
        pins = {
            "reference images": str(len(reference.images.digests)),
            "reference sha256": reference.images.digest,
            **pins,
        }
        write_page(
            self.page,
            title=f"{self.num_images} images of {self.checkpoint}",
            points=points,
            best=points[best],
            groups=groups,
            pins=pins,
            rejected=reference.images.rejected,
            level=self.bootstrap.level,
        )
        print(f"report: {self.page}")
        return {
            "points": [point_json(point) for point in points],
            "num_images": self.num_images,
            "num_reference": len(reference.images.digests),
            "rejected": [rejected._asdict() for rejected in reference.images.rejected],
            "pins": pins,
            "page": str(self.page),
        }

    def _requests(self, info: "CheckpointInfo") -> list[Request]:
        """One for every image, at the first point of the sweep."""
        scheduler = scheduler_of(self.checkpoint, self.scheduler)
        if not info.class_names and any(guidance != 1 for guidance in self.guidance):
            raise UserError(
                f"guidance {max(self.guidance):g} for a model without classes", do="leave --guidance out"
            )
        labels = [i % len(info.class_names) if info.class_names else None for i in range(self.num_images)]
        return [
            Request(label, self.seed + index, self.guidance[0], self.steps[0], scheduler)
            for index, label in enumerate(labels)
        ]

    def _preprocess(self, info: "CheckpointInfo", vae: str) -> Preprocess:
        """The reference's preprocessing at the size of the checkpoint's images."""
        from ldm.autoencoder import load

        _, rows, columns = info.latent_shape
        size_px, given = rows * load(vae).f, self.preprocess
        if rows != columns or given.buckets or given.crop == "none":
            raise UserError(
                f"reference images of another shape than the samples ({rows}×{columns} latents)",
                allowed="a checkpoint of square images, crop center or random without buckets",
            )
        if "sizes_px" in given.model_fields_set and given.sizes_px != (size_px,):
            asked = ",".join(str(size) for size in given.sizes_px)
            raise UserError(f"--preprocess.sizes-px is {asked}", allowed=f"{size_px}, the checkpoint's")
        return given.model_copy(update={"sizes_px": (size_px,)})

    def _reference(self, preprocess: Preprocess) -> "Reference":
        from pipelines.evaluate import shard_set
        from pipelines.evaluate.samples import Reference

        # Workers have another working directory: a file's path becomes absolute.
        path = Path(self.extractor).expanduser()
        extractor = str(path.resolve()) if path.is_file() else self.extractor
        images = shard_set(self.reference, preprocess, extractor, self.pool, keep=self.keep)
        return Reference(images, self.reference, preprocess, extractor)

    def _groups(
        self, made_by: "Generation", point: "SweepPoint", requests: list[Request], reference: "Reference"
    ) -> "dict[str, list[Beside]]":
        """The samples furthest from any reference image, and those in the middle of that order."""
        from pipelines.evaluate.samples import beside_nearest

        middle = max((len(point.nearest) - self.shown) // 2, 0)
        worst, median = point.nearest[: self.shown], point.nearest[middle : middle + self.shown]
        shown = beside_nearest(made_by, requests, reference, [*worst, *median])
        return {"Worst": shown[: len(worst)], "Median": shown[len(worst) :]}

    def _pins(self, info: "CheckpointInfo", vae: str, requests: list[Request]) -> dict[str, str]:
        """Everything known before Ray is started; what can be refused is refused here."""
        from jobs.evaluation_view import extractor_pins, folder_sha256, preprocess_pins, protocol_pins
        from ldm.comparison import NEIGHBOURS
        from ldm.features import load_extractor
        from pipelines.shards import list_shards

        list_shards(self.reference)
        extractor = load_extractor(self.extractor)
        classes = f"{len(info.class_names)} in turn" if info.class_names else "none"
        return {
            **preprocess_pins(self._preprocess(info, vae)),
            "generated images": f"{self.num_images} at every point, seeds {requests[0].seed} to "
            f"{requests[-1].seed}, classes: {classes}",
            "scheduler": requests[0].scheduler,
            "checkpoint": f"{self.checkpoint}, step {info.step}",
            "U-Net sha256": folder_sha256(self.checkpoint / "unet"),
            "VAE": vae,
            "VAE sha256": info.vae_fingerprint,
            **extractor_pins(extractor, self.keep),
            "precision and recall": f"{NEIGHBOURS} nearest neighbours, of kept images",
            **protocol_pins(self.bootstrap, ("torch", "diffusers", "torch-fidelity", "pillow")),
        }
