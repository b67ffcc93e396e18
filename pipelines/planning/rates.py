"""Images/s of one device at the sizes of a plan."""

from pipelines.planning.config import DatasetPlan, EncodePlan, Measurement, Rate, StagePlan
from pipelines.planning.figures import Figure, Origin

__all__ = ["ASSUMED_EFFICIENCY", "at_size", "efficiency", "inputs_per_s"]

# What the project's own trials ask of 1 → 4 nodes with an emulated encoder; on real clusters unknown.
ASSUMED_EFFICIENCY = 0.9


def at_size(stage: StagePlan, size_px: int) -> Figure:
    """Images/s of that size: as stated, else from the nearest size, in inverse proportion to the pixels.

    That is how convolutions scale. Attention costs more at a larger size, and a small one fills a device
    less, so such a rate is an extrapolation. ValueError where the stage has no rate.
    """
    nearest = min(stage.rates, key=lambda rate: abs(rate.size_px - size_px))
    if nearest.size_px == size_px:
        return _stated(nearest, nearest.images_per_s)
    scaled = nearest.images_per_s * (nearest.size_px / size_px) ** 2
    return Figure(scaled, "images/s", "extrapolated", f"{_source(nearest)}, by pixels")


def inputs_per_s(stage: EncodePlan, dataset: DatasetPlan) -> Figure:
    """Inputs/s of one device that encodes each at every size, and mirrored where these are stored."""
    passes = 2 if dataset.form.mirrored else 1
    rates = [at_size(stage, size_px) for size_px in dataset.sizes_px]
    if len(rates) * passes == 1:
        return rates[0]
    note = "; ".join(dict.fromkeys(rate.note for rate in rates if rate.note))
    return Figure(1 / sum(passes / rate.value for rate in rates), "images/s", "extrapolated", note)


def efficiency(stage: StagePlan) -> Figure:
    """Share of its own rate that each of several devices keeps."""
    scaling = stage.scaling
    if scaling is None:
        return Figure(ASSUMED_EFFICIENCY, "", "assumed", "until it is measured: scaling.efficiency")
    if scaling.measured is None:
        return Figure(scaling.efficiency, "", "given")
    return Figure(scaling.efficiency, "", "measured", _told(scaling.measured))


def _stated(rate: Rate, images_per_s: float) -> Figure:
    origin: Origin = "given" if rate.measured is None else "measured"
    return Figure(images_per_s, "images/s", origin, _source(rate))


def _source(rate: Rate) -> str:
    size = f"at {rate.size_px} px"
    return size if rate.measured is None else f"{size}: {_told(rate.measured)}"


def _told(measured: Measurement) -> str:
    return f"{measured.command}, {measured.when}"
