"""The plan of `ldm encode`: how long, and what every node needs of memory and network."""

from math import ceil

from ldm.errors import UserError
from pipelines.planning.config import DatasetPlan, EncodePlan
from pipelines.planning.figures import Figure, exact_or_extrapolated
from pipelines.planning.pace import Pace, fewest_nodes
from pipelines.planning.rates import inputs_per_s
from pipelines.planning.row_bytes import image_bytes
from pipelines.planning.stage import Figures, chosen_nodes, pace_of, require_rate, stage_figures

__all__ = ["OBJECT_STORE_SHARE", "UNITS_AT_AN_ENCODER", "UNITS_LOST", "encode_figures"]

# Units that a killed encoder loses at most: the one it was at, and one that is encoded and not committed.
UNITS_LOST = 2
# Ray Data hands an actor twice as many tasks as it works on at once; an encoder works on two.
UNITS_AT_AN_ENCODER = 4
# Of an object store, Ray Data fills half.
OBJECT_STORE_SHARE = 0.5
PIXEL_BYTES = 3


def encode_figures(stage: EncodePlan, dataset: DatasetPlan, images: int) -> Figures:
    """By name, for that many images. UserError where the plan cannot be carried out."""
    require_rate("encode", stage)
    rate = inputs_per_s(stage, dataset)
    lost_images = UNITS_LOST * dataset.unit_size
    pace = pace_of(stage, images, rate.value, lost_images, stops_all=False)
    nodes = _nodes(stage, dataset, pace)
    return {
        **stage_figures(stage, pace, rate, nodes),
        **_per_node(stage, dataset, pace.images_per_s_of(nodes) / nodes),
        **_stored(dataset, images),
    }


def _nodes(stage: EncodePlan, dataset: DatasetPlan, pace: Pace) -> int:
    units = ceil(pace.images / dataset.unit_size)
    if units < (stage.devices or stage.devices_per_node):
        raise UserError(
            f"{pace.images:,} images are {units} units, fewer than devices",
            do="lower dataset.unit_size, encode.devices or encode.devices_per_node",
        )
    most_nodes = min(units, stage.max_devices or units) // stage.devices_per_node
    quickest_h = min(pace.hours(1), pace.hours(most_nodes))
    return chosen_nodes("encode", stage, pace, lambda h: fewest_nodes(pace, h, most_nodes), quickest_h)


def _per_node(stage: EncodePlan, dataset: DatasetPlan, images_per_s: float) -> Figures:
    """images_per_s: of a node."""
    pixels = sum(PIXEL_BYTES * size_px**2 for size_px in dataset.sizes_px)
    source, decode = dataset.source_bytes_per_image, stage.decode
    figures: Figures = {}
    decoders = stage.devices_per_node
    told = "as many decode tasks as devices are assumed: encode.decode"
    if decode is not None:
        cpus = images_per_s / decode.images_per_s
        decoders, told = ceil(cpus), f"{ceil(cpus)} decode tasks"
        figures["CPUs that decode for a node"] = Figure(cpus, "", "extrapolated")
    units = UNITS_AT_AN_ENCODER * stage.devices_per_node + decoders
    in_flight = units * dataset.unit_size * pixels + decoders * dataset.unit_size * (source or 0.0)
    memory = in_flight / OBJECT_STORE_SHARE
    figures["object store of a node"] = Figure(memory, "B", "extrapolated", f"{units} units on it; {told}")
    latents = images_per_s * image_bytes(dataset).value
    figures["latents from a node"] = Figure(latents, "B/s", "extrapolated")
    if source is not None:
        figures["images to a node"] = Figure(images_per_s * source, "B/s", "extrapolated", "decoded on it")
    figures["pixels to a node"] = Figure(
        images_per_s * pixels, "B/s", "extrapolated", "instead, where other nodes decode"
    )
    return figures


def _stored(dataset: DatasetPlan, images: int) -> Figures:
    units, per_image = ceil(images / dataset.unit_size), image_bytes(dataset)
    files = units * (len(dataset.sizes_px) + 1 + (dataset.embedding is not None))
    origin = exact_or_extrapolated(per_image.origin)
    return {
        "bytes of an image": per_image,
        "storage": Figure(images * per_image.value, "B", origin, per_image.note),
        "units": Figure(units, "", "given", "at least: a shard's last one may be smaller"),
        "files": Figure(files, "", "given", "at least: commits, latents of each size, embeddings"),
    }
