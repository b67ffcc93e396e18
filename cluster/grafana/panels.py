"""What the tables of panels are made of: queries for the three kinds of metrics, and the nodes' own row."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NODES", "ONLY", "RATE", "Panel", "Row", "gauge", "mean", "own", "quantiles", "rate"]

# Ray labels every metric with its session: a cluster, from its start to its end.
ONLY = 'SessionName=~"$session"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """A graph. queries: (PromQL, legend); unit: as Grafana names it; width: of 24."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    said: str = ""
    width: int = 8


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


def rate(counter: str, by: str = "") -> str:
    """Of a counter, per second, summed over processes."""
    return f"sum{f' by ({by})' if by else ''} (rate({counter}{{{ONLY}}}{RATE}))"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """Of what a histogram counted."""
    labels = ", ".join(label for label in ("le", by) if label)
    return f"histogram_quantile({share}, sum by ({labels}) (rate({histogram}_bucket{{{ONLY}}}{RATE})))"


def mean(histogram: str) -> str:
    """Of what a histogram counted."""
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def gauge(name: str, by: str = "", how: str = "sum") -> str:
    """Over processes."""
    return f"{how}{f' by ({by})' if by else ''} ({name}{{{ONLY}}})"


def own(name: str) -> str:
    """A gauge of a training, of the runs that are chosen."""
    return f'{name}{{{ONLY}, run=~"$run"}}'


def quantiles(histogram: str, by: str = "") -> list[tuple[str, str]]:
    """Half of them, and 95 in 100."""
    legend = f" {{{{{by}}}}}" if by else ""
    return [
        (quantile(0.5, histogram, by), f"median{legend}"),
        (quantile(0.95, histogram, by), f"95th percentile{legend}"),
    ]


NODES = Row(
    "Nodes",
    [
        Panel("CPU", "percent", [(gauge("ray_node_cpu_utilization", "ip", "avg"), "{{ip}}")], width=6),
        Panel("GPU", "percent", [(gauge("ray_node_gpus_utilization", "ip", "avg"), "{{ip}}")], width=6),
        Panel("memory", "bytes", [(gauge("ray_node_mem_used", "ip"), "{{ip}}")], width=6),
        # Ray counts these in MiB.
        Panel("GPU memory", "mbytes", [(gauge("ray_node_gram_used", "ip"), "{{ip}}")], width=6),
    ],
)
