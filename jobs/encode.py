"""``ldm encode``: image shards → latent dataset."""

from dataclasses import asdict

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from ldm.images import Preprocess
from pipelines.encode.pools import ActorPool, TaskPool

__all__ = ["EncodeJob"]


class EncodeJob(JobConfig):
    """Encode image shards into a latent dataset.

    Run it again after any interruption: it goes on where it was. Inputs that cannot be encoded are
    in OUTPUT/quarantine, each with its reason.
    """

    input: CliPositionalArg[str] = Field(description="folder or URL of WebDataset tars, or one tar")
    output: CliPositionalArg[str] = Field(description="folder or URL of the latent dataset")
    vae: str = Field("f8", description="default model (f4, f8, f16), diffusers folder, URL or hub id")
    preprocess: Preprocess = Preprocess()
    unit_size: PositiveInt = Field(256, description="samples that are committed together")
    micro_batch: PositiveInt = Field(16, description="images in one call of the VAE")
    decode: TaskPool = TaskPool()
    encoder: ActorPool = ActorPool()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """Encode what is not committed yet; returns what `pipelines.encode.pipeline.EncodeSummary` holds."""
        from ldm.autoencoder import load
        from pipelines.class_names import read_class_names
        from pipelines.dataset import DatasetHeader, LatentDataset
        from pipelines.encode.backlog import find_backlog, require_image
        from pipelines.encode.pipeline import encode, require_resources
        from pipelines.shards import list_shards
        from pipelines.vae_source import on_every_node

        # Everything that the user can have got wrong is found before anything is written.
        autoencoder = load(self.vae)
        autoencoder.check_size(self.preprocess.size_px, self.preprocess.size_px)
        shards = list_shards(self.input)
        require_image(shards, self.preprocess)
        header = DatasetHeader(
            vae=self.vae,
            vae_fingerprint=autoencoder.fingerprint,
            f=autoencoder.f,
            channels=autoencoder.channels,
            preprocess=self.preprocess,
            unit_size=self.unit_size,
            class_names=read_class_names(self.input),
        )
        with connected(self.cluster):
            if self.cluster.address is None:
                require_resources(self.decode, self.encoder)
            dataset = LatentDataset.create_or_check(self.output, header)
            summary = encode(
                dataset,
                find_backlog(shards, dataset),
                vae=on_every_node(self.vae),
                micro_batch=self.micro_batch,
                decode_pool=self.decode,
                encoder_pool=self.encoder,
            )
        print(
            f"{summary.images} images in {summary.seconds:.1f} s ({summary.images_per_s:.1f} images/s), "
            f"{summary.bytes_per_image:.0f} bytes each; {summary.units_done} units done, "
            f"{summary.units_skipped} skipped; quarantined: {_counts(summary.quarantined)}"
        )
        return asdict(summary)


def _counts(quarantined: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in quarantined.items()) or "none"
