"""The CPU stage: judge every sample of a unit, and turn the good ones into pixels."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ldm.errors import BadSampleError
from pipelines.encode.rows import DecodedUnit
from pipelines.encode.units import UnitSamples
from pipelines.latent_table import Rejected
from pipelines.shards import Sample

__all__ = ["decode_unit"]

INT32_MAX = 2**31 - 1


def decode_unit(
    unit: UnitSamples,
    preprocess: Callable[[bytes], NDArray[np.uint8]],
    class_names: Sequence[str] | None = None,
) -> DecodedUnit:
    """Preprocess every sample; one that cannot be used is rejected with its reason.

    Reasons of this function: ``no_image``, ``duplicate_key`` (the second within a unit),
    ``bad_label``, ``bad_json``, ``unknown_class`` (a label that ``class_names`` does not reach);
    those of ``preprocess``; and the one of the damage that ended the shard.
    """
    source = unit.unit.shard.url
    rejected: list[Rejected] = []
    good: dict[str, tuple[int | None, int, NDArray[np.uint8]]] = {}
    for position, sample in enumerate(unit.samples, start=unit.unit.first):
        try:
            if sample.key in good:
                raise BadSampleError("duplicate_key", "the first of its key was kept")
            good[sample.key] = (_label(sample, class_names), position, preprocess(_image(sample)))
        except BadSampleError as error:
            rejected.append(Rejected(sample.key, source, position, error.reason, error.detail))
    if unit.damage is not None:
        end = unit.unit.last + 1
        rejected.append(Rejected("", source, end, unit.damage.reason, unit.damage.detail))
    return DecodedUnit(
        unit=unit.unit,
        num_inputs=unit.num_inputs,
        rejected=rejected,
        keys=list(good),
        labels=[label for label, _, _ in good.values()],
        positions=[position for _, position, _ in good.values()],
        images_N=[image for _, _, image in good.values()],
    )


def _image(sample: Sample) -> bytes:
    if sample.image is None:
        extensions = ", ".join(sorted(sample.fields))
        raise BadSampleError("no_image", f"only {extensions}" if extensions else "")
    return sample.image


def _label(sample: Sample, class_names: Sequence[str] | None) -> int | None:
    label = sample.label()
    if label is None:
        return None
    if class_names is not None and label >= len(class_names):
        raise BadSampleError("unknown_class", f"label {label}, but there are {len(class_names)} classes")
    if label > INT32_MAX:
        raise BadSampleError("bad_label", f"{label}: at most {INT32_MAX}")
    return label
