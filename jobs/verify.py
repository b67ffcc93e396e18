"""``ldm verify``: prove that a latent dataset is whole, or say what is wrong with it."""

import sys
import time
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from ldm.errors import LdmError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.dataset import LatentDataset
    from pipelines.shards import Shard
    from pipelines.verify import Findings

__all__ = ["UnsoundDatasetError", "VerifyJob"]

PROGRESS_EVERY_S = 5.0


class UnsoundDatasetError(LdmError):
    """A latent dataset is not what its commits say."""


class VerifyJob(JobConfig):
    """Check every file, row, key and statistic of a latent dataset against its commits.

    Exit status 0 where all is sound, 1 where it is not, with one line for each finding.
    """

    dataset: CliPositionalArg[str] = Field(description="folder or URL of a latent dataset")
    input: str | None = Field(None, description="also account for every shard of this input")
    deep: bool = Field(False, description="also encode a share of the units again; needs --input")
    share: float = Field(0.01, gt=0, le=1, description="of the units, with --deep; at least one")
    seed: int = Field(0, description="of the choice of units")
    vae: str | None = Field(None, description="VAE of --deep; without it the dataset's own")
    repair: bool = Field(False, description="first write stats.json and manifest.parquet again")

    def run(self) -> dict[str, object]:
        """units, rows, files, bytes; findings by kind. UnsoundDatasetError where there are any."""
        from pipelines.dataset import LatentDataset
        from pipelines.shards import list_shards
        from pipelines.verify import verify

        if self.deep and self.input is None:
            raise UserError("--deep needs the input that was encoded", do="give --input")
        dataset = LatentDataset.open(self.dataset)
        shards = None if self.input is None else list_shards(self.input, dataset.header.input)
        if self.repair:
            dataset.write_derived()
        proof = verify(dataset, _Progress())
        if shards is not None:
            self._check_input(dataset, shards, proof.findings)
        for line in proof.findings.lines():
            print(line)
        print(f"{proof.rows} rows of {proof.units} units in {proof.files} files, {proof.bytes} bytes read")
        if number := proof.findings.counts.total():
            raise UnsoundDatasetError(f"{self.dataset}: {number} findings")
        return {"units": proof.units, "rows": proof.rows, "files": proof.files, "bytes": proof.bytes}

    def _check_input(self, dataset: "LatentDataset", shards: "Sequence[Shard]", findings: "Findings") -> None:
        from pipelines.encode.backlog import find_backlog

        backlog = find_backlog(shards, dataset)
        for work in backlog.shards:
            findings.add("not encoded", f"{work.shard.url}, or not to its end")
        for replacement in backlog.replacements:
            findings.add("edited", f"shard {replacement.shard_name} has changed since it was encoded")
        for name in backlog.removed:
            print(f"note: shard {name} is not in the input any more; its rows stay")
        if self.deep:
            from ldm.autoencoder import load
            from ldm.checkpoint import check_vae
            from pipelines.encode.recheck import chosen_units, recheck

            vae = load(self.vae or dataset.header.vae)
            check_vae(vae, dataset.header.vae_fingerprint, f"latent dataset {self.dataset}")
            units = chosen_units(dataset.units(), self.share, self.seed)
            for line in recheck(dataset, units, shards, vae):
                findings.add("not reproduced", line)
            print(f"{len(units)} units encoded again")


class _Progress:
    """A line on stderr now and then, where it takes long."""

    def __init__(self) -> None:
        self.last_s = time.monotonic()

    def __call__(self, units: int) -> None:
        if time.monotonic() - self.last_s > PROGRESS_EVERY_S:
            self.last_s = time.monotonic()
            print(f"{units} units checked", file=sys.stderr, flush=True)
