"""``ldm savings``: what latents save, computed and measured, beside what is usually claimed."""

import json
import os
import platform
import tempfile
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from jobs.config import JobConfig
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.savings_view import StepFigures

__all__ = ["SavingsJob"]

Part = Literal["measured", "fit"]
PARTS: tuple[Part, ...] = ("measured", "fit")


class SavingsJob(JobConfig):
    """Count what a step costs on pixels and on latents of f = 4, 8 and 16, beside the usual claims.

    The layout of Stable Diffusion 2.1 is counted and not run; a small U-Net is run here, on photographs of
    the ``demo`` extra. Let nothing else run beside it.
    """

    layout: str = Field("sd21", description="U-Net that is counted")
    size_px: PositiveInt = Field(512, description="side of its images")
    measured_size_px: PositiveInt = Field(256, description="side of the images that are measured")
    preset: str = Field("small", description="U-Net that is measured")
    batch_size: PositiveInt = Field(1, description="images of a measured step")
    seconds: PositiveFloat = Field(10.0, description="of each measurement, but three steps at least")
    threads: PositiveInt = Field(os.cpu_count() or 1, description="of torch")
    only: tuple[Part, ...] = Field(PARTS, description=f"beside the ledgers some of: {', '.join(PARTS)}")
    quantise: bool = Field(False, description="instead compare fp32 with half precision and int8")
    checkpoint: Path | None = Field(None, description="with --quantise: whose U-Net is quantised")
    vae: str = Field("f8", description="with --quantise: whose decoder runs in half precision")
    images: int = Field(16, ge=2, description="with --quantise: photographs, and samples")
    steps: PositiveInt = Field(25, description="with --quantise: of each sample")
    extractor: str = Field("random", description="with --quantise: of features, as evaluate samples has it")
    page: Path = Field(Path("out/savings.html"), description="HTML report to write")

    def run(self) -> dict[str, object]:
        """The ledgers by f, what was measured, a finding for every claim, and the sizes that fit."""
        if self.quantise:
            return self._run_quantise()
        import torch

        from jobs.savings_page import write_page
        from jobs.savings_view import SavingsResult, as_json, print_sheets, sheets
        from ldm.device_fit import size_peaks
        from ldm.savings import ledger

        self._check()
        result = SavingsResult(
            counted_name=f"{self.layout} U-Net, {self.size_px} px, fp16",
            counted=ledger(self.layout, self.size_px, torch.float16),
            run_here_name=f"{self.preset} U-Net, {self.measured_size_px} px, fp32",
            run_here=ledger(self.preset, self.measured_size_px),
            batch_size=self.batch_size,
            machine=self._machine(),
            measured=self._measured() if "measured" in self.only else {},
            size_peaks=size_peaks() if "fit" in self.only else [],
        )
        print_sheets(sheets(result))
        write_page(self.page, result)
        print(f"report: {self.page}")
        return {**as_json(result), "page": str(self.page)}

    def _check(self) -> None:
        from ldm.savings import check_size
        from ldm.unet import PRESETS

        for size_px in (self.size_px, self.measured_size_px):
            check_size(size_px)
        without_text = [name for name, preset in PRESETS.items() if preset.cross_attention_dim is None]
        if self.preset not in without_text:
            raise UserError(f"no U-Net preset {self.preset!r} without text", allowed=", ".join(without_text))

    def _run_quantise(self) -> dict[str, object]:
        """Weights, memory, speed and loss of each form."""
        import torch

        from jobs.bench.reduced import check_checkpoint, decoder_rows, unet_rows
        from jobs.savings_page import write_reduced_page
        from jobs.savings_view import print_sheets, reduced_sheets
        from ldm.autoencoder import load
        from ldm.features import load_extractor

        load(self.vae).check_size(self.measured_size_px, self.measured_size_px)
        extractor = load_extractor(self.extractor)
        if self.checkpoint:
            check_checkpoint(self.checkpoint)
        torch.set_num_threads(self.threads)
        rows = decoder_rows(self.vae, self._photographs(self.images), extractor, self.seconds)
        if self.checkpoint:
            rows += unet_rows(self.checkpoint, self.images, self.steps, extractor, self.seconds)
        found = reduced_sheets(rows, extractor.name, self._machine())
        print_sheets(found)
        write_reduced_page(self.page, found)
        print(f"report: {self.page}")
        reduced = [asdict(row) for row in rows]
        return {"reduced": reduced, "machine": self._machine(), "page": str(self.page)}

    def _machine(self) -> str:
        import torch

        device = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        return f"CPU {device}; torch {torch.__version__}, {self.threads} threads"

    def _measured(self) -> "dict[str, dict[int, StepFigures]]":
        """Kind of step → f → what a process of its own measured, so that no peak hides another."""
        from jobs.bench.processes import run_measured
        from jobs.savings_view import StepFigures

        found: dict[str, dict[int, StepFigures]] = {"sampling": {}, "training": {}}
        with tempfile.TemporaryDirectory(prefix="ldm-savings-") as folder:
            for f, latents in self._latents(Path(folder)).items():
                for kind, by_f in found.items():
                    arguments = [kind, self.preset, str(latents), str(self.seconds), str(self.threads)]
                    output = run_measured(["-m", "jobs.bench.denoise_step", *arguments]).output
                    by_f[f] = StepFigures(**json.loads(output.splitlines()[-1]))
                    print(f"{kind} at f={f}: {by_f[f].seconds:.3g} s a step", flush=True)
        return found

    def _latents(self, folder: Path) -> dict[int, Path]:
        """f → file of the same photographs as the U-Net sees them, one batch."""
        import numpy as np
        import torch

        from ldm.autoencoder import load
        from ldm.image_tensors import to_model
        from ldm.savings import CHANNELS

        images = to_model(self._photographs(self.batch_size))

        def seen_at(f: int) -> "NDArray[np.float32]":
            if f == 1:
                return images.numpy()
            vae = load(f"f{f}")
            return vae.whitening.normalise(vae.encode(images).mode()).contiguous().numpy()

        torch.set_num_threads(self.threads)
        files = {f: folder / f"f{f}.npy" for f in CHANNELS}
        for f, file in files.items():
            np.save(file, seen_at(f))
        return files

    def _photographs(self, count: int) -> "NDArray[np.uint8]":
        """uint8 (count, H, W, 3)."""
        import numpy as np

        from jobs.bench.photos import crops
        from ldm.images import decode_image

        photos = islice(crops(self.measured_size_px), count)
        return np.stack([np.asarray(decode_image(photo.image or b"")) for photo in photos])
