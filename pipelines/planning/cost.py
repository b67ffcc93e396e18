"""What a plan costs, and which prices are missing for a total."""

from typing import NamedTuple

from pipelines.planning.config import PlanConfig
from pipelines.planning.figures import Figure, exact_or_extrapolated
from pipelines.planning.row_bytes import image_bytes
from pipelines.planning.stage import Figures
from pipelines.planning.train import bytes_read

__all__ = ["Cost", "cost_of"]

GB = 1e9


class Cost(NamedTuple):
    """Figures in the plan's currency; ``missing`` names what there is no total without."""

    figures: Figures
    missing: list[str]


def cost_of(config: PlanConfig, images: int, stages: dict[str, Figures]) -> Cost:
    """Of all stages, the dataset's storage and what is read across a border that costs.

    stages: the figures of each. The total is there only if nothing is missing.
    """
    figures: Figures = {}
    missing: list[str] = []
    for name, found in stages.items():
        if "cost of devices" in found:
            figures[f"devices of {name}"] = found["cost of devices"]
        else:
            missing.append(f"{name}.price_per_device_hour")
    for add in (_storage, _egress):
        found_cost, lacking = add(config, images)
        figures |= found_cost
        missing += lacking
    if not missing:
        total = sum(figure.value for figure in figures.values())
        figures["total"] = Figure(total, "currency", "extrapolated")
    return Cost(figures, missing)


def _storage(config: PlanConfig, images: int) -> Cost:
    prices = config.prices
    missing = [name for name in ("gb_month", "storage_months") if getattr(prices, name, None) is None]
    if prices is None or prices.gb_month is None or prices.storage_months is None:
        return Cost({}, [f"prices.{name}" for name in missing])
    per_image = image_bytes(config.dataset)
    cost = images * per_image.value / GB * prices.gb_month * prices.storage_months
    note = f"latents, {prices.storage_months:g} months"
    return Cost({"storage": Figure(cost, "currency", exact_or_extrapolated(per_image.origin), note)}, [])


def _egress(config: PlanConfig, images: int) -> Cost:
    prices = config.prices
    if prices is None or prices.egress is None:
        return Cost({}, ["prices.egress"])
    if not prices.egress:
        return Cost({}, [])
    if prices.gb_egress is None:
        return Cost({}, ["prices.gb_egress"])
    num_bytes = 0.0
    missing: list[str] = []
    if "images" in prices.egress and config.encode is not None:
        source = config.dataset.source_bytes_per_image
        num_bytes += images * (source or 0.0)
        missing += [] if source else ["dataset.source_bytes_per_image"]
    if "latents" in prices.egress and config.train is not None:
        num_bytes += bytes_read(config.train, config.dataset)
    cost = Figure(num_bytes / GB * prices.gb_egress, "currency", "extrapolated", " and ".join(prices.egress))
    return Cost({} if missing else {"egress": cost}, missing)
