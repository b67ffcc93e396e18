"""``ldm train``: train a U-Net on a latent dataset."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig, save_resolved
from jobs.output_folder import require_new_folder
from ldm.errors import UserError
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

        from fsspec.implementations.local import LocalFileSystem

        from ldm.checkpoint import INFO_FILE
        from pipelines.dataset import LatentDataset
        from pipelines.lease import writer_lease
        from pipelines.train.plan import plan
        from pipelines.train.run_record import check_resume, record_of, write_record
        from pipelines.train.snapshots import find_snapshot
        from pipelines.train.unet import METRICS_FILE, SNAPSHOTS, export, fit

        stored = self._stored_record()
        dataset = LatentDataset.open(self.dataset)
        info = plan(dataset, self.train, self.vae)
        record = record_of(dataset, self.train, info)
        if stored is not None:
            check_resume(self.out, stored, record, self.allow)
        self._make_folder()
        with writer_lease(LocalFileSystem(), str(self.out.absolute()), str(self.out)):
            found = find_snapshot(self.out / SNAPSHOTS)
            for skipped in found.skipped:
                print(f"skipped a snapshot, {skipped}")
            if stored is not None:
                print(
                    f"resuming from step {found.step}" if found.step else "no snapshot: from step 0",
                    flush=True,
                )
            write_record(self.out, record)
            if found.step < self.train.steps:
                with connected(self.cluster, worker_logs=True):
                    fit(dataset, self.train, info, self.out)
            if not (self.out / INFO_FILE).exists() or found.step < self.train.steps:
                export(self.out, self.train, info)
        save_resolved(self, self.out / "train.yaml")
        last = (self.out / METRICS_FILE).read_text().splitlines()[-1]
        return {"out": str(self.out), **json.loads(last)}

    def _stored_record(self) -> "dict[str, object] | None":
        from pipelines.train.run_record import read_record

        stored = read_record(self.out) if self.out.is_dir() else None
        if stored is None:
            require_new_folder(self.out)
        return stored

    def _make_folder(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot write to {self.out}: {error.strerror}"
            raise UserError(problem, do="give another folder") from error
