"""The CPU stage: judge every sample of a unit, and turn the good ones into pixels."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.errors import BadSampleError
from ldm.preprocess import Preprocess
from pipelines.encode.attempts import Attempt
from pipelines.encode.embeddings import precomputed_embedding
from pipelines.encode.rows import DecodedUnit, Embedded, SampleColumns
from pipelines.encode.units import UnitSamples
from pipelines.latent_table import Rejected
from pipelines.shards import Sample

__all__ = ["Judge", "decode_unit"]

INT32_MAX = 2**31 - 1
COLUMNS = ("label", "caption", "extra")
NO_EMBEDDINGS = Embedded()


class Judged(NamedTuple):
    """A good sample: embedding float16 (tokens, D) where it brought one, views uint8 (H, W, 3)."""

    label: int | None
    caption: str | None
    extra: str | None
    embedding: NDArray[np.float16] | None
    views: list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Judge:
    """What makes a sample good, and which of its fields travel on.

    class_names: labels must be among them, where there are any. pass_through: names of fields that
    become the row's ``extra``, as JSON. embedding_field: the one that holds an embedding as .npy.
    """

    preprocess: Preprocess
    class_names: Sequence[str] | None = None
    pass_through: Sequence[str] = ()
    embedding_field: str | None = None

    def __call__(self, sample: Sample) -> Judged:
        """BadSampleError says why a sample cannot be used."""
        image = sample.image_bytes()
        label, caption, extra = self._label(sample), sample.caption(), self._extra(sample)
        name = self.embedding_field
        embedding = precomputed_embedding(sample.fields, name) if name else None
        return Judged(label, caption, extra, embedding, self.preprocess.views(image, sample.key))

    def _label(self, sample: Sample) -> int | None:
        label = sample.label()
        if label is None:
            return None
        names = self.class_names
        if names is not None and label >= len(names):
            raise BadSampleError("unknown_class", f"label {label}, but there are {len(names)} classes")
        if label > INT32_MAX:
            raise BadSampleError("bad_label", f"{label}: at most {INT32_MAX}")
        return label

    def _extra(self, sample: Sample) -> str | None:
        if not self.pass_through:
            return None
        chosen = sample.chosen(self.pass_through)
        return json.dumps(chosen, sort_keys=True, ensure_ascii=False) if chosen else None


def decode_unit(
    unit: UnitSamples, judge: Judge, attempt: Attempt, embedded: Embedded = NO_EMBEDDINGS
) -> DecodedUnit:
    """Preprocess every sample; one that cannot be used is rejected with its reason.

    embedded: what the text stage made of the captions. Reasons: ``killed_worker`` (it did so
    `DEATHS_TO_CONVICT` times), ``duplicate_key`` (the second within a unit), that of a caption without
    embedding, those of ``judge``, and the one of the damage that ended the shard.
    """
    start = time.perf_counter()
    source = unit.unit.shard.url
    rejected: list[Rejected] = []
    good: dict[str, Judged] = {}
    positions: list[int] = []
    for item, sample in enumerate(unit.samples):
        position = unit.unit.first + item
        try:
            if attempt.is_convicted(item):
                raise BadSampleError("killed_worker", "a decode worker died at it, every time")
            if sample.key in good:
                raise BadSampleError("duplicate_key", "the first of its key was kept")
            attempt.mark.at(item)
            judged = judge(sample)
            if judged.caption is not None and judged.caption in embedded.failures:
                raise embedded.failures[judged.caption]
        except BadSampleError as error:
            rejected.append(Rejected(sample.key, source, position, error.reason, error.detail))
            continue
        good[sample.key] = judged
        positions.append(position)
    if unit.damage is not None:
        end = unit.unit.last + 1
        rejected.append(Rejected("", source, end, unit.damage.reason, unit.damage.detail))
    texts, embeddings = _embeddings(good, embedded)
    return DecodedUnit(
        unit=unit.unit,
        num_inputs=unit.num_inputs,
        rejected=rejected,
        samples=_columns(good, positions),
        decode_s=time.perf_counter() - start,
        images_N=[view for judged in good.values() for view in judged.views],
        texts=texts,
        embeddings_T=embeddings,
    )


def _columns(good: Mapping[str, Judged], positions: Sequence[int]) -> SampleColumns:
    labels, captions, extras = ([getattr(judged, name) for judged in good.values()] for name in COLUMNS)
    return SampleColumns(list(good), labels, captions, extras, positions)


def _embeddings(
    good: Mapping[str, Judged], embedded: Embedded
) -> tuple[list[str], list[NDArray[np.float16]]]:
    """What good samples need: their own embeddings by key, or those of their captions."""
    own = {key: judged.embedding for key, judged in good.items() if judged.embedding is not None}
    used = {judged.caption for judged in good.values()}
    of_captions = zip(embedded.texts, embedded.embeddings_T, strict=True)
    chosen = own or {text: embedding for text, embedding in of_captions if text in used}
    return list(chosen), list(chosen.values())
