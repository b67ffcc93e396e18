"""What ``ldm savings`` found, as tables of text for the terminal and the page, and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ldm.device_fit import ALLOWANCE_BYTES, Fit, SizePeak, fits
from ldm.savings import LedgerRow
from ldm.savings_claims import (
    LATENT_STEPS,
    PIXEL_STEPS,
    Claim,
    Finding,
    Series,
    computed_series,
    findings,
    measured_series,
)

if TYPE_CHECKING:
    from jobs.bench.reduced import Reduced

__all__ = ["SavingsResult", "Sheet", "StepFigures", "as_json", "print_sheets", "reduced_sheets", "sheets"]


@dataclass(frozen=True)
class StepFigures:
    """Of one process: median seconds of a step; bytes that model and steps took at most."""

    seconds: float
    peak_bytes: float
    weight_bytes: int


@dataclass(frozen=True)
class SavingsResult:
    """Ledgers of the layout that is only counted and of the one that is run here too, by f.

    measured: kind of step → f → figures, empty where nothing was measured. machine: what it ran on.
    """

    counted_name: str
    counted: Mapping[int, LedgerRow]
    run_here_name: str
    run_here: Mapping[int, LedgerRow]
    batch_size: int
    machine: str
    measured: Mapping[str, Mapping[int, StepFigures]]
    size_peaks: Sequence[SizePeak]

    @cached_property
    def series(self) -> list[Series]:
        found = computed_series(self.counted_name, self.counted)
        found += computed_series(self.run_here_name, self.run_here)
        for kind, by_f in self.measured.items():
            found += measured_series(
                f"a step of {kind}, {self.run_here_name}, measured",
                self.run_here,
                self.batch_size,
                {f: one.seconds for f, one in by_f.items()},
                {f: one.peak_bytes for f, one in by_f.items()},
            )
        return found

    @cached_property
    def findings(self) -> list[Finding]:
        return list(findings(self.series))

    @cached_property
    def fits(self) -> list[Fit]:
        return list(fits(self.size_peaks)) if self.size_peaks else []


class Sheet(NamedTuple):
    """A table of text."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def sheets(result: SavingsResult) -> list[Sheet]:
    """All tables, those of parts that were left out excepted."""
    found = [
        _ledger(f"One step of one image: {result.counted_name}, counted, never run here", result.counted),
        _ledger(f"One step of one image: {result.run_here_name}, counted", result.run_here),
    ]
    if result.measured:
        found.append(_measured(result))
    found.append(_claims(result.findings))
    if result.size_peaks:
        found += [_sizes(result.size_peaks), _fits(result.fits)]
    return found


def print_sheets(found: Sequence[Sheet]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for sheet in found:
        table = Table(*sheet.headings, title=sheet.title, title_justify="left", caption=sheet.note or None)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)


def as_json(result: SavingsResult) -> dict[str, object]:
    """Plain values: ledgers and measurements by f, findings, sizes."""
    ledgers = {"counted": result.counted, "run_here": result.run_here}
    return {
        **{name: {str(f): _row_json(row) for f, row in rows.items()} for name, rows in ledgers.items()},
        "machine": result.machine,
        "measured": {
            kind: {str(f): asdict(one) for f, one in by_f.items()} for kind, by_f in result.measured.items()
        },
        "findings": [asdict(finding) for finding in result.findings],
        "sizes": [asdict(peak) for peak in result.size_peaks],
        "fits": [asdict(fit) for fit in result.fits],
    }


def reduced_sheets(rows: "Sequence[Reduced]", extractor: str, machine: str) -> list[Sheet]:
    """fp32 beside narrower forms, a table for each network."""
    headings = "form", "weights", "a call takes", "s a call", "speed", "PSNR, dB", "FD", "repeated"
    note = (
        f"Calls take turns. PSNR, and FD by features of the network {extractor!r}, are against fp32. int8 is "
        f"of linear layers alone. Repeated: overflows, decoded in fp32. {machine}."
    )
    return [
        Sheet(network, headings, [_reduced_cells(row) for row in rows if row.network == network], note)
        for network in dict.fromkeys(row.network for row in rows)
    ]


def _reduced_cells(row: "Reduced") -> Sequence[str]:
    return (
        row.form,
        *map(_mb, (row.weight_bytes, row.peak_bytes)),
        f"{row.seconds:.3g}",
        f"{row.speed:.2f}",
        f"{row.psnr_db:.1f}",
        f"{row.fd:.2g}",
        "" if row.num_repeated is None else str(row.num_repeated),
    )


def _row_json(row: LedgerRow) -> dict[str, object]:
    return {**asdict(row), "positions": row.positions, "values": row.values, "peak_bytes": row.peak_bytes}


def _ledger(title: str, rows: Mapping[int, LedgerRow]) -> Sheet:
    headings = ("f", "shape", "values", "positions", "GFLOP", "of these attention", "parameters")
    return Sheet(
        title,
        (*headings, "weights", "activations", "both"),
        [
            (
                str(f),
                "×".join(map(str, row.shape)),
                f"{row.values:,}",
                f"{row.positions:,}",
                f"{row.cost.flops / 1e9:,.1f}",
                f"{row.attention_share:.0%}",
                f"{row.num_params:,}",
                *map(_mb, (row.weight_bytes, row.cost.activation_bytes, row.peak_bytes)),
            )
            for f, row in rows.items()
        ],
        "Attention counts without a matrix of positions by positions.",
    )


def _measured(result: SavingsResult) -> Sheet:
    return Sheet(
        f"Steps at batch size {result.batch_size}: {result.run_here_name}, measured here",
        ("step", "f", "seconds, median", "memory of model and step"),
        [
            (kind, str(f), f"{one.seconds:.4g}", _mb(one.peak_bytes))
            for kind, by_f in result.measured.items()
            for f, one in by_f.items()
        ],
        "Memory is what the process's resident size grew by at most; each row is a process of its own. "
        f"{result.machine}.",
    )


def _claims(found: Sequence[Finding]) -> Sheet:
    rows: list[Sequence[str]] = []
    for number, one in enumerate(found):
        is_first = number == 0 or found[number - 1].claim != one.claim
        verdict = "holds" if one.verdict == "holds" else f"DIFFERS: {one.verdict}"
        claim = (told(one.claim), _range(one.claim)) if is_first else ("", "")
        rows.append((*claim, _value(one.claim, one.value), one.found_in, verdict, one.reason))
    headings = "claim", "claimed", "found", "in", "verdict", "why"
    return Sheet("What is usually claimed, and what was found", headings, rows, "A claim holds within 10 %.")


def told(claim: Claim) -> str:
    """What a claim is about, such as ``compute, f=1 ÷ f=8``."""
    if claim.kind == "memory":
        return f"memory, f={claim.f} as a share of f={claim.base}"
    if claim.kind == "compute × steps":
        return f"compute, {PIXEL_STEPS} steps at f={claim.base} ÷ {LATENT_STEPS} at f={claim.f}"
    return f"{claim.kind}, f={claim.base} ÷ f={claim.f}"


def _range(claim: Claim) -> str:
    low, high = _value(claim, claim.low), _value(claim, claim.high)
    return low if low == high else f"{low} to {high}"


def _value(claim: Claim, value: float) -> str:
    return f"{value:.3g}" if claim.kind == "memory" else f"{value:,.0f}×"


def _sizes(peaks: Sequence[SizePeak]) -> Sheet:
    return Sheet(
        "Device memory of Stable Diffusion 2.1's layout: fp16, one image, guidance; counted, never run here",
        ("side", "weights", "denoise", "decode", "decode in tiles", "needs", "needs with tiles"),
        [
            (
                f"{peak.size_px} px",
                *map(_mb, (peak.weight_bytes, peak.denoise_bytes, peak.decode_bytes)),
                f"≤ {_mb(peak.tiled_decode_bytes)}",
                *(_mb(peak.needs(tiled=tiled)) for tiled in (False, True)),
            )
            for peak in peaks
        ],
        f"Denoising and decoding come one after the other. With {ALLOWANCE_BYTES / 1e9:g} GB allowed for "
        "CUDA's context and workspaces; without the text encoder.",
    )


def _fits(found: Sequence[Fit]) -> Sheet:
    return Sheet(
        "What fits",
        ("device", "claimed", "decoding", "largest side counted that fits", "verdict"),
        [
            (
                f"{fit.device_bytes / 1e9:g} GB",
                f"{fit.claimed_px}²",
                "in tiles" if fit.tiled else "whole",
                f"{fit.largest_px}²",
                _fit_verdict(fit),
            )
            for fit in found
        ],
    )


def _fit_verdict(fit: Fit) -> str:
    if fit.largest_px == fit.claimed_px:
        return "holds"
    return "holds, and larger fits" if fit.largest_px > fit.claimed_px else "DIFFERS: it does not fit"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:,.1f} MB"
