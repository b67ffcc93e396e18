"""``ldm train``: train a U-Net on a latent dataset."""

import shutil
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig, save_resolved
from jobs.output_folder import require_new_folder
from pipelines.train.unet import UnetTraining

__all__ = ["TrainJob"]


class TrainJob(JobConfig):
    """Train a U-Net on the latent dataset DATASET and write a checkpoint to OUT.

    OUT gets the folders of a diffusers pipeline (unet/ holds the EMA weights) and ldm.json.
    """

    dataset: CliPositionalArg[str] = Field(description="latent dataset written by ldm encode")
    out: CliPositionalArg[Path] = Field(description="new folder for the checkpoint")
    vae: str | None = Field(None, description="VAE that will decode; refused if it is not the dataset's")
    train: UnetTraining = UnetTraining()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """Last step's metrics and ``out``."""
        from pipelines.dataset import LatentDataset
        from pipelines.train.unet import fit, plan

        require_new_folder(self.out)
        dataset = LatentDataset.open(self.dataset)
        info = plan(dataset, self.train, self.vae)
        with connected(self.cluster, worker_logs=True):
            result = fit(dataset, self.train, info, self.out)
            assert result.checkpoint is not None
            assert result.metrics is not None
            with result.checkpoint.as_directory() as folder:
                shutil.copytree(folder, self.out, dirs_exist_ok=True)
        save_resolved(self, self.out / "train.yaml")
        return {"out": str(self.out), **result.metrics}
