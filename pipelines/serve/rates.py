"""How much one key may ask for: requests a minute, and requests at the same time.

Each key has a bucket of a minute's requests that fills up again within a minute. So whoever rested may ask
for a minute's worth at once, and nobody gets more than twice that in any minute. Libraries for this wait
where a server has to refuse (aiolimiter), or count in windows, behind a storage layer (limits).

Who is counted is known from the start: a stranger makes no state. What is counted is of this process; two
replicas allow twice as much. For one event loop.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Allowance", "OverLimit", "Rates", "Slot"]

MINUTE_S = 60.0


class Allowance(NamedTuple):
    """Both at least 1."""

    requests_per_minute: int
    max_concurrent: int


class OverLimit(Exception):
    """Not now. ``limit``: what is used up; ``retry_after_s``: when to ask again at the earliest."""

    def __init__(self, limit: Literal["rate", "concurrency"], allowed: int, retry_after_s: float) -> None:
        super().__init__(limit)
        self.limit, self.allowed, self.retry_after_s = limit, allowed, retry_after_s


@dataclass
class _Account:
    """``requests``: left at the time ``at_s``; ``active``: begun and not ended."""

    allowance: Allowance
    requests: float
    at_s: float
    active: int = 0

    def take(self, now_s: float) -> None:
        """One request, or `OverLimit` with nothing changed but the time."""
        rate, most = self.allowance
        self.requests = min(rate, self.requests + (now_s - self.at_s) * rate / MINUTE_S)
        self.at_s = now_s
        if self.active >= most:
            # Nobody knows when one ends; a second is the least that a client can be told.
            raise OverLimit("concurrency", most, 1.0)
        if self.requests < 1:
            raise OverLimit("rate", rate, (1 - self.requests) * MINUTE_S / rate)
        self.requests -= 1
        self.active += 1


class Slot:
    """A request's place among those at the same time; given back once, however often that is said."""

    def __init__(self, account: _Account) -> None:
        self._account: _Account | None = account

    def release(self) -> None:
        if self._account is not None:
            self._account.active -= 1
            self._account = None

    def __enter__(self) -> "Slot":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Rates:
    """The accounts of ``allowances``: name → what it may ask for. clock: seconds, never backwards."""

    def __init__(
        self, allowances: Mapping[str, Allowance], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        now = clock()
        self._accounts = {
            name: _Account(allowance, allowance.requests_per_minute, now)
            for name, allowance in allowances.items()
        }

    @property
    def active(self) -> dict[str, int]:
        """Requests that have begun and not ended, of every name there is an account for."""
        return {name: account.active for name, account in self._accounts.items()}

    def admit(self, name: str) -> Slot:
        """A slot, to be released at the end. `OverLimit` if there is none, KeyError for a stranger."""
        account = self._accounts[name]
        account.take(self._clock())
        return Slot(account)
