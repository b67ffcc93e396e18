"""What a person sees while `ldm encode` runs: one live line on a terminal, JSON lines elsewhere."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO

from pipelines.encode.progress import EncodeProgress, Snapshot
from pipelines.encode.report import UnitReport

__all__ = ["encode_view", "text_of"]

REDRAW_EVERY_S = 0.5
JSON_EVERY_S = 10.0


@contextmanager
def encode_view(num_shards: int, stream: TextIO | None = None) -> Iterator[Callable[[UnitReport], None]]:
    """Yields what is to be called for every committed unit; nothing is shown where no shard is left.

    It is drawn from a thread of its own, so that one sees time pass while no unit is finished.
    """
    stream = stream or sys.stderr
    progress, lock = EncodeProgress(num_shards), threading.Lock()

    def watch(report: UnitReport) -> None:
        with lock:
            progress.add(report)

    def snapshot() -> Snapshot:
        with lock:
            return progress.snapshot()

    if not num_shards:
        yield watch
        return
    ended = threading.Event()
    show = _live if stream.isatty() else _json_lines
    thread = threading.Thread(target=show, args=(snapshot, ended, stream), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def _live(snapshot: Callable[[], Snapshot], ended: threading.Event, stream: TextIO) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=stream), auto_refresh=False) as live:
        while not ended.wait(REDRAW_EVERY_S):
            live.update(text_of(snapshot()), refresh=True)
        live.update(text_of(snapshot()), refresh=True)


def _json_lines(snapshot: Callable[[], Snapshot], ended: threading.Event, stream: TextIO) -> None:
    while not ended.wait(JSON_EVERY_S):
        print(json.dumps(asdict(snapshot())), file=stream, flush=True)
    print(json.dumps(asdict(snapshot())), file=stream, flush=True)


def text_of(now: Snapshot) -> str:
    """Two lines for a terminal."""
    total = "" if now.rows_left is None else f" of about {now.rows + now.rows_left:.0f}"
    left = "" if now.left_s is None else f", {_clock(now.left_s)} left"
    bad = ", ".join(f"{count} {reason}" for reason, count in now.quarantined.items()) or "none"
    return (
        f"{now.rows}{total} images, shard {now.shards_done} of {now.num_shards}, "
        f"{now.images_per_s_now:.1f} images/s now, {now.images_per_s_mean:.1f} on average{left}\n"
        f"{now.encoders} encoders {now.encoders_busy_share:.0%} busy, {now.decoders_busy:.1f} decoders busy, "
        f"{now.bytes / 1e6:.1f} MB, quarantined: {bad}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
