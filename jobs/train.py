"""``ldm train``: train a U-Net on a latent dataset."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig, save_resolved
from jobs.continued_run import continued, stored_record
from pipelines.train.config import UnetTraining

__all__ = ["TrainJob"]


class TrainJob(JobConfig):
    """Train a U-Net on the latent dataset DATASET and write a checkpoint to OUT.

    OUT gets the folders of a diffusers pipeline (unet/ holds the EMA weights) and ldm.json. Run it again
    after any interruption: it goes on from the newest valid snapshot.
    """

    dataset: CliPositionalArg[str] = Field(description="latent dataset written by ldm encode")
    out: CliPositionalArg[Path] = Field(description="folder for snapshots and checkpoint, new or of this run")
    vae: str | None = Field(None, description="VAE that will decode; refused if it is not the dataset's")
    allow: tuple[str, ...] = Field((), description="settings that may differ from those the run began with")
    train: UnetTraining = UnetTraining()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """Last step's metrics and ``out``."""
        import json

        from ldm.checkpoint import INFO_FILE
        from pipelines.dataset import LatentDataset
        from pipelines.train.plan import plan
        from pipelines.train.run_record import record_of
        from pipelines.train.unet import METRICS_FILE, export, fit

        stored = stored_record(self.out)
        dataset = LatentDataset.open(self.dataset)
        info = plan(dataset, self.train, self.vae)
        record = record_of(dataset, self.train, info)
        with continued(self.out, stored, record, self.allow) as step:
            if step < self.train.steps:
                with connected(self.cluster, worker_logs=True):
                    fit(dataset, self.train, info, self.out)
            if not (self.out / INFO_FILE).exists() or step < self.train.steps:
                export(self.out, self.train, info)
        save_resolved(self, self.out / "train.yaml")
        last = (self.out / METRICS_FILE).read_text().splitlines()[-1]
        return {"out": str(self.out), **json.loads(last)}
