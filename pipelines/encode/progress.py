"""How far a run is, how fast it goes, and how busy its pools are, from the reports of its units."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.encode.report import RunReport, UnitReport

__all__ = ["EncodeProgress", "Snapshot"]

# "Now" is that long; of the reports in it, no more are kept than this.
WINDOW_S = 20.0
WINDOW_REPORTS = 1000


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. rows and images are those of this run, rates in images per second.

    rows_left is an estimate from the mean shard so far, None until a shard is done; busy shares: of
    the encoders' time, and decode workers' seconds of work per second.
    """

    elapsed_s: float
    shards_done: int
    num_shards: int
    units: int
    rows: int
    rows_left: float | None
    images_per_s_now: float
    images_per_s_mean: float
    left_s: float | None
    encoders: int
    encoders_busy_share: float
    decoders_busy: float
    quarantined: dict[str, int]
    bytes: int


class EncodeProgress:
    """Takes the report of every committed unit; memory does not grow with their number."""

    def __init__(self, num_shards: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_shards, self.clock = num_shards, clock
        self.started_s = clock()
        self.run = RunReport()
        self.shards_done = 0
        self._recent: deque[tuple[float, UnitReport]] = deque(maxlen=WINDOW_REPORTS)

    def add(self, report: UnitReport) -> None:
        """One more unit is committed."""
        self.run.add(report)
        self.shards_done += report.is_final
        self._recent.append((self.clock(), report))

    def snapshot(self) -> Snapshot:
        """The state now."""
        now = self.clock()
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()
        elapsed = max(now - self.started_s, 1e-9)
        # As long as nothing has left the window, it began with the run.
        window = min(WINDOW_S, elapsed)
        recent = [report for _, report in self._recent]
        encoders = {(report.node, report.pid) for report in recent}
        encode_s = sum(report.encode_s for report in recent)
        mean = self.run.images / elapsed
        rows_left = self._rows_left()
        return Snapshot(
            elapsed_s=elapsed,
            shards_done=self.shards_done,
            num_shards=self.num_shards,
            units=self.run.units,
            rows=self.run.rows,
            rows_left=rows_left,
            images_per_s_now=sum(report.images for report in recent) / window,
            images_per_s_mean=mean,
            left_s=None if rows_left is None else rows_left * elapsed / max(self.run.rows, 1),
            encoders=len(encoders),
            encoders_busy_share=min(1.0, encode_s / (window * max(len(encoders), 1))),
            decoders_busy=sum(report.decode_s for report in recent) / window,
            quarantined=dict(sorted(self.run.quarantined.items())),
            bytes=self.run.bytes,
        )

    def _rows_left(self) -> float | None:
        if not self.shards_done:
            return None
        # Units of unfinished shards are in the mean too, so it is a little high at the beginning.
        return (self.num_shards - self.shards_done) * self.run.rows / self.shards_done
