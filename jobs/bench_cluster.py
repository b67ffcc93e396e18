"""``ldm bench cluster``: how encoding grows with nodes, and how an autoscaler's pools follow the work."""

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from jobs.bench.parts import run_parts
from jobs.config import JobConfig

__all__ = ["BenchClusterJob"]

Part = Literal["autoscaling", "nodes"]
PARTS: tuple[Part, ...] = get_args(Part)


class BenchClusterJob(JobConfig):
    """Measure clusters of several Ray nodes on this machine. Let nothing else run beside it.

    Nodes are raylets with logical GPUs, and the encoder is one that only waits, so a few cores are enough;
    all else is that of ``ldm encode``, commits too. docs/benchmarks.md explains.
    """

    only: tuple[Part, ...] = Field(PARTS, description=f"some of: {', '.join(PARTS)}")
    seconds_per_image: PositiveFloat = Field(0.25, description="that the encoder waits")
    counts: tuple[PositiveInt, ...] = Field(
        (1, 2, 4), description="numbers of nodes to compare; 1 is the first"
    )
    rounds: PositiveInt = Field(3, description="of all numbers of nodes; median and minimum count")
    units_per_node: PositiveInt = Field(24, description="of 16 images, in each run")
    most_nodes: PositiveInt = Field(4, description="of the pool encode-gpu")
    images: PositiveInt = Field(1600, description="that are encoded while the pools follow")
    idle_timeout_s: PositiveFloat = Field(20.0, description="after which the autoscaler removes an idle node")
    plot: Path = Field(Path("out/bench/autoscaling.png"), description="of nodes over time; a .json beside it")

    @field_validator("counts")
    @classmethod
    def _begin_with_one(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if counts[:1] != (1,) or len(set(counts)) < len(counts):
            raise ValueError(f"{counts}: different numbers of which the first is 1, such as 1,2,4")
        return counts

    def run(self) -> dict[str, object]:
        """The figures by name; the JSON line holds them all."""
        return run_parts((part, getattr(self, f"_{part}")) for part in self.only)

    def _autoscaling(self) -> dict[str, float]:
        from jobs.bench.cluster_autoscaling import autoscaling

        return autoscaling(
            self.images, self.seconds_per_image, self.most_nodes, self.idle_timeout_s, self.plot
        )

    def _nodes(self) -> dict[str, float]:
        from jobs.bench.cluster_nodes import nodes_scaling

        return nodes_scaling(self.counts, self.rounds, self.units_per_node, self.seconds_per_image)
