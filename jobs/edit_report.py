"""What ``ldm edit`` and ``ldm inpaint`` have in common: the figures of edits, and the files they leave."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from jobs.config import Section

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ldm.features import Extractor
    from ldm.perceptual import Perceptual

__all__ = ["MeasureOptions", "Networks", "write_edits"]


class MeasureOptions(Section):
    """By what an edit is compared with its original, beside PSNR."""

    perceptual: str = Field(
        "", description="distance: lpips-vgg, lpips-alex, stlpips, random, a folder; none: not computed"
    )
    extractor: str = Field(
        "", description="features: inception, its file, mobilenet, random; none: not computed"
    )


class Networks:
    """The networks of `MeasureOptions`, loaded. UserError where one cannot be had."""

    def __init__(self, options: MeasureOptions) -> None:
        self.perceptual: Perceptual | None = None
        self.extractor: Extractor | None = None
        if options.perceptual:
            from ldm.perceptual import load_perceptual

            self.perceptual = load_perceptual(options.perceptual)
        if options.extractor:
            from ldm.features import load_extractor

            self.extractor = load_extractor(options.extractor)

    def kept(
        self,
        original_HW3: "NDArray[np.uint8]",
        images_BHW3: "NDArray[np.uint8]",
        mask_HW: "Tensor | None" = None,
    ) -> list[dict[str, object]]:
        """`ldm.edit_measures.Kept` of each edit, as plain values."""
        from ldm.edit_measures import kept
        from ldm.image_tensors import to_model

        original, edits = to_model(original_HW3[None])[0], to_model(images_BHW3)
        return [asdict(found) for found in kept(edits, original, self.perceptual, self.extractor, mask_HW)]


def write_edits(
    out: Path,
    names: list[str],
    original_HW3: "NDArray[np.uint8]",
    images_BHW3: "NDArray[np.uint8]",
    z_BChw: "Tensor",
) -> dict[str, object]:
    """Each edit as PNG and as latent .npy, and sheet.png: the original, then the edits in a row."""
    import numpy as np

    from jobs.output_file import write_npy, write_png
    from ldm.image_tensors import image_grid

    for name, image, z_Chw in zip(names, images_BHW3, z_BChw, strict=True):
        write_png(out / f"{name}.png", image)
        write_npy(out / f"{name}.npy", z_Chw)
    sheet = np.concatenate([original_HW3[None], images_BHW3])
    write_png(out / "sheet.png", image_grid(sheet, len(sheet)))
    return {
        "sheet": str(out / "sheet.png"),
        "files": [str(out / f"{name}.png") for name in names],
        "latents": [str(out / f"{name}.npy") for name in names],
    }
