"""``ldm train-vae``: train a VAE on image shards and export it in diffusers' format."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig, save_resolved
from jobs.output_folder import require_new_folder
from pipelines.train.vae import VaeTraining


class TrainVaeJob(JobConfig):
    """Train a VAE on the image shards in INPUT and write it to OUT in diffusers' format."""

    input: CliPositionalArg[str] = Field(description="folder or URL of .tar shards, or one .tar")
    out: CliPositionalArg[Path] = Field(description="new folder for the VAE")
    train: VaeTraining = VaeTraining()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """``out``, f and fingerprint of the VAE, and the last metrics; also in OUT/metrics.json."""
        import json

        from ldm import autoencoder
        from pipelines.train.vae import check, export, fit

        require_new_folder(self.out)
        check(self.input, self.train)
        with connected(self.cluster, worker_logs=True):
            result = fit(self.input, self.train, self.out)
            assert result.checkpoint is not None
            assert result.metrics is not None
            with result.checkpoint.as_directory() as folder:
                export(Path(folder) / "vae", self.out, self.train.dtype)
        save_resolved(self, self.out / "train.yaml")
        vae = autoencoder.load(self.out)
        record = {"f": vae.f, "fingerprint": vae.fingerprint, **result.metrics}
        (self.out / "metrics.json").write_text(json.dumps(record, indent=1) + "\n")
        return {"out": str(self.out), **record}
