"""Units: the fixed slices of shards in which images are encoded, committed and resumed.

Everything here is a pure function of the input and the unit size: which units a shard has, what
they are called, and what is left to do follow from the shard's name, version and samples alone.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from ldm.errors import BadSampleError
from pipelines.shards import Sample, Shard
from pipelines.unit_ids import unit_id

__all__ = ["Unit", "UnitSamples", "slice_units"]


@dataclass(frozen=True)
class Unit:
    """Samples ``first`` … ``last`` (both included, counted from 0) of one shard.

    An empty unit, which only an empty shard has, ends before it begins: ``last = first - 1``.
    ``is_final`` marks the last unit of its shard, so that a committed shard is known to be whole
    without reading it again.
    """

    id: str
    shard: Shard
    index: int
    first: int
    last: int
    is_final: bool


@dataclass(frozen=True)
class UnitSamples:
    """A unit with its samples, and the damage that ended its shard early, if any did."""

    unit: Unit
    samples: list[Sample]
    damage: BadSampleError | None = None

    @property
    def num_inputs(self) -> int:
        """Inputs to account for: every sample, and one for a damage (what it hid cannot be counted)."""
        return len(self.samples) + (self.damage is not None)


def slice_units(
    shard: Shard, samples: Iterable[Sample], unit_size: int, committed: Collection[int] = ()
) -> Iterator[UnitSamples]:
    """Cut a shard's samples into units of ``unit_size``; pass over those whose index is committed.

    A BadSampleError that ``samples`` raises ends the shard and becomes the damage of its last unit.
    Every shard has a final unit, an empty shard too: once that is committed, the shard is done.
    """
    slice_ = _Slice(index=0, is_wanted=0 not in committed)
    damage: BadSampleError | None = None
    stream = iter(samples)
    while True:
        try:
            sample = next(stream)
        except StopIteration:
            break
        except BadSampleError as error:
            damage = error
            break
        if slice_.count == unit_size:
            # Only the next sample shows that this unit is not the shard's last.
            if slice_.is_wanted:
                yield slice_.finish(shard, unit_size, is_final=False)
            slice_ = _Slice(slice_.index + 1, is_wanted=slice_.index + 1 not in committed)
        slice_.add(sample)
    if slice_.is_wanted:
        yield slice_.finish(shard, unit_size, is_final=True, damage=damage)


@dataclass
class _Slice:
    """The unit being filled. One that is not wanted counts its samples and lets go of them."""

    index: int
    is_wanted: bool
    count: int = 0
    samples: list[Sample] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.count += 1
        if self.is_wanted:
            self.samples.append(sample)

    def finish(
        self, shard: Shard, unit_size: int, *, is_final: bool, damage: BadSampleError | None = None
    ) -> UnitSamples:
        first = self.index * unit_size
        identifier = unit_id(shard, unit_size, self.index)
        unit = Unit(identifier, shard, self.index, first, first + self.count - 1, is_final)
        return UnitSamples(unit, self.samples, damage)
