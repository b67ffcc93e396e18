"""The end of an ingress: it takes no more work, and what is on its way is answered."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Drain"]


class Drain:
    """begun: new work is refused. on_its_way: requests that have been let in and are not answered yet."""

    def __init__(self) -> None:
        self.begun = False
        self.on_its_way = 0

    def begin(self) -> int:
        """From now on; returns how many are still on their way."""
        self.begun = True
        return self.on_its_way

    @contextmanager
    def one(self) -> Iterator[None]:
        """A request is on its way inside the block."""
        self.on_its_way += 1
        try:
            yield
        finally:
            self.on_its_way -= 1
