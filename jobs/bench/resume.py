"""What it costs to find that nothing is left to do."""

from itertools import islice
from pathlib import Path

from jobs.bench.photos import crops
from jobs.bench.processes import Measured, run_measured
from ldm.preprocess import Preprocess
from ldm.vae_identity import identify
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import Commit, DatasetHeader
from pipelines.shards import list_shards, write_tar
from pipelines.unit_ids import unit_id

__all__ = ["measure_resume"]

SIZE_PX = 64
SHARDS = 250
VAE = "f8"


def measure_resume(folder: Path, num_units: int) -> Measured:
    """The whole command `ldm encode` on a dataset in which ``num_units`` units are committed already."""
    source, out = folder / "shards", folder / "latents"
    source.mkdir(parents=True)
    (sample,) = islice(crops(SIZE_PX), 1)
    for number in range(SHARDS):
        write_tar(source / f"s{number:04d}.tar", [sample])
    _commit_all(source, out, num_units // SHARDS)
    command = ["-m", "jobs.cli", "encode", str(source), str(out), "--vae", VAE]
    measured = run_measured([*command, "--preprocess.sizes-px", str(SIZE_PX), "--json"], with_memory=True)
    if f'"units_skipped":{num_units}' not in measured.output:
        raise RuntimeError(f"the dataset was not found complete: {measured.output[-500:]}")
    return measured


def _commit_all(source: Path, out: Path, units_per_shard: int) -> None:
    """Commits as `ldm encode` would have made them, of units without rows."""
    vae = identify(VAE)
    header = DatasetHeader(
        vae=VAE,
        vae_fingerprint=vae.fingerprint,
        f=vae.f,
        channels=vae.channels,
        preprocess=Preprocess(sizes_px=(SIZE_PX,)),
        unit_size=256,
    )
    dataset = LatentDataset.create_or_check(out, header)
    (out / "commits").mkdir()
    for shard in list_shards(source):
        for index in range(units_per_shard):
            commit = Commit(
                unit=unit_id(shard, header.unit_size, index),
                shard=shard.url,
                shard_version=shard.version,
                index=index,
                is_final=index == units_per_shard - 1,
                num_inputs=0,
                num_rows=0,
                num_quarantined=0,
                quarantined={},
                files=(),
                quarantine_file=None,
                stats=None,
            )
            (out / "commits" / f"{commit.unit}.json").write_bytes(commit.json_bytes())
    dataset.write_derived()
