"""HTML pages without outside references, from the templates beside this module."""

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["data_url", "render", "svg_of_line", "svg_url"]


def render(template: str, filters: dict[str, Callable[..., str]] | None = None, **values: object) -> str:
    """A page; a value that the template needs and is not given is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("jobs"), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)


def data_url(data: bytes, media_type: str) -> str:
    """To stand in a page in the place of a file's name."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def svg_of_line(x: list[float], y: list[float], x_label: str, y_label: str, *, steps: bool = False) -> str:
    """A curve, as a data URL. steps: y holds from its x to the next one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, color="#2563eb", drawstyle="steps-post" if steps else "default")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_ylim(bottom=0 if steps else None)
    axes.grid(alpha=0.3)
    return svg_url(figure)


def svg_url(figure: "Figure") -> str:
    """A drawing, as a data URL; equal drawings are equal bytes."""
    import matplotlib

    buffer = io.BytesIO()
    # matplotlib would write the time, and names for parts that are new in every process.
    with matplotlib.rc_context({"svg.hashsalt": "ray-ldm"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_url(buffer.getvalue(), "image/svg+xml")
