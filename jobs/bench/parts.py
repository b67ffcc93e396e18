"""A bench runs its parts one after the other, and tells the figures of each when it has them."""

from collections.abc import Callable, Iterable, Mapping

__all__ = ["run_parts"]


def run_parts(parts: Iterable[tuple[str, Callable[[], Mapping[str, float]]]]) -> dict[str, object]:
    """The figures of all parts by name."""
    result: dict[str, object] = {}
    for name, measure in parts:
        print(f"— {name}", flush=True)
        figures = measure()
        for figure, value in figures.items():
            print(f"  {figure:28} {value:.4g}", flush=True)
        result |= figures
    return result
