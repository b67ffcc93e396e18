"""An input that kills its worker every time is left out after its second kill; the job goes on."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader
from pipelines.encode.attempts import Attempt
from pipelines.encode.backlog import find_backlog
from pipelines.encode.decode import Judge
from pipelines.encode.emulated import EmulatedEncoder
from pipelines.encode.pipeline import ActorStage, encode
from pipelines.encode.pools import ActorPool, TaskPool
from pipelines.encode.report import EncodeSummary
from pipelines.encode.rows import DecodedUnit, EncodedUnit
from pipelines.shards import Sample, list_shards, write_tar

pytestmark = pytest.mark.usefixtures("ray_cluster")

POISON = b"this image kills"


class PoisonedPreprocess(Preprocess):
    """Dies of some bytes as a C library would, and writes down that it did."""

    deaths: Path

    def views(self, data: bytes, key: str) -> list[NDArray[np.uint8]]:
        if data == POISON:
            with self.deaths.open("a") as file:
                file.write(f"{key}\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().views(data, key)


def run(
    folder: Path, samples: list[Sample], encoder: type[EmulatedEncoder] = EmulatedEncoder
) -> EncodeSummary:
    write_tar(folder / "in.tar", samples)
    preprocess = PoisonedPreprocess(sizes_px=(32,), deaths=folder / "deaths")
    header = DatasetHeader(
        vae="", vae_fingerprint="", f=8, channels=3, preprocess=Preprocess(sizes_px=(32,)), unit_size=8
    )
    dataset = LatentDataset.create_or_check(folder / "out", header)
    return encode(
        dataset,
        find_backlog(list_shards(folder / "in.tar"), dataset),
        Judge(preprocess),
        decode_pool=TaskPool(num_cpus=0.5),
        encoder=ActorStage(encoder, {"f": 8}, ActorPool(num_cpus=0.5)),
    )


def quarantined(folder: Path) -> list[tuple[str, str]]:
    tables = [pq.read_table(file) for file in sorted((folder / "out/quarantine").iterdir())]
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    return [(row["key"], row["reason"]) for row in rows]


def test_an_image_that_kills_its_decoder(tmp_path: Path, photo: Callable[[int], bytes]) -> None:
    good = [Sample(f"k{i}", photo(i)) for i in range(20)]
    summary = run(
        tmp_path, [*good[:5], Sample("bad", POISON), *good[5:18], Sample("bad2", POISON), *good[18:]]
    )
    assert (summary.rows, summary.quarantined) == (20, {"killed_worker": 2})
    assert quarantined(tmp_path) == [("bad", "killed_worker"), ("bad2", "killed_worker")]
    assert sorted((tmp_path / "deaths").read_text().split()) == ["bad", "bad", "bad2", "bad2"]


class MortalEncoder(EmulatedEncoder):
    """Dies in the middle of a unit, the first time."""

    def encode(self, decoded: DecodedUnit, this_attempt: Attempt) -> EncodedUnit:
        unit = decoded.unit
        marker = Path(unit.shard.url.removeprefix("file://")).parent / f"died-{unit.index}"
        if unit.index == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(decoded, this_attempt)


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path, photo: Callable[[int], bytes]) -> None:
    samples = [Sample(f"k{i}", photo(i)) for i in range(24)]
    summary = run(tmp_path, samples, MortalEncoder)
    assert (tmp_path / "died-1").exists()
    assert (summary.rows, summary.quarantined) == (24, {})
