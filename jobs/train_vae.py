"""``ldm train-vae``: train a VAE on image shards and export it in diffusers' format."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig, save_resolved
from jobs.continued_run import continued, stored_record
from pipelines.train.vae_config import VaeTraining

# Of a finished run; written last.
RESULT_FILE = "metrics.json"


class TrainVaeJob(JobConfig):
    """Train a VAE on the image shards in INPUT and write it to OUT in diffusers' format.

    Run it again after any interruption: it goes on from the newest valid snapshot in OUT/snapshots.
    """

    input: CliPositionalArg[str] = Field(description="folder or URL of .tar shards, or one .tar")
    out: CliPositionalArg[Path] = Field(description="folder for snapshots and the VAE, new or of this run")
    allow: tuple[str, ...] = Field((), description="settings that may differ from those the run began with")
    train: VaeTraining = VaeTraining()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """``out``, f and fingerprint of the VAE, and the last metrics; also in OUT/metrics.json."""
        from pipelines.train.vae import check, export, fit, record_of

        stored = stored_record(self.out)
        check(self.input, self.train)
        record = record_of(self.input, self.train)
        with continued(self.out, stored, record, self.allow) as step:
            if step < self.train.steps:
                with connected(self.cluster, worker_logs=True):
                    fit(self.input, self.train, self.out)
            result = self._result()
            if result is None or (result["step"], result["dtype"]) != (self.train.steps, self.train.dtype):
                export(self.out, self.train)
                save_resolved(self, self.out / "train.yaml")
                result = self._write_result(record)
        return {"out": str(self.out), **result}

    def _result(self) -> dict[str, object] | None:
        import json

        file = self.out / RESULT_FILE
        return dict(json.loads(file.read_text())) if file.exists() else None

    def _write_result(self, record: dict[str, object]) -> dict[str, object]:
        import json

        from fsspec.implementations.local import LocalFileSystem

        from ldm import autoencoder
        from pipelines.publish import publish
        from pipelines.train.metrics_log import METRICS_FILE

        vae = autoencoder.load(str(self.out))
        last = json.loads((self.out / METRICS_FILE).read_text().splitlines()[-1])
        names = ("perceptual.extractor", "perceptual.fingerprint")
        extractor = {name.replace(".", "_"): record[name] for name in names if name in record}
        result = {"f": vae.f, "fingerprint": vae.fingerprint, "dtype": self.train.dtype, **last, **extractor}
        data = json.dumps(result, indent=1).encode() + b"\n"
        publish(LocalFileSystem(), str(self.out / RESULT_FILE), data)
        return result
