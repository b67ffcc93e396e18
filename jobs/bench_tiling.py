"""``ldm bench tiling``: how exact, fast and lean tiled decoding is, beside other ways."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from jobs.bench.parts import run_parts
from jobs.config import JobConfig
from ldm.errors import UserError

__all__ = ["BenchTilingJob"]

Part = Literal["exact", "photos", "time", "memory", "large", "actors"]
SMALLEST_PX = 64
PARTS: tuple[Part, ...] = ("exact", "photos", "time", "memory", "large", "actors")


class BenchTilingJob(JobConfig):
    """Measure tiled decoding on this machine. Let nothing else run beside it.

    Needs the photographs of the ``demo`` extra, or others. docs/benchmarks.md says what is measured.
    """

    only: tuple[Part, ...] = Field(PARTS, description=f"some of: {', '.join(PARTS)}")
    photos: Path | None = Field(None, description="folder of photographs; default: the demo's, enlarged")
    num_photos: PositiveInt = 6
    photo_sizes_px: tuple[PositiveInt, ...] = (1024, 2048)
    tile: PositiveInt = Field(32, description="side in latents, of every way")
    threads: PositiveInt = Field(os.cpu_count() or 1, description="of torch; actors have one each")
    rounds: PositiveInt = Field(5, description="of each way in turn, of which the median counts")
    sizes_px: tuple[PositiveInt, ...] = Field((1024, 2048, 4096, 8192), description="of memory's growth")
    large_px: PositiveInt = 8192
    quick: bool = Field(False, description="only some layouts in part exact")
    case: str = Field("", description="in part exact: only cases whose name has this in it")

    def run(self) -> dict[str, object]:
        """The figures by name; the JSON line holds them all."""
        import torch

        torch.set_num_threads(self.threads)
        return run_parts((part, getattr(self, f"_{part}")) for part in self.only)

    def _exact(self) -> dict[str, float]:
        """Worst of all cases, in each precision; other ways beside it."""
        from jobs.bench.tiling_exact import cases, measure, with_its_layout

        worst: dict[str, float] = {}
        print(f"  {'error / std':46} {'ours':>9} {'encode':>9} {'diffusers':>9} {'tile stat.':>10}")
        for case in cases(self.quick):
            if self.case not in case.name:
                continue
            dtype = "fp64" if case.latent_Chw.itemsize == 8 else "fp32"
            errors = measure(case)
            values = [errors[name] for name in ("decode", "encode", "diffusers", "tile_statistics")]
            told = " ".join(f"{value:9.1e}" for value in values)
            print(f"  {f'{case.name} {dtype}':46} {told}", flush=True)
            for name, key in (("decode", f"exact_{dtype}"), ("encode", f"exact_encode_{dtype}")):
                worst[key] = max(worst.get(key, 0.0), errors[name])
        if not worst:
            raise UserError(f"no case has {self.case!r} in its name", allowed="f16, 2 or photograph, say")
        layouts = with_its_layout(256 if self.quick else 1024)
        return worst | {f"whole_fp32_{name}": value for name, value in layouts.items()}

    def _photos(self) -> dict[str, float]:
        """The worst photograph of each figure."""
        from jobs.bench.tiling_photos import measure

        photos = [
            photo
            for size in self.photo_sizes_px
            for photo in measure(self.photos, size, self.tile, self.num_photos)
        ]
        return {
            "fast_psnr_db": min(photo.fast_db for photo in photos),
            "diffusers_psnr_db": min(photo.diffusers_db for photo in photos),
            "diffusers_best_db": max(photo.diffusers_db for photo in photos),
            "fast_seam": max((photo.fast_seam for photo in photos), key=lambda seam: abs(seam - 1)),
            "diffusers_seam": max((photo.diffusers_seam for photo in photos), key=lambda seam: abs(seam - 1)),
        }

    def _time(self) -> dict[str, float]:
        from jobs.bench.tiling_time import measure

        seconds = measure(1024, self.tile, self.rounds, self.threads)
        return {f"{name}_s": value for name, value in seconds.items()} | {
            "exact_over_whole_time": seconds["exact"] / seconds["whole"],
            "exact_over_diffusers_time": seconds["exact"] / seconds["diffusers"],
            "fast_over_diffusers_time": seconds["fast"] / seconds["diffusers"],
        }

    def _memory(self) -> dict[str, float]:
        """What a device would hold: memory that no file backs, with maps in a spill folder, less that of a
        decode so small that it is the interpreter's."""
        from jobs.bench.tiling_memory import decode_latent

        def private_gb(size_px: int, mode: str) -> float:
            return decode_latent(size_px, mode, self.tile, self.threads, spill=True).private_gb

        interpreter_gb = private_gb(SMALLEST_PX, "fast")
        figures = {"interpreter_gb": interpreter_gb}
        for mode in ("fast", "exact"):
            for size in self.sizes_px:
                figures[f"{mode}_{size}_device_gb"] = private_gb(size, mode) - interpreter_gb
        half, largest = self.sizes_px[-2:]
        growth = figures[f"fast_{largest}_device_gb"] / figures[f"fast_{half}_device_gb"]
        return figures | {f"memory_growth_{half}_{largest}": growth}

    def _large(self) -> dict[str, float]:
        """The command as a user types it, maps in memory."""
        from jobs.bench.tiling_memory import decode_latent

        figures: dict[str, float] = {}
        for mode in ("fast", "exact"):
            run = decode_latent(self.large_px, mode, self.tile, self.threads, spill=False)
            figures[f"{mode}_{self.large_px}_s"] = run.seconds
            figures[f"{mode}_{self.large_px}_gb"] = run.peak_gb
        return figures

    def _actors(self) -> dict[str, float | bool]:
        from jobs.bench.tiling_actors import measure

        return measure(2048, self.tile, self.rounds)
