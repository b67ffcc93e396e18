"""The same encode on 1, 2, 4 … nodes, each a raylet with a logical GPU, with an encoder that only waits."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from jobs.bench.cluster_encode import ClusterEncode
from jobs.bench.cluster_facts import steady_rate, whole_rate
from jobs.bench.emulated import ONE_READER, TWO_DECODERS
from jobs.bench.photos import write_shards
from jobs.bench.raylets import started_head, started_node
from jobs.listening import free_ports
from pipelines.encode.pools import ActorPool

__all__ = ["nodes_scaling", "ratios"]

SIZE_PX, UNIT_SIZE = 64, 16
# CPUs are counted, not had: all nodes share those of this machine.
NODE = {"CPU": 2, "GPU": 1}


def nodes_scaling(
    counts: Sequence[int], rounds: int, units_per_node: int, seconds_per_image: float
) -> dict[str, float]:
    """Images/s on each number of nodes ÷ that number times images/s on the first, which is to be 1.

    A cluster of its own for each; every other round backwards.
    """
    steady: dict[int, list[float]] = {count: [] for count in counts}
    whole: dict[int, list[float]] = {count: [] for count in counts}
    busy: dict[int, list[float]] = {count: [] for count in counts}
    with TemporaryDirectory(prefix="ldm-bench-") as name:
        folder = Path(name)
        for count in counts:
            # A shard a node, the same work for each.
            images = units_per_node * UNIT_SIZE
            write_shards(folder / f"shards-{count}", count * images, SIZE_PX, images)
        for index in range(rounds):
            for count in list(counts) if index % 2 == 0 else reversed(list(counts)):
                shards, out = folder / f"shards-{count}", folder / f"out-{index}-{count}"
                found = _measure(count, shards, out, seconds_per_image)
                steady[count].append(found[0])
                whole[count].append(found[1])
                busy[count].append(found[2])
                print(
                    f"  round {index + 1}, {count} nodes: {found[0]:.2f} images/s in steady state, "
                    f"{found[1]:.2f} in all, {found[2]:.0%} of the cores busy",
                    flush=True,
                )
    figures = {f"images_per_s_{count}": median(steady[count]) for count in counts}
    figures |= {f"cores_busy_{count}": max(busy[count]) for count in counts}
    return figures | ratios("linear", steady) | ratios("linear_whole", whole)


def ratios(name: str, rates: dict[int, list[float]]) -> dict[str, float]:
    """Median and minimum over the rounds of rate(n) ÷ (n · rate(1)), for every n but 1."""
    figures: dict[str, float] = {}
    for count in (count for count in rates if count != 1):
        found = [many / (count * one) for many, one in zip(rates[count], rates[1], strict=True)]
        figures |= {f"{name}_{count}": median(found), f"{name}_{count}_min": min(found)}
    return figures


def _measure(count: int, shards: Path, out: Path, seconds_per_image: float) -> tuple[float, float, float]:
    """(images/s in steady state, in all, share of the machine's cores that was busy)"""
    (port,) = free_ports(1)
    with ExitStack() as stack:
        head = stack.enter_context(started_head(port=port, resources={"CPU": 0}))
        for _ in range(count):
            stack.enter_context(started_node(head, NODE))
        encoded = ClusterEncode(
            address=head.address,
            shards=shards,
            out=out,
            size_px=SIZE_PX,
            unit_size=UNIT_SIZE,
            seconds_per_image=seconds_per_image,
            read=ONE_READER,
            decode=TWO_DECODERS,
            encoder=ActorPool(num_cpus=0.5, num_gpus=1, min_size=count, max_size=count),
            gpus=count,
        ).run(head)
    return (
        steady_rate(encoded.commits, count),
        whole_rate(encoded.commits, encoded.begun_s),
        encoded.cpu_share,
    )
