"""ENCODE with an encoder that only waits: what everything around the VAE needs, in memory and in time.

usage: python -m jobs.bench.emulated SHARDS OUT SIZE_PX
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from jobs.cluster import ClusterConfig, connected
from ldm.preprocess import Preprocess
from pipelines.encode.pools import ActorPool, TaskPool
from pipelines.encode.report import EncodeSummary, UnitReport

__all__ = ["encode_emulated", "measure_ramp"]

F = 8
GPUS = 8
UNIT_SIZE = 16
# On two cores, a worker process takes 2 s of a core to start: as few as will do.
ONE_READER = TaskPool(num_cpus=0.25, max_size=1)
TWO_DECODERS = TaskPool(num_cpus=0.5, max_size=2)


def encode_emulated(
    shards: Path,
    out: Path,
    size_px: int,
    unit_size: int,
    pool: ActorPool,
    *,
    seconds_per_image: float = 0.0,
    log: Path | None = None,
    read_pool: TaskPool = ONE_READER,
    decode_pool: TaskPool = TWO_DECODERS,
    subcluster: str | None = None,
    watch: Callable[[UnitReport], None] = lambda report: None,
) -> EncodeSummary:
    """Encode shards with `EmulatedEncoder`s, on the connected cluster."""
    from pipelines.dataset import LatentDataset
    from pipelines.dataset_records import DatasetHeader
    from pipelines.encode.backlog import find_backlog
    from pipelines.encode.decode import Judge
    from pipelines.encode.emulated import EmulatedEncoder
    from pipelines.encode.pipeline import ActorStage, encode
    from pipelines.shards import list_shards

    preprocess = Preprocess(sizes_px=(size_px,))
    header = DatasetHeader(
        vae="emulated", vae_fingerprint="", f=F, channels=3, preprocess=preprocess, unit_size=unit_size
    )
    dataset = LatentDataset.create_or_check(out, header)
    arguments = {"f": F, "seconds_per_image": seconds_per_image, "log": None if log is None else str(log)}
    return encode(
        dataset,
        find_backlog(list_shards(shards), dataset),
        Judge(preprocess),
        read_pool=read_pool,
        decode_pool=decode_pool,
        encoder=ActorStage(EmulatedEncoder, arguments, pool),
        subcluster=subcluster,
        watch=watch,
    )


def measure_ramp(shards: Path, out: Path, size_px: int, seconds_per_image: float) -> dict[str, float]:
    """A pool of 1 to 8 actors with a logical GPU each, on a cluster of its own.

    ramp_s: from the call of ``encode`` until eight actors are at work at the same time. release_s: from
    the end of the last unit until all GPUs are free again.
    """
    log = out.with_suffix(".log")
    pool = ActorPool(num_cpus=0.25, num_gpus=1, min_size=1, max_size=GPUS)
    with connected(ClusterConfig(num_cpus=8, num_gpus=GPUS)):
        start_s = time.monotonic()
        encode_emulated(shards, out, size_px, UNIT_SIZE, pool, seconds_per_image=seconds_per_image, log=log)
        while _free_gpus() < GPUS:
            time.sleep(0.05)
        free_s = time.monotonic()
    lines = map(str.split, log.read_text().splitlines())
    begun = [(float(at), pid) for at, pid, event, _ in lines if event == "begun"]
    unit_s = UNIT_SIZE * seconds_per_image
    # At the beginning of a unit, who else is in the middle of one?
    busy = {at: len({pid for began, pid in begun if began <= at < began + unit_s}) for at, _ in begun}
    all_busy_s = min((at for at, actors in busy.items() if actors == GPUS), default=float("inf"))
    last_end_s = max(at for at, _ in begun) + unit_s
    return {"ramp_s": all_busy_s - start_s, "release_s": free_s - last_end_s}


def _free_gpus() -> float:
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]  # Ray's own
    return free.get("GPU", 0.0)


if __name__ == "__main__":
    source, target, side = sys.argv[1:]
    # Pages of the object store that were ever used stay resident: a small one has used all of them soon.
    with connected(ClusterConfig(num_cpus=4, object_store_memory_bytes=128_000_000)):
        two = ActorPool(num_cpus=0.5, min_size=2, max_size=2)
        print(encode_emulated(Path(source), Path(target), int(side), 64, two).rows)
