"""ENCODE: shards → units → pixels → moments → latent dataset, as one streaming Ray Data job.

    read tasks ──► decode tasks ──► VAE actors ──► write tasks
    1 per shard    CPU               own CPUs/GPUs   data, quarantine, commit

Every stage handles whole units, one row each. Nothing is kept in memory but the units in flight.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy

from ldm.errors import UserError
from ldm.images import Preprocess
from pipelines.dataset import DatasetHeader, LatentDataset
from pipelines.encode.backlog import Backlog
from pipelines.encode.decode import decode_unit
from pipelines.encode.encoder import UnitEncoder
from pipelines.encode.pools import ActorPool, TaskPool
from pipelines.encode.rows import ReadUnit
from pipelines.encode.sink import LatentSink, UnitReport
from pipelines.encode.source import ShardSource

__all__ = ["EncodeSummary", "EncoderSummary", "encode", "encoded_units", "require_resources"]

# Reading and writing wait for the store most of the time.
READ_CPUS = 0.25
WRITE_CPUS = 0.25
# A decode worker is replaced from time to time, since what C libraries do with hostile images is not
# to be relied upon. That its options differ from its neighbours' also keeps Ray Data from fusing it with
# them, which would decode inside the VAE actors, or one shard on one CPU.
UNITS_PER_DECODE_WORKER = 1000


@dataclass(frozen=True)
class EncoderSummary:
    """One encoder actor: where it ran, what it did, how many seconds it encoded."""

    node: str
    pid: int
    device: str
    units: int
    images: int
    busy_s: float


@dataclass(frozen=True)
class EncodeSummary:
    """What one run did. images and bytes are those of this run, quarantined counts by reason."""

    images: int
    quarantined: dict[str, int]
    units_done: int
    units_skipped: int
    seconds: float
    images_per_s: float
    bytes_per_image: float
    encoders: tuple[EncoderSummary, ...]


def encode(
    dataset: LatentDataset,
    backlog: Backlog,
    *,
    vae: str,
    micro_batch: int,
    decode_pool: TaskPool,
    encoder_pool: ActorPool,
) -> EncodeSummary:
    """Encode what is in the backlog, then rebuild what is derived from the commits.

    vae: as `ldm.autoencoder.load` takes it, readable on every node. micro_batch: images per VAE
    call. Needs a connected Ray. Exceptions of a stage arrive inside Ray's own, chained.
    """
    start = time.perf_counter()
    sink = LatentSink(dataset)
    if backlog.shards:
        units = encoded_units(dataset.header, backlog, vae, micro_batch, decode_pool, encoder_pool)
        units.write_datasink(sink, ray_remote_args={"num_cpus": WRITE_CPUS})
    dataset.write_derived()
    return _summary(sink.reports, backlog.num_committed, time.perf_counter() - start)


def require_resources(decode_pool: TaskPool, encoder_pool: ActorPool) -> None:
    """UserError where the connected cluster can never run the smallest pools at once; it would hang.

    Not for a cluster that grows on demand: what it will have is not known.
    """
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's own
    cpus = encoder_pool.min_size * encoder_pool.num_cpus + max(decode_pool.num_cpus, READ_CPUS, WRITE_CPUS)
    gpus = encoder_pool.min_size * encoder_pool.num_gpus
    for name, need, option in (("CPU", cpus, "num-cpus"), ("GPU", gpus, "num-gpus")):
        if need > have.get(name, 0.0):
            raise UserError(
                f"encoding needs {need:g} {name}s at least, and the cluster has {have.get(name, 0.0):g}",
                do=f"lower --encoder.{option} or --encoder.min-size, or use a larger cluster",
            )


def encoded_units(
    header: DatasetHeader,
    backlog: Backlog,
    vae: str,
    micro_batch: int,
    decode_pool: TaskPool,
    encoder_pool: ActorPool,
) -> Dataset:
    """The stages up to the writing one, not run yet: rows of `EncodedUnit`."""
    with DataContext.current(_context()):
        units = ray.data.read_datasource(
            ShardSource(backlog.shards, header.unit_size),
            num_cpus=READ_CPUS,
            # As many as there are read tasks: with more, Ray Data would cut every output block further.
            override_num_blocks=len(backlog.shards),
        )
        decoded = units.map_batches(
            _decode_row,
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=decode_pool.max_size),
            num_cpus=decode_pool.num_cpus,
            max_calls=UNITS_PER_DECODE_WORKER,
            fn_kwargs={"preprocess": header.preprocess, "class_names": header.class_names},
        )
        encoded: Dataset = decoded.map_batches(
            UnitEncoder,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=encoder_pool.min_size, max_size=encoder_pool.max_size),
            num_cpus=encoder_pool.num_cpus,
            num_gpus=encoder_pool.num_gpus,
            fn_constructor_kwargs={
                "vae": vae,
                "fingerprint": header.vae_fingerprint,
                "micro_batch": micro_batch,
                "num_threads": max(1, math.floor(encoder_pool.num_cpus)),
            },
        )
        return encoded


def _context() -> DataContext:
    context = DataContext.get_current().copy()
    # One row per block: a unit moves on as soon as it is there, rather than when 128 MiB of them are.
    context.target_max_block_size = 1
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    return context


def _decode_row(table: pa.Table, preprocess: Preprocess, class_names: Sequence[str] | None) -> pa.Table:
    return decode_unit(ReadUnit.from_table(table).content, preprocess, class_names).to_table()


def _summary(reports: Sequence[UnitReport], num_committed: int, seconds: float) -> EncodeSummary:
    images = sum(report.rows for report in reports)
    quarantined: Counter[str] = Counter()
    for report in reports:
        quarantined.update(report.quarantined)
    return EncodeSummary(
        images=images,
        quarantined=dict(sorted(quarantined.items())),
        units_done=len(reports),
        units_skipped=num_committed,
        seconds=seconds,
        images_per_s=images / seconds,
        bytes_per_image=sum(report.data_bytes for report in reports) / max(images, 1),
        encoders=tuple(_encoders(reports)),
    )


def _encoders(reports: Sequence[UnitReport]) -> Iterable[EncoderSummary]:
    actors = sorted({(r.trace.node, r.trace.pid, r.trace.device) for r in reports})
    for actor in actors:
        own = [r for r in reports if (r.trace.node, r.trace.pid, r.trace.device) == actor]
        yield EncoderSummary(*actor, len(own), sum(r.rows for r in own), sum(r.trace.seconds for r in own))
