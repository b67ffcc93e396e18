"""One of fifty shards edited and one added: only those two are encoded, and the dataset is proved."""

from collections.abc import Callable
from pathlib import Path

from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader
from pipelines.encode.backlog import find_backlog
from pipelines.encode.decode import Judge
from pipelines.encode.emulated import EmulatedEncoder
from pipelines.encode.pipeline import ActorStage, encode
from pipelines.encode.pools import ActorPool, TaskPool
from pipelines.encode.report import EncodeSummary
from pipelines.shards import Sample, list_shards, write_tar
from pipelines.verify import verify

PREPROCESS = Preprocess(sizes_px=(32,))
NUM_SHARDS, SAMPLES = 50, 4


def run(folder: Path) -> EncodeSummary:
    header = DatasetHeader(
        vae="", vae_fingerprint="", f=8, channels=3, preprocess=PREPROCESS, unit_size=SAMPLES
    )
    dataset = LatentDataset.create_or_check(folder / "out", header)
    return encode(
        dataset,
        find_backlog(list_shards(folder / "in"), dataset),
        Judge(PREPROCESS),
        decode_pool=TaskPool(num_cpus=0.5),
        encoder=ActorStage(EmulatedEncoder, {"f": 8}, ActorPool(num_cpus=0.5)),
    )


def test_one_of_fifty_edited_and_one_added(
    tmp_path: Path, photo: Callable[[int], bytes], ray_cluster: None
) -> None:
    (tmp_path / "in").mkdir()

    def write(shard: int, first: int, prefix: str) -> set[str]:
        keys = [f"{prefix}{shard}-{i}" for i in range(SAMPLES)]
        samples = [Sample(key, photo(first + i)) for i, key in enumerate(keys)]
        write_tar(tmp_path / f"in/s{shard:02d}.tar", samples)
        return set(keys)

    kept = [write(shard, shard, "k") for shard in range(NUM_SHARDS)]
    assert run(tmp_path).units_done == NUM_SHARDS
    kept[7] = write(7, 100, "edited")
    kept.append(write(NUM_SHARDS, 200, "added"))
    summary = run(tmp_path)
    assert (summary.units_done, summary.units_skipped) == (2, NUM_SHARDS - 1)
    assert (summary.retired_shards, summary.rows) == (("s07",), 2 * SAMPLES)
    dataset = LatentDataset.open(tmp_path / "out")
    proof = verify(dataset)
    assert not proof.findings.counts
    assert (proof.units, proof.rows) == (NUM_SHARDS + 1, SAMPLES * (NUM_SHARDS + 1))
