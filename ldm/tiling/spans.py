"""Intervals of rows or columns, and the rectangles that two of them make."""

from typing import NamedTuple

__all__ = ["Rect", "Span"]


class Span(NamedTuple):
    """Rows or columns ``start`` to ``stop``, without the last."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def within(self, outer: "Span") -> slice:
        """Where these rows lie in an array that holds the rows ``outer``."""
        assert outer.start <= self.start and self.stop <= outer.stop, f"{self} is not inside {outer}"
        return slice(self.start - outer.start, self.stop - outer.start)

    def common(self, other: "Span") -> "Span":
        """What is in both; of no or negative size where that is nothing."""
        return Span(max(self.start, other.start), min(self.stop, other.stop))

    def clip(self, size: int) -> "Span":
        """What of it lies in 0 … ``size``."""
        return self.common(Span(0, size))

    def scaled(self, factor: int) -> "Span":
        return Span(self.start * factor, self.stop * factor)


class Rect(NamedTuple):
    """A part of a map."""

    rows: Span
    columns: Span

    @property
    def area(self) -> int:
        return self.rows.size * self.columns.size
