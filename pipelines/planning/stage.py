"""What a plan says of any stage: devices, nodes, hours, losses and the price of the devices."""

from collections.abc import Callable
from math import inf

from ldm.errors import UserError
from pipelines.planning.config import StagePlan
from pipelines.planning.figures import Figure, Origin
from pipelines.planning.pace import Interruptions, Pace
from pipelines.planning.rates import efficiency

__all__ = ["Figures", "chosen_nodes", "pace_of", "require_rate", "stage_figures"]

Figures = dict[str, Figure]


def require_rate(name: str, stage: StagePlan) -> None:
    """UserError where the stage called ``name`` has no rate at all."""
    if not stage.rates:
        raise UserError(
            f"{name} has no rate",
            do=f"measure one on a device of the plan (`ldm bench {name} --json > FILE`, then --rates FILE), "
            f"or write it into {name}.rates",
        )


def pace_of(stage: StagePlan, images: int, images_per_s: float, lost_images: int, *, stops_all: bool) -> Pace:
    """The stage at that rate of one device. lost_images: done again after a preemption, at most."""
    lost, interruptions = stage.preemption, None
    if lost is not None:
        interruptions = Interruptions(lost.per_device_hour, lost.restart_s, lost_images, stops_all=stops_all)
    return Pace(
        images=images,
        images_per_s=images_per_s,
        devices_per_node=stage.devices_per_node,
        efficiency=efficiency(stage).value,
        start_s=stage.start_s or 0.0,
        interruptions=interruptions,
    )


def chosen_nodes(
    name: str, stage: StagePlan, pace: Pace, fewest: Callable[[float], int | None], quickest_h: float
) -> int:
    """Nodes that the plan gives, or the fewest by which its deadline is kept.

    fewest: deadline in hours → nodes, or None; quickest_h: what the best number of nodes takes. UserError
    where preemptions leave no progress, or the deadline cannot be kept.
    """
    if stage.devices is not None:
        nodes = stage.devices // stage.devices_per_node
        if pace.hours(nodes) == inf:
            raise _no_progress(name, f"on {stage.devices} devices")
        return nodes
    assert stage.deadline_h is not None
    found = fewest(stage.deadline_h)
    if found is not None:
        return found
    if quickest_h == inf:
        raise _no_progress(name, "on any number of devices")
    more = ", or raise max_devices" if stage.max_devices else ""
    raise UserError(
        f"{name}.deadline_h is {stage.deadline_h:g}, and {pace.images:,} images cannot be done by then",
        allowed=f"at least {quickest_h:.4g}",
        do=f"give more time or a faster device{more}",
    )


def stage_figures(stage: StagePlan, pace: Pace, rate: Figure, nodes: int) -> Figures:
    """What does not depend on the kind of stage. rate: images/s of one device."""
    devices = nodes * stage.devices_per_node
    chosen: Origin = "extrapolated" if stage.devices is None else "given"
    told = "" if stage.devices is not None else f"fewest for {stage.deadline_h:g} h"
    device_hours = pace.device_hours(nodes)
    figures = {
        "rate of a device": rate,
        "efficiency": efficiency(stage) if devices > 1 else Figure(1.0, "", "given", "one device"),
        "lost to preemptions": Figure(pace.lost_share(nodes), "share", *_loss_origin(stage)),
        "start": Figure(pace.start_s, "s", *_start_origin(stage)),
        "devices": Figure(devices, "", chosen, told),
        "nodes": Figure(nodes, "", chosen, f"devices of a node: {stage.devices_per_node}"),
        "rate of all devices": Figure(pace.images_per_s_of(nodes), "images/s", "extrapolated"),
        "hours": Figure(pace.hours(nodes), "h", "extrapolated"),
        "device-hours": Figure(device_hours, "h", "extrapolated"),
    }
    if stage.price_per_device_hour is not None:
        cost = device_hours * stage.price_per_device_hour
        figures["cost of devices"] = Figure(cost, "currency", "extrapolated")
    return figures


def _loss_origin(stage: StagePlan) -> tuple[Origin, str]:
    lost = stage.preemption
    if lost is None:
        return "given", "no preemption in the plan"
    return "extrapolated", f"{lost.per_device_hour:g} per device-hour, {lost.restart_s:g} s to restart"


def _start_origin(stage: StagePlan) -> tuple[Origin, str]:
    return ("assumed", "not counted: start_s") if stage.start_s is None else ("given", "")


def _no_progress(name: str, where: str) -> UserError:
    return UserError(
        f"preemptions leave {name} no progress {where}",
        do=f"lower {name}.preemption (per_device_hour, restart_s), or what is done again after each: "
        f"{'dataset.unit_size' if name == 'encode' else 'train.checkpoint_every'}",
    )
