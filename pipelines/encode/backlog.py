"""What is left to do: the shards of the input, less what is committed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ldm.errors import BadSampleError, UserError
from pipelines.dataset import LatentDataset
from pipelines.encode.units import parse_unit_id, unit_family, unit_id
from pipelines.shards import Shard, read_samples

__all__ = ["Backlog", "ShardWork", "find_backlog", "require_image"]

# A corpus whose first images are all bad is the encoder's business: it says why, image by image.
MAX_BAD_IMAGES = 100


@dataclass(frozen=True)
class ShardWork:
    """A shard that is not done, and the indices of its units that are."""

    shard: Shard
    committed: frozenset[int]


@dataclass(frozen=True)
class Backlog:
    """Shards to read, and how many units of the input are committed already."""

    shards: Sequence[ShardWork]
    num_committed: int


def find_backlog(shards: Sequence[Shard], dataset: LatentDataset) -> Backlog:
    """Compare the input with the commits: one listing, and one commit read per shard that was begun.

    UserError where a shard has changed since it was encoded: its old rows would stay beside the new.
    """
    by_family = _indices_by_family(dataset.committed_units(), shards, dataset.header.unit_size)
    work, num_committed = [], 0
    for shard in shards:
        committed = by_family.get(unit_family(shard, dataset.header.unit_size), frozenset())
        num_committed += len(committed)
        if not _is_done(shard, committed, dataset):
            work.append(ShardWork(shard, committed))
    return Backlog(work, num_committed)


def _indices_by_family(
    committed: Iterable[str], shards: Sequence[Shard], unit_size: int
) -> dict[str, frozenset[int]]:
    families = {shard.name: unit_family(shard, unit_size) for shard in shards}
    indices: dict[str, set[int]] = defaultdict(set)
    for identifier in committed:
        name, family, index = parse_unit_id(identifier)
        if families.get(name, family) != family:
            raise UserError(
                f"shard {name} has changed since it was encoded (unit {identifier})",
                do="encode into a new folder",
            )
        indices[family].add(index)
    return {family: frozenset(found) for family, found in indices.items()}


def _is_done(shard: Shard, committed: frozenset[int], dataset: LatentDataset) -> bool:
    """Whether units 0 … n are all committed and n is the shard's final one."""
    if not committed or len(committed) != max(committed) + 1:
        return False
    last = unit_id(shard, dataset.header.unit_size, max(committed))
    return next(iter(dataset.commits([last]))).is_final


def require_image(shards: Iterable[Shard], preprocess: Callable[[bytes], NDArray[np.uint8]]) -> None:
    """UserError unless an image is found that can be used. Costs one image where the input is sound."""
    reasons: list[str] = []
    for error in islice(_until_usable(shards, preprocess), MAX_BAD_IMAGES):
        if error is None:
            return
        reasons.append(str(error))
    if len(reasons) < MAX_BAD_IMAGES:
        found = f"the first of {len(reasons)} problems: {reasons[0]}" if reasons else "no sample has an image"
        raise UserError(f"no usable image in the input ({found})", do="check the shards, or run ldm shards")


def _until_usable(
    shards: Iterable[Shard], preprocess: Callable[[bytes], NDArray[np.uint8]]
) -> Iterable[BadSampleError | None]:
    """The error of every bad image up to the first usable one, for which None stands."""
    for shard in shards:
        try:
            for sample in read_samples(shard):
                if sample.image is None:
                    continue
                try:
                    preprocess(sample.image)
                except BadSampleError as error:
                    yield error
                else:
                    yield None
        except BadSampleError as damage:
            yield damage
