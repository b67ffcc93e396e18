"""What is left to do: the shards of the input, less what is committed; and which versions to retire."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from ldm.errors import BadSampleError, UserError
from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.shards import InputConfig, Shard, read_samples
from pipelines.unit_ids import parse_unit_id, unit_family, unit_id

__all__ = ["Backlog", "Replacement", "ShardWork", "find_backlog", "require_image"]

# A corpus whose first images are all bad is the encoder's business: it says why, image by image.
MAX_BAD_IMAGES = 100


@dataclass(frozen=True)
class ShardWork:
    """A shard that is not done, and the indices of its units that are."""

    shard: Shard
    committed: frozenset[int]


@dataclass(frozen=True)
class Replacement:
    """A shard whose committed rows are of another version than the input's: ``old`` and ``new`` family."""

    shard_name: str
    old: str
    new: str


@dataclass(frozen=True)
class Backlog:
    """Shards to read; units of the input that are committed; versions to retire; shards that are gone.

    A replaced shard's old rows count until all units of its new version are committed.
    """

    shards: Sequence[ShardWork]
    num_committed: int
    replacements: Sequence[Replacement] = ()
    removed: Sequence[str] = ()


def find_backlog(shards: Sequence[Shard], dataset: LatentDataset) -> Backlog:
    """Compare the input with the commits: two listings, and one commit read per shard that was begun."""
    committed = _indices_by_family(dataset.committed_units())
    current = dataset.current_families()
    unit_size = dataset.header.unit_size
    work: list[ShardWork] = []
    replacements: list[Replacement] = []
    num_committed = 0
    for shard in shards:
        family = unit_family(shard, unit_size)
        families = committed.get(shard.name, {})
        indices = frozenset(families.get(family, ()))
        num_committed += len(indices)
        if not _is_done(shard, indices, dataset):
            work.append(ShardWork(shard, indices))
        others = [other for other in sorted(families) if other != family]
        old = current.get(shard.name) or (others[0] if others else family)
        if old != family:
            replacements.append(Replacement(shard.name, old, family))
    removed = sorted(committed.keys() - {shard.name for shard in shards})
    return Backlog(work, num_committed, replacements, removed)


def _indices_by_family(committed: Iterable[str]) -> dict[str, dict[str, set[int]]]:
    """Shard name → unit family → indices of the committed units."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for identifier in committed:
        name, family, index = parse_unit_id(identifier)
        found[name][family].add(index)
    return found


def _is_done(shard: Shard, committed: frozenset[int], dataset: LatentDataset) -> bool:
    """Whether units 0 … n are all committed and n is the shard's final one."""
    if not committed or len(committed) != max(committed) + 1:
        return False
    last = unit_id(shard, dataset.header.unit_size, max(committed))
    return next(iter(dataset.commits([last]))).is_final


def require_image(shards: Iterable[Shard], preprocess: Preprocess, config: InputConfig) -> None:
    """UserError unless an image is found that can be used. Costs one image where the input is sound."""
    reasons: list[str] = []
    for error in islice(_until_usable(shards, preprocess, config), MAX_BAD_IMAGES):
        if error is None:
            return
        reasons.append(str(error))
    if len(reasons) < MAX_BAD_IMAGES:
        found = f"the first of {len(reasons)} problems: {reasons[0]}" if reasons else "no sample has an image"
        raise UserError(f"no usable image in the input ({found})", do="check the shards, or run ldm shards")


def _until_usable(
    shards: Iterable[Shard], preprocess: Preprocess, config: InputConfig
) -> Iterable[BadSampleError | None]:
    """The error of every bad image up to the first usable one, for which None stands."""
    for shard in shards:
        try:
            for sample in read_samples(shard, config):
                if sample.image is None:
                    continue
                try:
                    preprocess.views(sample.image, sample.key)
                except BadSampleError as error:
                    yield error
                else:
                    yield None
        except BadSampleError as damage:
            yield damage
