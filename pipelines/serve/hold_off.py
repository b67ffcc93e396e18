"""What an ingress knows of a full sampler, so that it need not ask again for every request that comes.

Under overload nearly every request is refused, and each refusal would take time of the sampler's replica that
it needs for its work. A full replica has room again when a request of it ends: until one of this ingress's
has, its last answer still holds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from math import inf

from pipelines.serve.messages import Accepted, Rejected, SampleEvent

__all__ = ["HoldOff"]

# Requests of other ingresses end, too, and replicas are added: then it is worth to ask again anyway.
HOLD_S = 0.25
# So long after an answer of no requests ask one after the other, so that one no is an answer to all who wait.
CROWDED_S = 1.0


class HoldOff:
    """Between one kind of requests, which have room at the same time, and the sampler.

    held: is told of each that is refused without having asked.
    """

    def __init__(
        self, held: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._held, self._clock = held, clock
        self._refusal: Rejected | None = None
        self._refused_at = -inf
        self._asking = asyncio.Lock()

    def refusal(self) -> Rejected | None:
        """What a request is told without asking the sampler, where it is known to be full."""
        if self._clock() - self._refused_at > HOLD_S:
            self._refusal = None
        if self._refusal is not None:
            self._held()
        return self._refusal

    async def events(self, ask: Callable[[], AsyncIterator[SampleEvent]]) -> AsyncIterator[SampleEvent]:
        """Those of ``ask``, which is a generator, or the known refusal."""
        refusal = self.refusal()
        if refusal is not None:
            yield refusal
            return
        async with aclosing(ask()) as answers:  # type: ignore[type-var]  # it is a generator
            first = await self._first(answers)
            if isinstance(first, Rejected):
                yield first
                return
            try:
                yield first
                async for event in answers:
                    yield event
            finally:
                self._refusal = None

    async def _first(self, answers: AsyncIterator[SampleEvent]) -> SampleEvent:
        if self._clock() - self._refused_at > CROWDED_S:
            return self._learned(await anext(answers))
        async with self._asking:
            # Said to another one, while this one waited.
            return self.refusal() or self._learned(await anext(answers))

    def _learned(self, answer: SampleEvent) -> SampleEvent:
        if isinstance(answer, Rejected) and answer.reason == "full":
            self._refusal, self._refused_at = answer, self._clock()
        assert isinstance(answer, (Accepted, Rejected))
        return answer
