"""What is usually said of latent diffusion's savings, beside what was computed and measured.

A claim is a range and nothing else; a finding compares it with a series of figures by f, and where the
two differ it says why, in figures of the same run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ldm.savings import LedgerRow

__all__ = [
    "CLAIMS",
    "LATENT_STEPS",
    "PIXEL_STEPS",
    "Claim",
    "Finding",
    "Kind",
    "Series",
    "computed_series",
    "findings",
    "measured_series",
]

Kind = Literal["positions", "values", "compute", "compute × steps", "memory"]
TOLERANCE = 0.1  # claims are rounded figures
PIXEL_STEPS, LATENT_STEPS = 1000, 50
STEP_FACTOR = PIXEL_STEPS / LATENT_STEPS


@dataclass(frozen=True)
class Claim:
    """Figure at ``base`` ÷ figure at ``f``, times ``factor``; of memory, f's share of base."""

    kind: Kind
    f: int
    base: int
    low: float
    high: float
    factor: float = 1.0

    def value(self, by_f: Mapping[int, float]) -> float:
        if self.kind == "memory":
            return by_f[self.f] / by_f[self.base]
        return self.factor * by_f[self.base] / by_f[self.f]


CLAIMS: Sequence[Claim] = (
    Claim("positions", 4, 1, 16, 16),
    Claim("positions", 8, 1, 64, 64),
    Claim("positions", 16, 1, 256, 256),
    Claim("values", 8, 1, 48, 48),
    Claim("compute", 4, 1, 16, 16),
    Claim("compute", 8, 1, 50, 60),
    Claim("compute", 16, 1, 200, 200),
    Claim("compute × steps", 8, 1, STEP_FACTOR * 50, STEP_FACTOR * 60, STEP_FACTOR),
    Claim("memory", 8, 4, 0.25, 0.25),
    Claim("memory", 16, 4, 0.09, 0.09),
)


@dataclass(frozen=True)
class Series:
    """A figure by f, and why it may lie above or below what is claimed of it."""

    name: str
    kind: Kind
    by_f: Mapping[int, float]
    if_more: Callable[[Claim], str]
    if_less: Callable[[Claim], str]


@dataclass(frozen=True)
class Finding:
    """``value`` of the series ``found_in`` for a claim. verdict: "holds", "more" or "less" than claimed."""

    claim: Claim
    found_in: str
    value: float
    verdict: Literal["holds", "more", "less"]
    reason: str


def findings(series: Sequence[Series]) -> Iterator[Finding]:
    """Every claim beside every series of its kind; compute tests the product with the steps too."""
    for claim in CLAIMS:
        for one in series:
            if one.kind == claim.kind or (one.kind, claim.kind) == ("compute", "compute × steps"):
                yield _finding(claim, one)


def _finding(claim: Claim, series: Series) -> Finding:
    value = claim.value(series.by_f)
    if value > claim.high * (1 + TOLERANCE):
        return Finding(claim, series.name, value, "more", series.if_more(claim))
    if value < claim.low * (1 - TOLERANCE):
        return Finding(claim, series.name, value, "less", series.if_less(claim))
    return Finding(claim, series.name, value, "holds", "")


def computed_series(of: str, rows: Mapping[int, LedgerRow]) -> list[Series]:
    """What a ledger says of positions, values, compute and memory."""

    def series(
        name: str,
        kind: Kind,
        figure: Callable[[LedgerRow], float],
        if_more: Callable[[Claim], str],
        if_less: Callable[[Claim], str],
    ) -> Series:
        by_f = {f: figure(row) for f, row in rows.items()}
        return Series(f"{name}, {of}, counted", kind, by_f, if_more, if_less)

    channels = _channels(rows)
    return [
        series("positions", "positions", lambda row: row.positions, channels, channels),
        series("values", "values", lambda row: row.values, channels, channels),
        series("FLOPs", "compute", lambda row: row.cost.flops, _attention(rows), _constant_layers),
        series(
            "activations", "memory", lambda row: row.cost.activation_bytes, _weights(rows), _activations(rows)
        ),
        series(
            "weights and activations",
            "memory",
            lambda row: row.peak_bytes,
            _weights(rows),
            _activations(rows),
        ),
    ]


def measured_series(
    of: str,
    rows: Mapping[int, LedgerRow],
    batch: int,
    seconds: Mapping[int, float],
    peak_bytes: Mapping[int, float],
) -> list[Series]:
    """Of steps of ``batch`` images: seconds a step, and memory that a process takes for model and step."""
    rate = {f: batch * row.cost.flops / seconds[f] for f, row in rows.items()}
    return [
        Series(f"seconds, {of}", "compute", seconds, _attention(rows), _throughput(rate)),
        Series(f"memory, {of}", "memory", peak_bytes, _unshrinking(rows, peak_bytes), _activations(rows)),
    ]


def _channels(rows: Mapping[int, LedgerRow]) -> Callable[[Claim], str]:
    return lambda claim: (
        f"f={claim.f} has {rows[claim.f].shape[0]} channels, f={claim.base} has "
        + str(rows[claim.base].shape[0])
    )


def _attention(rows: Mapping[int, LedgerRow]) -> Callable[[Claim], str]:
    def why(claim: Claim) -> str:
        base, row = rows[claim.base], rows[claim.f]
        others = [one.cost.flops - one.cost.attention_flops for one in (base, row)]
        shares = f"{base.attention_share:.0%} of the FLOPs at f={claim.base}, {row.attention_share:.0%} at"
        return (
            f"attention is quadratic in positions, and {shares} f={claim.f}; all else falls "
            f"{others[0] / others[1]:.0f}×, and the claim is at most {claim.high / claim.factor:g}×"
        )

    return why


def _constant_layers(claim: Claim) -> str:
    return f"layers that do not depend on positions, such as the time embedding, weigh more at f={claim.f}"


def _throughput(rate: Mapping[int, float]) -> Callable[[Claim], str]:
    def why(claim: Claim) -> str:
        return (
            f"few positions keep the machine less busy: {rate[claim.f] / 1e9:.1f} GFLOP/s (of the forward "
            f"pass) at f={claim.f}, {rate[claim.base] / 1e9:.1f} at f={claim.base}"
        )

    return why


def _activations(rows: Mapping[int, LedgerRow]) -> Callable[[Claim], str]:
    def why(claim: Claim) -> str:
        share = rows[claim.f].positions / rows[claim.base].positions
        return (
            f"activations fall with the positions, to {share:.4g}, since no score matrix is kept (the claim "
            "leaves more that does not fall)"
        )

    return why


def _weights(rows: Mapping[int, LedgerRow]) -> Callable[[Claim], str]:
    def why(claim: Claim) -> str:
        row = rows[claim.f]
        return (
            f"weights do not shrink with f: {row.weight_bytes / 1e6:,.0f} MB, "
            f"{row.weight_bytes / row.peak_bytes:.0%} of the whole at f={claim.f}"
        )

    return why


def _unshrinking(rows: Mapping[int, LedgerRow], peak_bytes: Mapping[int, float]) -> Callable[[Claim], str]:
    def why(claim: Claim) -> str:
        row, measured = rows[claim.f], peak_bytes[claim.f]
        return (
            f"weights ({row.weight_bytes / 1e6:,.0f} of {measured / 1e6:,.0f} MB), in training gradients and "
            "Adam's averages, and buffers of libraries do not shrink with f"
        )

    return why
