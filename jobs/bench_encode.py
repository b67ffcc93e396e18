"""``ldm bench encode``: how fast, how lean and how soon ENCODE is, each beside something to compare with."""

import json
import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from jobs.config import JobConfig

__all__ = ["BenchEncodeJob"]

Part = Literal["efficiency", "first_batch", "memory", "ramp", "resume", "storage"]
PARTS: tuple[Part, ...] = ("efficiency", "first_batch", "memory", "ramp", "resume", "storage")


class BenchEncodeJob(JobConfig):
    """Measure ENCODE on this machine. Let nothing else run beside it.

    Needs the photographs of the ``demo`` extra. With the defaults it takes about half an hour on two
    cores; docs/benchmarks.md says what is measured, and what came out where.
    """

    only: tuple[Part, ...] = Field(PARTS, description=f"some of: {', '.join(PARTS)}")
    seconds: PositiveFloat = Field(60.0, description="of steady state, in each way of encoding")
    threads: PositiveInt = Field(os.cpu_count() or 1, description="of the VAE, in every way")
    memory_images: tuple[PositiveInt, PositiveInt] = Field((1000, 20_000), description="few and many images")
    ramp_images: PositiveInt = Field(6000, description="of 64 px, for eight actors")
    resume_units: tuple[PositiveInt, PositiveInt] = Field((25_000, 100_000), description="multiples of 250")
    storage_images: PositiveInt = 64

    def run(self) -> dict[str, object]:
        """The figures by name; the JSON line holds them all."""
        result: dict[str, object] = {}
        with tempfile.TemporaryDirectory(prefix="ldm-bench-") as folder:
            for part in self.only:
                print(f"— {part}", flush=True)
                figures = getattr(self, f"_{part}")(Path(folder))
                for name, value in figures.items():
                    print(f"  {name:28} {value:.4g}", flush=True)
                result |= figures
        return result

    def _efficiency(self, folder: Path) -> dict[str, float]:
        """Bare loop, pipeline, bare loop again; then the two obvious ways."""
        from jobs.bench.photos import write_shards

        shards = write_shards(folder / "photos", int(32 * self.seconds) + 256, 256, 512)
        ways = ("bare", "pipeline", "bare", "straightforward", "file-per-image")
        rates = [self._rate(way, shards, folder / f"out-{index}") for index, way in enumerate(ways)]
        bare = (rates[0] + rates[2]) / 2
        return {
            "bare_images_per_s": bare,
            "bare_drift": rates[2] / rates[0],
            "pipeline_images_per_s": rates[1],
            "straightforward_images_per_s": rates[3],
            "file_per_image_images_per_s": rates[4],
            "efficiency": rates[1] / bare,
            "vs_straightforward": rates[1] / rates[3],
            "vs_file_per_image": rates[1] / rates[4],
        }

    def _rate(self, way: str, shards: Path, out: Path) -> float:
        from jobs.bench.processes import run_measured

        arguments = [way, str(shards), str(out), str(self.seconds), str(self.threads)]
        lines = run_measured(["-m", "jobs.bench.encode_ways", *arguments]).output.splitlines()
        measured = json.loads(lines[-1])
        return float(measured["images"] / measured["seconds"])

    def _first_batch(self, folder: Path) -> dict[str, float]:
        """From the start of the command to that of the first VAE batch, Ray's own start included."""
        from jobs.bench.photos import write_shards
        from jobs.bench.processes import run_measured

        shards = write_shards(folder / "first", 128, 256, 64)
        pools = ["--encoder.num-cpus", str(self.threads), "--cluster.num-cpus", str(self.threads + 2)]
        pools += ["--decode.max-size", "1", "--reader.max-size", "1", "--unit-size", "64"]
        command = ["-m", "jobs.cli", "encode", str(shards), str(folder / "first-out"), "--vae", "f8"]
        measured = run_measured([*command, *pools, "--json"])
        summary = json.loads(measured.output.splitlines()[-1])
        return {"first_batch_s": summary["first_batch_at"] - measured.started_at}

    def _memory(self, folder: Path) -> dict[str, float]:
        """Peak of all processes, few against many images of 256 px, with the emulated encoder."""
        from jobs.bench.photos import write_shards
        from jobs.bench.processes import run_measured

        few, many = self.memory_images
        peaks = {}
        for count in (few, many):
            shards = write_shards(folder / f"memory-{count}", count, 256, 250)
            command = ["-m", "jobs.bench.emulated", str(shards), str(folder / f"memory-out-{count}"), "256"]
            peaks[count] = run_measured(command, with_memory=True).peak_mb
        return {
            "memory_few_mb": peaks[few],
            "memory_many_mb": peaks[many],
            "memory_growth": peaks[many] / peaks[few],
        }

    def _ramp(self, folder: Path) -> dict[str, float]:
        from jobs.bench.emulated import measure_ramp
        from jobs.bench.photos import write_shards

        shards = write_shards(folder / "ramp", self.ramp_images, 64, 500)
        return measure_ramp(shards, folder / "ramp-out", 64, seconds_per_image=0.05)

    def _resume(self, folder: Path) -> dict[str, float]:
        from jobs.bench.resume import measure_resume

        few, many = (measure_resume(folder / f"resume-{units}", units) for units in self.resume_units)
        return {
            "resume_few_s": few.seconds,
            "resume_100k_s": many.seconds,
            "resume_100k_mb": many.peak_mb,
        }

    def _storage(self, folder: Path) -> dict[str, float]:
        from jobs.bench.storage import measure_storage

        return measure_storage(self.storage_images)
