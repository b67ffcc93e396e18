"""``ldm bench serve``: what step-level batching, deadlines and scaling by work do on this machine."""

from pathlib import Path
from statistics import median
from typing import Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from jobs.bench.parts import run_parts
from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig

__all__ = ["BenchServeJob"]

Part = Literal["pixels", "engine", "reuse", "deadlines", "goodput", "short", "overload", "bad", "scaling"]
PARTS: tuple[Part, ...] = get_args(Part)
# More than the machine may have: stages mostly wait.
NUM_CPUS = 8


class BenchServeJob(JobConfig):
    """Measure serving on this machine. Let nothing else run beside it.

    A small U-Net with random weights, a torch thread for each replica. docs/benchmarks.md explains.
    """

    only: tuple[Part, ...] = Field(PARTS, description=f"some of: {', '.join(PARTS)}")
    preset: str = Field("small", description="of the U-Net")
    side: PositiveInt = Field(8, description="of small latents")
    large_side: PositiveInt = Field(32, description="of large latents")
    seeds: PositiveInt = Field(3, description="of arrivals; the median counts")
    seconds: PositiveFloat = Field(12.0, description="that a load lasts")
    overload_factor: PositiveFloat = 10.0
    overload_s: PositiveFloat = 60.0
    rounds: PositiveInt = Field(15, description="of each way in turn, where nothing is random")
    cancels: PositiveInt = 1000
    checkpoint: Path | None = Field(None, description="a trained one, for the loss by reused features")
    plot: Path = Field(Path("out/bench/scaling.png"), description="of replicas over time")

    def run(self) -> dict[str, object]:
        """The figures by name; the JSON line holds them all."""
        import torch

        torch.set_num_threads(1)
        return run_parts((part, getattr(self, f"_{part}")) for part in self.only)

    def _pixels(self) -> dict[str, float]:
        from jobs.bench.serve_pixels import pixels

        return pixels(self.preset, self.side, self.seeds)

    def _engine(self) -> dict[str, float]:
        from jobs.bench.serve_engine import cancels, efficiency, first_preview

        return {
            **efficiency(self.preset, self.side, self.rounds),
            **first_preview(self.preset, self.side, self.rounds),
            **cancels(self.preset, self.side, self.cancels),
        }

    def _reuse(self) -> dict[str, float]:
        from jobs.bench.serve_reuse import loss_db, speed

        figures = speed(self.preset, self.side, self.rounds)
        return figures | (loss_db(self.checkpoint) if self.checkpoint else {})

    def _deadlines(self) -> dict[str, float]:
        from jobs.bench.serve_engine import deadlines

        # Long against the deadlines, or the time until these would carry any load.
        return deadlines("tiny", self.side, self.seeds, 2 * self.seconds)

    def _goodput(self) -> dict[str, float]:
        """Ratios to ``@serve.batch``, and on large latents to one request after the other."""
        from jobs.bench.serve_goodput import MIXED, UNIFORM, goodput

        figures: dict[str, float] = {}
        # In smaller batches short requests wait less: the better of both counts, seed by seed.
        cases = [
            ("goodput_mixed", self.side, MIXED, ("batch-4", "batch-16")),
            ("goodput_uniform", self.side, UNIFORM, ("batch-16",)),
            ("goodput_large", self.large_side, MIXED, ("batch-1",)),
        ]
        with connected(ClusterConfig(num_cpus=NUM_CPUS)):
            for name, side, steps, others in cases:
                print(f"  {name}", flush=True)
                found = goodput(self.preset, side, steps, ("engine", *others), self.seeds, self.seconds)
                ratios = found.ratios("engine", others)
                figures |= {name: median(ratios), f"{name}_min": min(ratios)}
                figures |= {f"{name}_{way}_per_s": median(rates) for way, rates in found.by_way.items()}
        return figures

    def _short(self) -> dict[str, float]:
        from jobs.bench.serve_goodput import short_p99

        with connected(ClusterConfig(num_cpus=NUM_CPUS)):
            return short_p99(self.preset, self.side, self.seeds, 2 * self.seconds)

    def _overload(self) -> dict[str, float]:
        """Behind HAProxy; and for a while behind Ray Serve's own proxy."""
        from jobs.bench.serve_http import overload
        from jobs.haproxy import haproxy

        cluster = ClusterConfig(num_cpus=NUM_CPUS)
        with haproxy(cluster), connected(cluster):
            figures = overload(self.preset, self.side, self.overload_factor, self.overload_s)
        with connected(cluster):
            own = overload(self.preset, self.side, self.overload_factor, self.overload_s / 3)
        return figures | {f"own_proxy_{name}": value for name, value in own.items()}

    def _bad(self) -> dict[str, float]:
        from jobs.bench.serve_bad_requests import bad_requests

        with connected(ClusterConfig(num_cpus=NUM_CPUS)):
            return bad_requests(self.preset, self.side, self.rounds)

    def _scaling(self) -> dict[str, float]:
        from jobs.bench.serve_scaling import scaling

        with connected(ClusterConfig(num_cpus=NUM_CPUS)):
            return scaling(self.preset, self.side, self.plot)
