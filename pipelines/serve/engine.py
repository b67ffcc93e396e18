"""The sampler's engine: one batched U-Net call after the other, over whatever is in flight.

Between two calls requests join, leave, are cancelled and are looked at. So a short one does not wait for a
long one to end, nobody works for a client that has gone, and a batch stays full although its requests have
different step counts. A request's image does not depend on its company: all that it depends on is in its
`ldm.sampling.Trajectory`.

Who is next: requests of one latent shape share calls, and the one that is due first goes first, as long as it
can still be in time. Shapes take turns by deficit round-robin (Shreedhar & Varghese 1995), in seconds. A
request that would be late, or make another late, is refused when it comes, not when it is late.

No Ray here. torch is called in one thread of its own, so that it does not hold up the event loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ldm.sampling import Trajectory
from pipelines.serve.device_thread import device_thread
from pipelines.serve.feasibility import Load, harms
from pipelines.serve.step_costs import LatentShape, StepCosts
from pipelines.serve.tickets import Observer, Reason, Refused, Stopped, Ticket, TooLate, Update, Work

__all__ = ["Engine"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Engine:
    """Takes steps of whatever it is given; `run` has to run as a task.

    step: `ldm.sampling.denoise_step` for a U-Net. costs: of its calls. max_requests: accepted and not done.
    max_slowdown: who would take longer than so many times what it takes alone, or make others take longer, is
    refused; None: whoever waits, waits. patience: a request without a deadline is due after so many times the
    time that it takes alone, which orders it among others and is no promise. thread: in which torch is
    called; engines on one device share it.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Trajectory]], None],
        costs: StepCosts,
        *,
        max_requests: int = 256,
        max_slowdown: float | None = None,
        patience: float = 5.0,
        observer: Observer | None = None,
        thread: ThreadPoolExecutor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step, self._costs, self._clock = step, costs, clock
        self._observer = observer or Observer()
        self.max_requests, self.max_slowdown, self.patience = max_requests, max_slowdown, patience
        self._tickets: dict[LatentShape, list[Ticket]] = {}
        self._turns: deque[LatentShape] = deque()
        self._credit_s: dict[LatentShape, float] = {}
        self._thread = thread or device_thread("unet")
        self._something_to_do = asyncio.Event()
        self._draining = False

    @property
    def num_requests(self) -> int:
        return sum(map(len, self._tickets.values()))

    @property
    def seconds_left(self) -> float:
        """Of work, for all that is accepted: what autoscaling goes by."""
        return sum(
            ticket.steps_left * self._full_step_s(shape) / self._lanes(ticket)
            for shape, tickets in self._tickets.items()
            for ticket in tickets
        )

    async def submit(self, work: Work) -> Ticket:
        """Accept a request. Raises `Refused`."""
        if not self._costs.knows(work.shape):
            # The first of its shape: nothing can be promised before a call was measured.
            await self._in_thread(self._costs.calibrate, work.shape)
        now = self._clock()
        alone_s = work.num_steps * self._costs.seconds(work.shape, work.rows)
        deadline = inf if work.deadline_s is None else now + work.deadline_s
        due = min(deadline, now + self.patience * alone_s)
        ticket = Ticket(work, now, due, deadline, asyncio.get_running_loop().create_future())
        reason = self._objection(ticket, now)
        if reason is not None:
            self._observer.refused(reason)
            raise Refused(reason, retry_after_s=self.seconds_left)
        self._add(ticket)
        return ticket

    async def run(self) -> None:
        """Take steps until cancelled; whoever is not done then fails with `Stopped`."""
        try:
            while True:
                self._retire()
                batch = self._next_batch()
                if not batch:
                    self._something_to_do.clear()
                    await self._something_to_do.wait()
                    continue
                await self._take_step(batch)
        finally:
            self._draining = True
            for ticket in self._all_tickets():
                ticket.fail(Stopped())

    async def drain(self) -> None:
        """Refuse what comes from now on, and wait for the rest."""
        self._draining = True
        pending = [ticket.done for ticket in self._all_tickets()]
        if pending:
            # Not `gather`, which would cancel them with whoever waits here.
            await asyncio.wait(pending)

    def _all_tickets(self) -> list[Ticket]:
        return [ticket for tickets in self._tickets.values() for ticket in tickets]

    def _objection(self, ticket: Ticket, now: float) -> Reason | None:
        if self._draining:
            return "draining"
        if self.num_requests >= self.max_requests or not self._has_room(ticket.work):
            return "full"
        others = self._tickets.get(ticket.work.shape, [])
        accepted = [self._load(other) for other in others]
        if harms(self._load(ticket), accepted, now, self._lanes(ticket)):
            return "deadline"
        return None

    def _has_room(self, work: Work) -> bool:
        """Whether nobody is slowed down too much, if each shape has one call for all of it."""
        if self.max_slowdown is None or not self._tickets:
            return True
        rows = {shape: [ticket.work.rows for ticket in tickets] for shape, tickets in self._tickets.items()}
        rows[work.shape] = [*rows.get(work.shape, []), work.rows]
        allowed = self.max_slowdown / len(rows)
        return all(
            sum(each) <= self._costs.rows_within(shape, allowed * self._costs.best_seconds(shape, min(each)))
            for shape, each in rows.items()
        )

    def _add(self, ticket: Ticket) -> None:
        shape = ticket.work.shape
        if shape not in self._tickets:
            self._tickets[shape] = []
            self._turns.append(shape)
            self._credit_s[shape] = 0.0
        self._tickets[shape].append(ticket)
        self._something_to_do.set()

    def _retire(self) -> None:
        """Forget who is done, has gone or is too late, and shapes that nobody wants any more."""
        now = self._clock()
        for shape, tickets in list(self._tickets.items()):
            for ticket in tickets:
                if ticket.deadline < now and not ticket.done.done():
                    ticket.fail(TooLate())
                if ticket.done.cancelled():
                    self._observer.cancelled(steps=ticket.steps_taken)
            self._tickets[shape] = [ticket for ticket in tickets if not ticket.done.done()]
            if not self._tickets[shape]:
                del self._tickets[shape], self._credit_s[shape]
                self._turns.remove(shape)

    def _next_batch(self) -> list[Ticket]:
        """Of the shape whose turn it is, those that are due first."""
        if not self._turns:
            return []
        batches = {shape: self._first_due(shape) for shape in self._turns}
        prices = {shape: self._costs.seconds(shape, _rows(batch)) for shape, batch in batches.items()}
        while self._credit_s[self._turns[0]] < prices[self._turns[0]]:
            self._turns.rotate(-1)
            self._credit_s[self._turns[0]] += max(prices.values())
        shape = self._turns[0]
        self._credit_s[shape] -= prices[shape]
        return batches[shape]

    def _first_due(self, shape: LatentShape) -> list[Ticket]:
        now, room = self._clock(), self._costs.best_rows(shape)
        batch: list[Ticket] = []
        step_s = self._step_s(shape)

        def urgency(ticket: Ticket) -> tuple[bool, float, float]:
            in_vain = now + ticket.steps_left * step_s > ticket.deadline
            return in_vain, ticket.due, ticket.accepted_at

        for ticket in sorted(self._tickets[shape], key=urgency):
            if not batch or ticket.work.rows <= room:
                batch.append(ticket)
                room -= ticket.work.rows
        return batch

    async def _take_step(self, batch: list[Ticket]) -> None:
        """One call; a failure is that of whose start or step failed, and of nobody else."""
        now = self._clock()
        for ticket in batch:
            if ticket.steps_taken == 0:
                self._observer.started(waited_s=ticket.begin(now))
        outcome = await self._in_thread(self._call, batch)
        for ticket in batch:
            error = outcome.failures.get(ticket)
            if error is not None:
                ticket.fail(error)
            else:
                self._account(ticket, outcome.previews.get(ticket))

    def _account(self, ticket: Ticket, preview: NDArray[np.uint8] | None) -> None:
        trajectory = ticket.trajectory
        assert trajectory is not None
        ticket.steps_taken += 1
        ticket.tell(Update(ticket.steps_taken, ticket.work.num_steps, preview))
        if trajectory.done and not ticket.done.done():
            ticket.done.set_result(trajectory.latent)

    def _call(self, batch: Sequence[Ticket]) -> "_Outcome":
        """In the thread: start who has not begun, take the step, draw who is to be seen."""
        failures, previews = self._advance(batch), dict[Ticket, NDArray[np.uint8]]()
        for ticket in batch:
            if ticket not in failures and ticket.is_due_a_preview:
                try:
                    previews[ticket] = self._draw(ticket)
                except Exception as error:  # noqa: BLE001  # it is told to whoever asked
                    failures[ticket] = error
        return _Outcome(failures, previews)

    def _draw(self, ticket: Ticket) -> NDArray[np.uint8]:
        assert ticket.work.preview is not None and ticket.trajectory is not None
        started = self._clock()
        preview = ticket.work.preview(ticket.trajectory)
        self._observer.previewed(seconds=self._clock() - started)
        return preview

    def _advance(self, batch: Sequence[Ticket]) -> dict[Ticket, Exception]:
        """Whose start or step failed, and why."""
        failures: dict[Ticket, Exception] = {}
        for ticket in batch:
            try:
                ticket.trajectory = ticket.trajectory or ticket.work.start()
            except Exception as error:  # noqa: BLE001  # it is told to whoever asked
                failures[ticket] = error
        able = [ticket for ticket in batch if ticket not in failures]
        if not able:
            return failures
        started = self._clock()
        try:
            self._step([ticket.trajectory for ticket in able if ticket.trajectory])
        except Exception as error:  # noqa: BLE001  # as above
            if len(able) == 1:
                return failures | {able[0]: error}
            # One of them; alone each fails for itself.
            for ticket in able:
                failures |= self._advance([ticket])
            return failures
        rows = _rows(able)
        for ticket in able:
            ticket.rows_shared += rows
        seconds = self._clock() - started
        self._costs.observe(able[0].work.shape, rows, seconds)
        room = self._costs.best_rows(able[0].work.shape)
        self._observer.stepped(seconds=seconds, rows=rows, room=room)
        return failures

    def _load(self, ticket: Ticket) -> Load:
        seconds = ticket.steps_left * self._step_s(ticket.work.shape)
        return Load(ticket.due, ticket.deadline, seconds)

    def _step_s(self, shape: LatentShape) -> float:
        """Of a step in full batches, slower by as many shapes as share the time."""
        sharing = len(self._turns) + (shape not in self._tickets)
        return self._full_step_s(shape) * sharing

    def _full_step_s(self, shape: LatentShape) -> float:
        return self._costs.seconds(shape, self._costs.best_rows(shape))

    def _lanes(self, ticket: Ticket) -> int:
        return max(1, self._costs.best_rows(ticket.work.shape) // ticket.work.rows)

    async def _in_thread(
        self, call: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result:
        return await asyncio.wrap_future(self._thread.submit(call, *arguments, **named))


class _Outcome(NamedTuple):
    """Of a call."""

    failures: dict[Ticket, Exception]
    previews: dict[Ticket, NDArray[np.uint8]]


def _rows(batch: Sequence[Ticket]) -> int:
    return sum(ticket.work.rows for ticket in batch)
