"""The plan of `ldm train`: how long, and what every node reads and exchanges."""

from math import inf

from pipelines.planning.config import DatasetPlan, TrainPlan
from pipelines.planning.figures import Figure
from pipelines.planning.pace import Pace
from pipelines.planning.rates import at_size
from pipelines.planning.row_bytes import row_bytes
from pipelines.planning.stage import Figures, chosen_nodes, pace_of, require_rate, stage_figures

__all__ = ["bytes_read", "train_figures"]

GRADIENT_BYTES = 4  # float32, with bf16 too: autocast leaves the weights as they are


def train_figures(stage: TrainPlan, dataset: DatasetPlan) -> Figures:
    """By name. UserError where the plan cannot be carried out."""
    require_rate("train", stage)
    images = stage.steps * stage.batch_size
    rate = at_size(stage, stage.size_px)
    lost_images = stage.checkpoint_every * stage.batch_size
    pace = pace_of(stage, images, rate.value, lost_images, stops_all=True)
    nodes = _nodes(stage, pace)
    speed = pace.images_per_s_of(nodes)
    row = row_bytes(dataset, stage.size_px).value
    figures = {
        "images trained on": Figure(images, "", "given", f"{stage.steps:,} steps of {stage.batch_size:,}"),
        **stage_figures(stage, pace, rate, nodes),
        "a step": Figure(stage.batch_size / speed, "s", "extrapolated"),
        "latents to a node": Figure(speed / nodes * row, "B/s", "extrapolated"),
        "latents read": Figure(bytes_read(stage, dataset), "B", "extrapolated", "no node keeps any"),
    }
    if stage.num_params is not None:
        figures["gradients from a node"] = _gradients(stage.num_params, nodes, speed / stage.batch_size)
    return figures


def bytes_read(stage: TrainPlan, dataset: DatasetPlan) -> float:
    """Of latents in a whole training: a row for each image of each step."""
    return stage.steps * stage.batch_size * row_bytes(dataset, stage.size_px).value


def _nodes(stage: TrainPlan, pace: Pace) -> int:
    """More nodes may be slower, since a preemption stops all of them, and must share the batch evenly."""
    most = min(stage.batch_size, stage.max_devices or stage.batch_size) // stage.devices_per_node
    counts = [n for n in range(1, most + 1) if stage.batch_size % (n * stage.devices_per_node) == 0]
    quickest_h = min(map(pace.hours, counts), default=inf)

    def fewest(deadline_h: float) -> int | None:
        return next((nodes for nodes in counts if pace.hours(nodes) <= deadline_h), None)

    return chosen_nodes("train", stage, pace, fewest, quickest_h)


def _gradients(num_params: int, nodes: int, steps_per_s: float) -> Figure:
    """A ring over nodes sends 2·(nodes − 1)/nodes times the gradients in every step."""
    sent = 2 * (nodes - 1) / nodes * GRADIENT_BYTES * num_params * steps_per_s
    return Figure(sent, "B/s", "extrapolated", "all-reduce in a ring, fp32; as much arrives")
