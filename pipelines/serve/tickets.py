"""What is asked of a sampler's engine, and what whoever asked is given."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.sampling import Trajectory
from pipelines.serve.step_costs import LatentShape

__all__ = ["Observer", "Reason", "Refused", "Stopped", "Ticket", "TooLate", "Update", "Work"]

Reason = Literal["deadline", "full", "draining"]


class Refused(Exception):
    """Not accepted. ``retry_after_s``: when it may be worth to ask again."""

    def __init__(self, reason: Reason, retry_after_s: float) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s = reason, retry_after_s


class Stopped(Exception):
    """The engine ended before the request did."""


class TooLate(Exception):
    """Accepted, but not done at its deadline: calls became slower than they were measured."""


class Update(NamedTuple):
    """How far a request is: ``step`` of ``num_steps``; preview: uint8 (h, w, 3), where one was due."""

    step: int
    num_steps: int
    preview: NDArray[np.uint8] | None


@dataclass(frozen=True, kw_only=True)
class Work:
    """A request to an engine.

    start: makes the trajectory, in the engine's thread. shape: of its latent. num_steps: that it will take.
    rows: of each call, 2 with guidance. deadline_s: it has to be done within; None: no hurry.
    preview: draws a trajectory, in the engine's thread, at every ``preview_every``-th step but the last;
    0: never.
    """

    start: Callable[[], Trajectory]
    shape: LatentShape
    num_steps: int
    rows: int
    deadline_s: float | None = None
    preview_every: int = 0
    preview: Callable[[Trajectory], NDArray[np.uint8]] | None = None


class Observer:
    """Is told what happens, for metrics. ``stepped`` comes from the engine's thread."""

    def stepped(self, *, seconds: float, rows: int, room: int) -> None:
        """A call ended; ``room``: rows that it could have had."""

    def started(self, *, waited_s: float) -> None:
        """A request has its first step."""

    def previewed(self, *, seconds: float) -> None:
        """A preview was drawn. From the engine's thread, too."""

    def refused(self, reason: Reason) -> None: ...

    def cancelled(self, *, steps: int) -> None:
        """A client left; ``steps`` had been taken."""


@dataclass(eq=False)
class Ticket:
    """An accepted request. ``done``: its latent (C, H, W), or why there is none.

    waited_s: until its first step; rows_shared: sum of the rows of all calls that it was in.
    """

    work: Work
    accepted_at: float
    due: float
    deadline: float
    done: "asyncio.Future[Tensor]"
    trajectory: Trajectory | None = None
    steps_taken: int = 0
    waited_s: float = 0.0
    rows_shared: int = 0
    _latest: Update | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def steps_left(self) -> int:
        return self.work.num_steps - self.steps_taken

    @property
    def is_due_a_preview(self) -> bool:
        """After the step that is being taken."""
        every, step = self.work.preview_every, self.steps_taken + 1
        return bool(every) and step % every == 0 and step < self.work.num_steps

    def begin(self, now: float) -> float:
        """Its first step is about to be taken; returns how long it waited for that, in seconds."""
        self.waited_s = now - self.accepted_at
        return self.waited_s

    def cancel(self) -> None:
        """No step is taken for it beyond the one that runs; nothing happens if it is done."""
        self.done.cancel()
        self._changed.set()

    async def updates(self) -> AsyncIterator[Update]:
        """Every state that the reader is fast enough for, until it is done, cancelled or failed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            latest, self._latest = self._latest, None
            if latest is not None:
                yield latest
            if self.done.done():
                return

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            # So that asyncio does not complain where whoever asked has gone without a word.
            self.done.exception()
        self._changed.set()

    def tell(self, update: Update) -> None:
        """For `updates`; a state that nobody has read yet is replaced, but for its preview."""
        if update.preview is None and self._latest is not None:
            update = update._replace(preview=self._latest.preview)
        self._latest = update
        self._changed.set()
