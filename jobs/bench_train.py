"""``ldm bench train``: how fast and lean TRAIN is, each beside something to compare with."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

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
    threads: PositiveInt = Field(os.cpu_count() or 1, description="of torch, in every way")
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
        """``ldm train`` between two bare loops on the small set, then on the large one."""
        few, many = (folder / f"rows-{rows}" for rows in self.rows)
        before = self._rate("bare", few, self._config())
        trained = self._train(few, folder / "train-few", before)
        after = self._rate("bare", few, self._config())
        large = self._train(many, folder / "train-many", before)
        bare = (before + after) / 2
        return {
            "bare_images_per_s": bare,
            "bare_drift": after / before,
            "train_images_per_s": trained["rate"],
            "speed": trained["rate"] / bare,
            "data_wait": max(trained["wait"], large["wait"]),
        }

    def _loader(self, folder: Path) -> dict[str, float]:
        """The loader alone, on the large set, beside training on it."""
        many = folder / f"rows-{self.rows[1]}"
        alone, trained = (self._rate(way, many, self._config()) for way in ("loader", "cached"))
        return {"loader_images_per_s": alone, "loader_ratio": alone / trained}

    def _memory(self, folder: Path) -> dict[str, float]:
        """Peak memory of the loader alone, small against large set."""
        from jobs.bench.processes import run_measured

        peaks = []
        for rows in self.rows:
            arguments = self._arguments("loader", folder / f"rows-{rows}", self._config())
            peaks.append(run_measured(arguments, with_memory=True).peak_mb)
        return {
            "loader_few_mb": peaks[0],
            "loader_many_mb": peaks[1],
            "loader_memory_growth": peaks[1] / peaks[0],
        }

    def _caching(self, folder: Path) -> dict[str, float]:
        """256 px with the default VAE: cached latents beside encoding in the loop."""
        from jobs.bench.latents import write_latents

        latents = write_latents(folder / "rows-256px", 2000, side=32, unit_size=250)
        config = self._config() | {"batch_size": 16}
        cached, online = (self._rate(way, latents, config) for way in ("cached", "online"))
        return {
            "cached_images_per_s": cached,
            "online_images_per_s": online,
            "caching_speedup": cached / online,
        }

    def _config(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "batch_size": 64,
            "threads": self.threads,
            "data": {"validation_rows": 0},
            # The bare loop makes none.
            "samples": {"num_images": 0},
        }

    def _rate(self, way: str, dataset: Path, config: dict[str, Any]) -> float:
        from jobs.bench.processes import run_measured

        measured = json.loads(run_measured(self._arguments(way, dataset, config)).output.splitlines()[-1])
        return float(measured["images"] / measured["seconds"])

    def _arguments(self, way: str, dataset: Path, config: dict[str, Any]) -> list[str]:
        shared = [str(dataset), str(self.seconds), str(self.threads), json.dumps(config)]
        return ["-m", "jobs.bench.train_ways", way, *shared]

    def _train(self, dataset: Path, out: Path, expected_rate: float) -> dict[str, float]:
        """Images/s and share of time waited for data in ``ldm train``, without its first two intervals."""
        from jobs.bench.processes import run_measured

        # Six intervals: two to warm up, and four that last as long as the bare loop.
        interval = max(1, int(expected_rate * self.seconds / 4 / 64))
        options = {**self._config(), "steps": 6 * interval, "log_every": interval}
        options |= {"checkpoint_every": 12 * interval, "validate_every": 12 * interval}
        config = out.with_suffix(".json.yaml")
        config.write_text(json.dumps({"train": options}))
        run_measured(["-m", "jobs.cli", "train", str(dataset), str(out), "--config", str(config)])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]
        seconds = [64 * interval / line["images_per_s"] for line in lines]
        waited = [line["data_wait_share"] * s for line, s in zip(lines, seconds, strict=True)]
        return {"rate": 64 * interval * len(lines) / sum(seconds), "wait": sum(waited) / sum(seconds)}
