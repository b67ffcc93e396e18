"""ENCODE: shards → units → pixels → latents → latent dataset, as one streaming Ray Data job.

    read tasks ──► (text actors) ──► decode tasks ──► VAE actors ──────────────────► driver
    1 per shard     own CPUs/GPUs     CPU              own CPUs/GPUs; data, commit     reports

Every stage handles whole units, one row each. Nothing is kept in memory but the units in flight.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy

from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader, TextRecord
from pipelines.encode.actors import CALLS_AT_ONCE, UnitEncoder, UnitTextEncoder
from pipelines.encode.attempts import Register, attempt, start_register
from pipelines.encode.backlog import Backlog
from pipelines.encode.bad_share import require_good_commits, require_good_share
from pipelines.encode.decode import Judge, decode_unit
from pipelines.encode.pools import ActorPool, EncoderPool, TaskPool, TextPool
from pipelines.encode.report import EncodeSummary, RunReport, UnitReport
from pipelines.encode.rows import ReadUnit
from pipelines.encode.source import ShardSource
from pipelines.text_config import TextConfig
from pipelines.unit_ids import parse_unit_id

__all__ = [
    "SUBCLUSTER_LABEL",
    "ActorStage",
    "TaskPools",
    "encode",
    "require_resources",
    "text_stage",
    "vae_stage",
    "written_units",
]

# Reading waits for the store most of the time.
READERS = TaskPool(num_cpus=0.25)
# A decode worker is replaced from time to time, since what C libraries do with hostile images is not
# to be relied upon. That its options differ from its neighbours' also keeps Ray Data from fusing it with
# them, which would decode inside the VAE actors, or one shard on one CPU.
UNITS_PER_DECODE_WORKER = 1000
# Of nodes; the one by which Ray Data knows whose nodes are its.
SUBCLUSTER_LABEL = "ray-subcluster"
# Before that many inputs, the share of bad ones says little.
MIN_INPUTS_TO_JUDGE = 1000


@dataclass(frozen=True)
class ActorStage:
    """A stage of actors: the class whose instances turn a row into a row, its arguments, its pool.

    The class also gets ``register``, the run's `Attempts` actor, and that of the encoder ``dataset``.
    """

    callable_class: type[Callable[[pa.Table], pa.Table]]
    arguments: Mapping[str, object]
    pool: ActorPool = field(default_factory=ActorPool)


class TaskPools(NamedTuple):
    """The stages of tasks."""

    read: TaskPool
    decode: TaskPool


def vae_stage(header: DatasetHeader, vae: str, pool: EncoderPool) -> ActorStage:
    """The VAE actors. vae: as `ldm.autoencoder.load` takes it, readable on every node."""
    arguments = {
        "vae": vae,
        "fingerprint": header.vae_fingerprint,
        "form": header.form,
        "pool": pool,
    }
    return ActorStage(UnitEncoder, arguments, pool)


def text_stage(config: TextConfig, record: TextRecord, pool: TextPool) -> ActorStage:
    """The text encoder's actors. config: its encoder as every node finds it."""
    arguments = {"config": config, "fingerprint": record.fingerprint, "pool": pool}
    return ActorStage(UnitTextEncoder, arguments, pool)


def encode(
    dataset: LatentDataset,
    backlog: Backlog,
    judge: Judge,
    *,
    decode_pool: TaskPool,
    encoder: ActorStage,
    text: ActorStage | None = None,
    read_pool: TaskPool = READERS,
    max_bad_share: float = 1.0,
    subcluster: str | None = None,
    watch: Callable[[UnitReport], None] = lambda report: None,
) -> EncodeSummary:
    """Encode what is in the backlog, then rebuild what is derived from the commits.

    subcluster: value of the label `SUBCLUSTER_LABEL` that nodes must have; None: nodes without it. watch:
    called for every unit once it is committed. UserError where more than ``max_bad_share`` of the inputs are
    bad; what is committed by then stays. Needs a connected Ray. Exceptions of a stage arrive inside Ray's
    own, chained.
    """
    start = time.perf_counter()
    run = RunReport()
    _pin_old_versions(dataset, backlog)
    if backlog.shards:
        pools = TaskPools(read_pool, decode_pool)
        for report in _reports(written_units(dataset, backlog, judge, pools, encoder, text, subcluster)):
            run.add(report)
            watch(report)
            if run.inputs >= MIN_INPUTS_TO_JUDGE:
                bad = run.quarantined.total()
                require_good_share(bad, run.inputs, max_bad_share, run.examples)
    _replace_versions(dataset, backlog, max_bad_share)
    if not dataset.is_derived_current():
        require_good_commits(dataset, dataset.commits(), max_bad_share)
        dataset.write_derived()
    return run.summary(
        seconds=time.perf_counter() - start,
        units_skipped=backlog.num_committed,
        retired_shards=[replacement.shard_name for replacement in backlog.replacements],
        removed_shards=backlog.removed,
    )


def _pin_old_versions(dataset: LatentDataset, backlog: Backlog) -> None:
    """Before a unit of a new version can be committed: the old one's rows are those that count."""
    known = dataset.current_families()
    for replacement in backlog.replacements:
        if replacement.shard_name not in known:
            dataset.set_current_family(replacement.shard_name, replacement.old)


def _replace_versions(dataset: LatentDataset, backlog: Backlog, max_bad_share: float) -> None:
    """Retire the old versions of edited shards, unless a new one is too bad to take their place."""
    for replacement in backlog.replacements:
        units = [unit for unit in dataset.committed_units() if parse_unit_id(unit)[1] == replacement.new]
        require_good_commits(dataset, dataset.commits(units), max_bad_share)
        dataset.set_current_family(replacement.shard_name, replacement.new)


def require_resources(decode_pool: TaskPool, *pools: ActorPool) -> None:
    """UserError where the connected cluster can never run the smallest pools at once; it would hang.

    Not for a cluster that grows on demand: what it will have is not known.
    """
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's own
    tasks = max(decode_pool.num_cpus, READERS.num_cpus)
    cpus = sum(pool.min_size * pool.num_cpus for pool in pools) + tasks
    gpus = sum(pool.min_size * pool.num_gpus for pool in pools)
    for name, need, option in (("CPU", cpus, "num-cpus"), ("GPU", gpus, "num-gpus")):
        if need > have.get(name, 0.0):
            raise UserError(
                f"encoding needs {need:g} {name}s at least, and the cluster has {have.get(name, 0.0):g}",
                do=f"lower --encoder.{option} or --encoder.min-size, or use a larger cluster",
            )


def written_units(
    dataset: LatentDataset,
    backlog: Backlog,
    judge: Judge,
    pools: TaskPools,
    encoder: ActorStage,
    text: ActorStage | None = None,
    subcluster: str | None = None,
) -> Dataset:
    """All stages, not run yet: rows of `UnitReport`."""
    with DataContext.current(_context(subcluster)):
        register = start_register()
        units = ray.data.read_datasource(
            ShardSource(backlog.shards, dataset.header.unit_size, dataset.header.input),
            num_cpus=pools.read.num_cpus,
            resources=pools.read.resources or None,
            concurrency=pools.read.max_size,
            # As many as there are read tasks: with more, Ray Data would cut every output block further.
            override_num_blocks=len(backlog.shards),
        )
        if text is not None:
            units = _through(units, text, {"register": register})
        decoded = units.map_batches(
            _decode_row,
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=pools.decode.max_size),
            num_cpus=pools.decode.num_cpus,
            resources=pools.decode.resources or None,
            max_calls=UNITS_PER_DECODE_WORKER,
            fn_kwargs={"judge": judge, "register": register},
        )
        return _through(decoded, encoder, {"dataset": dataset, "register": register}, CALLS_AT_ONCE)


def _through(
    units: Dataset, stage: ActorStage, of_run: Mapping[str, object], calls_at_once: int = 1
) -> Dataset:
    pool = stage.pool
    passed: Dataset = units.map_batches(
        stage.callable_class,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=pool.min_size,
            max_size=pool.max_size,
            max_concurrent_calls_per_actor=calls_at_once,
            enable_true_multi_threading=calls_at_once > 1,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        resources=pool.resources or None,
        accelerator_type=pool.accelerator_type,
        fn_constructor_kwargs={**stage.arguments, **of_run},
    )
    return passed


def _context(subcluster: str | None) -> DataContext:
    context = DataContext.get_current().copy()
    if subcluster is not None:
        # While a pool grows, Ray Data asks the autoscaler for GPUs of no kind, and one large node for
        # training can look better to that than several small ones. What is asked for carries this label.
        context.execution_options.label_selector = {SUBCLUSTER_LABEL: subcluster}
    # One row per block: a unit moves on as soon as it is there, rather than when 128 MiB of them are.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def _decode_row(table: pa.Table, judge: Judge, register: Register) -> pa.Table:
    read = ReadUnit.from_table(table)
    with attempt(register, "decode", read.content.unit.id) as this_attempt:
        return decode_unit(read.content, judge, this_attempt, read.embedded).to_table()


def _reports(written: Dataset) -> Iterator[UnitReport]:
    for table in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from UnitReport.of_table(table)
