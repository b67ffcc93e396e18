"""``ldm bench train``: how fast and lean TRAIN is, each beside something to compare with."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from jobs.bench.turns import Line, Way, rate_of, take_turns
from jobs.config import JobConfig

__all__ = ["BenchTrainJob"]

Part = Literal["speed", "loader", "memory", "caching"]
PARTS: tuple[Part, ...] = ("speed", "loader", "memory", "caching")


class BenchTrainJob(JobConfig):
    """Measure TRAIN on this machine. Let nothing else run beside it.

    Needs the photographs of the ``demo`` extra. docs/benchmarks.md says what is measured, and what came
    out where.
    """

    only: tuple[Part, ...] = Field(PARTS, description=f"some of: {', '.join(PARTS)}")
    seconds: PositiveFloat = Field(60.0, description="of steady state, in each way of training")
    threads: PositiveInt = Field(
        max(1, (os.cpu_count() or 1) - 1),
        description="of torch, in every way; by default a core is left to what else a node of Ray runs",
    )
    preset: str = Field("small", description="U-Net that is trained")
    rows: tuple[PositiveInt, PositiveInt] = Field(
        (10_000, 1_000_000), description="of the small and large set"
    )

    def run(self) -> dict[str, object]:
        """The figures by name; the JSON line holds them all."""
        from jobs.bench.latents import write_latents

        result: dict[str, object] = {}
        with tempfile.TemporaryDirectory(prefix="ldm-bench-") as folder:
            for part in self.only:
                print(f"— {part}", flush=True)
                for rows in self.rows if part != "caching" else ():
                    if not (Path(folder) / f"rows-{rows}").exists():
                        write_latents(Path(folder) / f"rows-{rows}", rows, side=8, unit_size=1000)
                figures = getattr(self, f"_{part}")(Path(folder))
                for name, value in figures.items():
                    print(f"  {name:28} {value:.4g}", flush=True)
                result |= figures
        return result

    def _speed(self, folder: Path) -> dict[str, float]:
        """``ldm train`` and a bare loop in turns, with the threads asked for and with one for every core."""
        few, many = (folder / f"rows-{rows}" for rows in self.rows)
        figures: dict[str, float] = {}
        for suffix, threads in (("", self.threads), ("_all_cores", os.cpu_count() or 1)):
            ways = {"bare": self._way("bare", few, threads), "train": self._train(few, threads)}
            lines = take_turns(ways, self.seconds)
            bare, train = (64 * rate_of(lines[name]) for name in ways)
            figures |= {
                f"bare_images_per_s{suffix}": bare,
                f"train_images_per_s{suffix}": train,
                f"speed{suffix}": train / bare,
                f"data_wait_small_set{suffix}": _waited(lines["train"]),
            }
        large = take_turns({"train": self._train(many, self.threads)}, self.seconds)["train"]
        waits = [value for name, value in figures.items() if name.startswith("data_wait")]
        return figures | {"data_wait": max(*waits, _waited(large))}

    def _loader(self, folder: Path) -> dict[str, float]:
        """The loader alone and training on it in turns, on the large set."""
        many = folder / f"rows-{self.rows[1]}"
        ways = {way: self._way(way, many, self.threads) for way in ("loader", "cached")}
        alone, trained = (64 * rate_of(lines) for lines in take_turns(ways, self.seconds).values())
        return {"loader_images_per_s": alone, "loader_ratio": alone / trained}

    def _memory(self, folder: Path) -> dict[str, float]:
        """Peak memory of the loader alone, small against large set."""
        from jobs.bench.processes import run_measured

        peaks = []
        for rows in self.rows:
            way = self._way("loader", folder / f"rows-{rows}", self.threads)
            arguments = [*way.arguments, str(self.seconds)]
            peaks.append(run_measured(arguments, with_memory=True, environment=way.environment).peak_mb)
        return {
            "loader_few_mb": peaks[0],
            "loader_many_mb": peaks[1],
            "loader_memory_growth": peaks[1] / peaks[0],
        }

    def _caching(self, folder: Path) -> dict[str, float]:
        """256 px with the default VAE: cached latents beside encoding in the loop."""
        from jobs.bench.latents import write_latents

        latents = write_latents(folder / "rows-256px", 2000, side=32, unit_size=250)
        ways = {way: self._way(way, latents, self.threads, batch_size=16) for way in ("cached", "online")}
        cached, online = (16 * rate_of(lines) for lines in take_turns(ways, self.seconds).values())
        return {
            "cached_images_per_s": cached,
            "online_images_per_s": online,
            "caching_speedup": cached / online,
        }

    def _config(self, threads: int, **options: object) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "batch_size": 64,
            "threads": threads,
            "data": {"validation_rows": 0},
            # The bare loop makes none.
            "samples": {"num_images": 0},
            **options,
        }

    def _way(self, way: str, dataset: Path, threads: int, **options: object) -> Way:
        from pipelines.train.trainer import MALLOC

        config = json.dumps(self._config(threads, **options))
        log = Path(tempfile.mkdtemp(dir=dataset.parent)) / f"{way}.jsonl"
        arguments = ["-m", "jobs.bench.train_ways", way, str(dataset), str(log), str(threads), config]
        # The product's parts have the allocator that `ldm train` gives them, the bare loop that of Python.
        return Way(arguments, log, {} if way == "bare" else MALLOC)

    def _train(self, dataset: Path, threads: int) -> Way:
        """``ldm train`` until it is killed."""
        from pipelines.train.unet import METRICS_FILE

        never = 10**9
        options = {"steps": never, "log_every": 4, "checkpoint_every": never, "validate_every": never}
        out = Path(tempfile.mkdtemp(dir=dataset.parent)) / "out"
        config = out.with_suffix(".yaml")
        config.write_text(json.dumps({"train": self._config(threads, schedule="constant", **options)}))
        arguments = ["-m", "jobs.cli", "train", str(dataset), str(out), "--config", str(config)]
        return Way(arguments, out / METRICS_FILE)


def _waited(lines: Sequence[Line]) -> float:
    """Share of time in which a training waited for data."""
    seconds = [1 / line["steps_per_s"] for line in lines]
    waited = [line["data_wait_share"] * s for line, s in zip(lines, seconds, strict=True)]
    return sum(waited) / sum(seconds)
