"""The order in which training sees rows: a pure function of (seed, epoch, batch index). No I/O.

An epoch of one bucket, which is rows of one shape in row groups:

1. The row groups are permuted, and stand as one line of rows.
2. The line is cut into ``lanes`` of equal length. Row j of every batch comes from lane j mod lanes, so
   that ranks read different lanes, however many ranks there are.
3. In a lane, every ``window_groups`` row groups are shuffled row by row.

Rows at an epoch's end that do not fill a batch are left out of that epoch: fewer than a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ldm.seeds import keyed_seed

__all__ = ["BucketOrder", "Span", "Window", "default_lanes", "epoch_schedule"]

MAX_DEFAULT_LANES = 8


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` of row group ``group``."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows ``first``, ``first`` + 1, … of a lane: those of the spans one after another, at ``order_N``."""

    first: int
    spans: tuple[Span, ...]
    order_N: NDArray[np.int64]


def default_lanes(batch_size: int) -> int:
    """The largest power of two, up to 8, that divides the batch."""
    return next(n for n in (MAX_DEFAULT_LANES, 4, 2, 1) if batch_size % n == 0)


class BucketOrder:
    """The order of one bucket.

    starts_G, stops_G: int64, which rows of each row group are trained on.
    batch_size: rows of a batch over all ranks, a multiple of ``lanes``.
    """

    def __init__(
        self,
        name: str,
        starts_G: NDArray[np.int64],
        stops_G: NDArray[np.int64],
        *,
        batch_size: int,
        lanes: int,
        window_groups: int,
        seed: int,
    ) -> None:
        if batch_size % lanes:
            raise ValueError(f"a batch of {batch_size} has no equal share of {lanes} lanes")
        self.name, self.lanes, self.window_groups, self.seed = name, lanes, window_groups, seed
        self.starts_G, self.stops_G = starts_G, stops_G
        self.num_rows = int((stops_G - starts_G).sum())
        self.rows_of_lane = batch_size // lanes
        self.num_batches = self.num_rows // lanes // self.rows_of_lane

    def windows(self, epoch: int, lane: int, first: int = 0) -> Iterator[Window]:
        """The windows of a lane, from the one on that holds its row ``first``."""
        permuted_G, ends_G = self._line(epoch)
        length = self.num_rows // self.lanes
        begin, end = lane * length, (lane + 1) * length
        # Groups of the line that lie in the lane; those at its ends perhaps in part.
        low = int(np.searchsorted(ends_G, begin, side="right"))
        high = int(np.searchsorted(ends_G, end, side="left")) + 1
        for index, at in enumerate(range(low, high, self.window_groups)):
            until = min(at + self.window_groups, high)
            if min(int(ends_G[until - 1]), end) - begin <= first:
                continue
            spans = tuple(
                self._span(int(permuted_G[i]), int(ends_G[i]), begin, end) for i in range(at, until)
            )
            position = max(0, int(ends_G[at - 1]) - begin) if at > low else 0
            yield Window(position, spans, self._shuffle(spans, epoch, lane, index))

    def _span(self, group: int, group_end: int, begin: int, end: int) -> Span:
        """A row group's part in the rows ``begin`` to ``end`` of the line."""
        start, stop = int(self.starts_G[group]), int(self.stops_G[group])
        group_begin = group_end - (stop - start)
        return Span(group, start + max(0, begin - group_begin), stop - max(0, group_end - end))

    def _shuffle(self, spans: Sequence[Span], epoch: int, lane: int, index: int) -> NDArray[np.int64]:
        num_rows = sum(span.stop - span.start for span in spans)
        return _generator("window", self.seed, epoch, self.name, lane, index).permutation(num_rows)

    def _line(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _permuted(self, epoch)


@lru_cache(maxsize=64)
def _permuted(order: BucketOrder, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row groups in the epoch's order, and where each one's rows end in the line."""
    sizes_G = order.stops_G - order.starts_G
    permuted_G = _generator("groups", order.seed, epoch, order.name).permutation(np.flatnonzero(sizes_G))
    return permuted_G, np.cumsum(sizes_G[permuted_G])


def epoch_schedule(num_batches: Mapping[str, int], *, seed: int, epoch: int) -> list[tuple[str, int]]:
    """(bucket, number of the batch within it) of every batch of an epoch; buckets come in random turns."""
    names = sorted(num_batches)
    turns = np.repeat(np.arange(len(names)), [num_batches[name] for name in names])
    counts = [0] * len(names)
    schedule = []
    for turn in _generator("buckets", seed, epoch).permutation(turns):
        schedule.append((names[turn], counts[turn]))
        counts[turn] += 1
    return schedule


def _generator(*key: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(keyed_seed(*key)))
