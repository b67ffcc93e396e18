"""Bytes of an image's latents: exactly, before compression, and as a measured row says."""

from pipelines.planning.config import DatasetPlan
from pipelines.planning.figures import Figure, exact_or_extrapolated

__all__ = ["image_bytes", "plain_row_bytes", "row_bytes"]

LABEL_BYTES = 4  # int32
SCALE_BYTES = 4  # float32, per channel of a tensor of int8
EMBEDDING_BYTES = 2  # float16


def plain_row_bytes(dataset: DatasetPlan, size_px: int) -> int:
    """Of a row of the dataset (`pipelines.latent_table`), before encoding and compression.

    Mean and, with moments, std; twice where mirrored latents are stored; each C·(size/f)² values, and C
    scales with int8. Then the label, and what was said of key, caption and kept fields.
    """
    form = dataset.form
    tensors = (2 if form.stored == "moments" else 1) * (2 if form.mirrored else 1)
    values = dataset.channels * (size_px // dataset.f) ** 2
    tensor_bytes = values + SCALE_BYTES * dataset.channels if form.dtype == "int8" else 2 * values
    return tensors * tensor_bytes + LABEL_BYTES + dataset.text_bytes_per_row


def row_bytes(dataset: DatasetPlan, size_px: int) -> Figure:
    """Of a row in its file.

    As measured at that size; at another one in proportion to `plain_row_bytes`; without a measurement
    those, which compression makes fewer.
    """
    plain, stored = plain_row_bytes(dataset, size_px), dataset.stored_row
    if stored is None:
        return Figure(plain, "B", "given", "before compression")
    if stored.size_px != size_px:
        ratio = stored.num_bytes / plain_row_bytes(dataset, stored.size_px)
        return Figure(plain * ratio, "B", "extrapolated", f"compressed as at {stored.size_px} px")
    if stored.measured is None:
        return Figure(stored.num_bytes, "B", "given")
    return Figure(stored.num_bytes, "B", "measured", f"{stored.measured.command}, {stored.measured.when}")


def image_bytes(dataset: DatasetPlan) -> Figure:
    """Of an image in the whole dataset: a row of every size, and the embedding of its caption."""
    rows = [row_bytes(dataset, size_px) for size_px in dataset.sizes_px]
    embedding = dataset.embedding
    if embedding is None and len(rows) == 1:
        return rows[0]
    text = 0.0 if embedding is None else EMBEDDING_BYTES * embedding.tokens * embedding.width
    origin = exact_or_extrapolated(*(row.origin for row in rows))
    notes = dict.fromkeys(row.note for row in rows if row.note)
    if embedding is not None:
        notes |= {"an embedding for every image, before compression": None}
    return Figure(sum(row.value for row in rows) + text, "B", origin, "; ".join(notes))
