"""Latents for training: each rank reads its share of every global batch, in a stated order.

The order is that of `pipelines.train.order`. Whatever is random about a row (its sample of the posterior,
noise, timestep, whether its condition is dropped, whether it is mirrored) is a function of (seed, epoch,
key) alone. So neither the number of ranks, nor a restart, nor prefetching changes what is trained on.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from ldm.errors import UserError
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.train.catalog import BucketCatalog, hold_out, open_catalog
from pipelines.train.order import BucketOrder, Span, Window, default_lanes, epoch_schedule
from pipelines.train.pairs import LowDraw, LowLatents, PairReader, draw_low, low_buckets, sample_low
from pipelines.train.row_groups import RowGroupReader, Rows

__all__ = ["LatentBatch", "LatentLoader", "LoaderConfig", "prefetched"]

T = TypeVar("T")
S = TypeVar("S")
READ_THREADS = 4
READ_AHEAD_WINDOWS = 1
# The epoch of validation rows: their noise is the same every time.
VALIDATION_EPOCH = -1


class LoaderConfig(BaseModel):
    """What is read, and in which order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_px: PositiveInt | None = Field(None, description="which of the dataset's sizes, if it has several")
    low_size_px: PositiveInt | None = Field(
        None, description="train an upsampler: condition on that size's latents of the same image"
    )
    lanes: PositiveInt | None = Field(
        None,
        description="ranks that can read without overlap; divides the batch. Default: 8, 4, 2 or 1, "
        "whichever first does",
    )
    window_groups: PositiveInt = Field(4, description="row groups of a lane (1 MiB each) shuffled together")
    prefetch_batches: PositiveInt = Field(8, description="batches made ahead")
    mirror: bool = Field(True, description="train on mirrored latents half the time, where they are stored")
    validation_rows: NonNegativeInt = Field(
        256, description="held out, at most 5 % of a bucket; 0 for no validation"
    )
    skip_small_buckets: bool = Field(False, description="leave out buckets that do not fill one batch")
    max_quarantined_share: float = Field(
        0.0, ge=0, le=1, description="of the inputs; a dataset that lost more is refused"
    )


@dataclass(frozen=True)
class LatentBatch:
    """One rank's share of a global batch.

    z_BChw: float32, sampled from the posterior, in the VAE's own scale; noise_BChw: standard normal;
    u_B: float32 in [0, 1), for the timestep; keep_B: bool, False where the condition is dropped, with
    the probability asked for; labels_B: int64, -1 for none; embeddings_B: (L, D) float16 or None each;
    low: the same images at a lower size, where an upsampler is trained.
    """

    keys_B: tuple[str, ...]
    z_BChw: Tensor
    noise_BChw: Tensor
    u_B: Tensor
    keep_B: Tensor
    labels_B: Tensor
    embeddings_B: tuple[NDArray[np.float16] | None, ...]
    low: LowLatents | None = None

    def split(self, parts: int) -> "list[LatentBatch]":
        """``parts`` batches, rows in order; sizes differ by one where that does not divide."""
        ends = [len(self.keys_B) * part // parts for part in range(parts + 1)]
        return [self._rows(slice(*bounds)) for bounds in pairwise(ends)]

    def _rows(self, rows: slice) -> "LatentBatch":
        some: dict[str, Any] = {n: None if value is None else value[rows] for n, value in vars(self).items()}
        return LatentBatch(**some)


class LatentLoader:
    """Batches of a latent dataset. Opening it reads the manifest, and no data.

    UserError where the dataset cannot be trained on: see `open_catalog`; more quarantined inputs than
    ``max_quarantined_share``; a bucket without one whole batch; a batch that lanes do not divide.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        config: LoaderConfig,
        *,
        batch_size: int,
        seed: int,
        condition_dropout: float = 0.0,
    ) -> None:
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.condition_dropout = condition_dropout
        self.lanes = config.lanes or default_lanes(batch_size)
        if batch_size % self.lanes:
            raise UserError(f"a batch of {batch_size} cannot be shared by {self.lanes} lanes evenly")
        _check_quarantine(dataset, config.max_quarantined_share)
        self.buckets = open_catalog(dataset, config.size_px)
        held = hold_out(self.buckets, config.validation_rows, seed)
        self.held_out = dict(zip((b.name for b in self.buckets), held, strict=True))
        self.orders = {b.name: self._order(b) for b in self.buckets}
        self._drop_small_buckets()
        low_px = config.low_size_px
        self.low = low_buckets(dataset, self.buckets, config.size_px, low_px) if low_px else None
        self.readers = {b.name: self._reader(dataset, b) for b in self.buckets}
        self.batches_per_epoch = sum(order.num_batches for order in self.orders.values())

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of every bucket that is trained on."""
        return [bucket.shape for bucket in self.buckets if bucket.name in self.orders]

    @property
    def upsampling_factor(self) -> int | None:
        """Rows of a latent to those of the low-resolution one beside it; None where there are no pairs."""
        first = self.buckets[0]
        return None if self.low is None else first.shape[1] // self.low[first.name].shape[1]

    def batches(self, *, rank: int, world: int, first: int = 0) -> Iterator[LatentBatch]:
        """Endless batches from global batch ``first`` on; rank r of w gets rows r, r + w, … of each."""
        return prefetched(self._batches(rank, world, first), self.config.prefetch_batches)

    def validation(self, *, rank: int, world: int) -> list[LatentBatch]:
        """The held-out rows in batches, row i on rank i mod w, with noise that is always the same."""
        return [batch for name in self.orders for batch in self._validation(name, rank, world)]

    def keys(self, *, rank: int, world: int, first: int = 0) -> Iterator[tuple[str, ...]]:
        """The keys of `batches`, without the work of sampling."""
        for _, rows in self._rows(rank, world, first):
            yield tuple(rows.keys_N)

    def _batches(self, rank: int, world: int, first: int) -> Iterator[LatentBatch]:
        for epoch, rows in self._rows(rank, world, first):
            yield self._sample(rows, epoch)

    def _rows(self, rank: int, world: int, first: int) -> Iterator[tuple[int, Rows]]:
        share = _Share(self.batch_size, self.lanes, rank, world)
        epoch, skip = divmod(first, self.batches_per_epoch)
        with ThreadPoolExecutor(READ_THREADS, "read-latents") as pool:
            while True:
                schedule = self._schedule(epoch)
                begun: dict[str, Iterator[Rows]] = {}
                for name, index in schedule[skip:]:
                    if name not in begun:
                        begun[name] = self._share_rows(name, epoch, index, share, pool)
                    yield epoch, next(begun[name])
                epoch, skip = epoch + 1, 0

    def _schedule(self, epoch: int) -> list[tuple[str, int]]:
        counts = {name: order.num_batches for name, order in self.orders.items()}
        return epoch_schedule(counts, seed=self.seed, epoch=epoch)

    def _share_rows(
        self, name: str, epoch: int, first: int, share: "_Share", pool: Executor
    ) -> Iterator[Rows]:
        """A rank's rows of one bucket's batches, from batch ``first`` on."""
        order, reader = self.orders[name], self.readers[name]
        start = first * order.rows_of_lane

        def read(window: Window) -> _Shuffled:
            return _Shuffled(reader.read(window.spans), window.order_N[max(0, start - window.first) :])

        lanes = [
            _chunks(_read_ahead(pool, read, order.windows(epoch, lane, start)), order.rows_of_lane)
            for lane in share.lanes
        ]
        for _ in range(first, order.num_batches):
            yield Rows.concat([next(lane) for lane in lanes]).take(share.order_B)

    def _sample(self, rows: Rows, epoch: int) -> LatentBatch:
        drawn = [self._draw(str(key), epoch, rows) for key in rows.keys_N]
        u_B3 = torch.from_numpy(np.stack([draw.u_3 for draw in drawn]))
        flip_B = (u_B3[:, 2] < 0.5).numpy() & self.config.mirror
        mean, std = (torch.from_numpy(moment).float() for moment in rows.sides(flip_B))
        low_drawn = [draw.low for draw in drawn if draw.low is not None]
        return LatentBatch(
            keys_B=tuple(rows.keys_N),
            z_BChw=mean + std * torch.from_numpy(np.stack([draw.posterior_Chw for draw in drawn])),
            noise_BChw=torch.from_numpy(np.stack([draw.noise_Chw for draw in drawn])),
            # In single precision a value just below 1 would be rounded to it.
            u_B=u_B3[:, 0].float().clamp(max=1 - 2**-24),
            keep_B=u_B3[:, 1] >= self.condition_dropout,
            labels_B=torch.from_numpy(rows.labels_N),
            embeddings_B=tuple(rows.embeddings_N),
            low=None if rows.low is None else sample_low(rows.low, flip_B, low_drawn),
        )

    def _draw(self, key: str, epoch: int, rows: Rows) -> "_Draw":
        rng = np.random.Generator(np.random.Philox(key=keyed_seed("row", self.seed, epoch, key)))
        u_3 = rng.random(3)
        # One call for both: it is the calls that cost.
        posterior, noise = rng.standard_normal((2, *rows.shape_Chw), np.float32)
        return _Draw(u_3, posterior, noise, None if rows.low is None else draw_low(rng, rows.low.shape_Chw))

    def _validation(self, name: str, rank: int, world: int) -> Iterator[LatentBatch]:
        held_G = self.held_out[name]
        spans = [Span(int(g), 0, int(held_G[g])) for g in np.flatnonzero(held_G)]
        if not spans:
            return
        rows = self.readers[name].read(spans)
        rows = rows.take(np.arange(rank, len(rows), world))
        step = max(1, self.batch_size // world)
        for at in range(0, len(rows), step):
            yield self._sample(rows.take(slice(at, at + step)), VALIDATION_EPOCH)

    def _reader(self, dataset: LatentDataset, bucket: BucketCatalog) -> RowGroupReader | PairReader:
        if self.low is None:
            return RowGroupReader(dataset, bucket)
        return PairReader(dataset, bucket, self.low[bucket.name])

    def _order(self, bucket: BucketCatalog) -> BucketOrder:
        return BucketOrder(
            bucket.name,
            self.held_out[bucket.name],
            bucket.rows_G,
            batch_size=self.batch_size,
            lanes=self.lanes,
            window_groups=self.config.window_groups,
            seed=self.seed,
        )

    def _drop_small_buckets(self) -> None:
        small = {name: order.num_rows for name, order in self.orders.items() if not order.num_batches}
        if small and not self.config.skip_small_buckets:
            name, num_rows = next(iter(small.items()))
            raise UserError(
                f"{num_rows} latents in bucket {name} cannot fill a batch of {self.batch_size}"
                + (f", nor can those of {len(small) - 1} other buckets" if len(small) > 1 else ""),
                do="use a smaller batch, or --train.data.skip-small-buckets true",
            )
        self.orders = {name: order for name, order in self.orders.items() if order.num_batches}
        if not self.orders:
            raise UserError(f"no bucket fills a batch of {self.batch_size}", do="use a smaller batch")


@dataclass(frozen=True)
class _Draw:
    u_3: NDArray[np.float64]
    posterior_Chw: NDArray[np.float32]
    noise_Chw: NDArray[np.float32]
    low: LowDraw | None


@dataclass(frozen=True)
class _Shuffled:
    """Rows as they were read, and the order in which they come: a shuffled copy would be as large again."""

    rows: Rows
    order_N: NDArray[np.int64]

    def take(self, start: int, stop: int) -> Rows:
        return self.rows.take(self.order_N[start:stop])


class _Share:
    """Which lanes a rank reads, and how their rows become its share of a batch.

    order_B: int64, over the rows of the lanes one lane after another.
    """

    def __init__(self, batch_size: int, lanes: int, rank: int, world: int) -> None:
        rows_B = np.arange(rank, batch_size, world)
        self.lanes = np.unique(rows_B % lanes).tolist()
        place = {lane: at for at, lane in enumerate(self.lanes)}
        rows_of_lane = batch_size // lanes
        self.order_B = np.array([place[row % lanes] * rows_of_lane + row // lanes for row in rows_B.tolist()])


def _chunks(windows: Iterable[_Shuffled], num_rows: int) -> Iterator[Rows]:
    """The rows of the windows, ``num_rows`` at a time; the last ones that are fewer are left out."""
    parts: list[Rows] = []
    missing = num_rows
    for window in windows:
        at = 0
        while at + missing <= len(window.order_N):
            parts.append(window.take(at, at + missing))
            yield Rows.concat(parts)
            at, parts, missing = at + missing, [], num_rows
        parts.append(window.take(at, len(window.order_N)))
        missing -= len(parts[-1])


def _read_ahead(pool: Executor, read: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``read`` of every item in order, a few of them at work ahead in ``pool``."""
    rest = iter(items)
    ahead = deque(pool.submit(read, item) for item in islice(rest, READ_AHEAD_WINDOWS))
    while ahead:
        found = ahead.popleft().result()
        ahead.extend(pool.submit(read, item) for item in islice(rest, 1))
        yield found


def prefetched(source: Iterator[T], depth: int) -> Iterator[T]:
    """The items of ``source``, up to ``depth`` of them made ahead by one thread.

    It makes half of them in one go: on a CPU each time that it wakes, it stops a thread of the training.
    """
    half = max(1, depth // 2)

    def some() -> list[T]:
        return list(islice(source, half))

    with ThreadPoolExecutor(1, "prefetch") as thread:
        ahead = deque(thread.submit(some) for _ in range(2))
        while items := ahead.popleft().result():
            ahead.append(thread.submit(some))
            yield from items


def _check_quarantine(dataset: LatentDataset, allowed: float) -> None:
    summary = dataset.stored_summary()
    quarantined: dict[str, int] = summary["quarantined"]  # type: ignore[assignment]
    inputs, lost = int(str(summary["inputs"])), sum(quarantined.values())
    if lost > allowed * inputs:
        needed = math.ceil(1000 * lost / inputs) / 1000
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(quarantined.items()))
        raise UserError(
            f"{lost} of {inputs} inputs of {dataset.url} are in quarantine ({reasons})",
            allowed=f"a share of {allowed:g}",
            do=f"repair them, or accept --train.data.max-quarantined-share {needed}",
        )
