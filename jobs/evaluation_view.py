"""How figures are told, and the pins without which a figure cannot be compared with another."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ldm.bootstrap import BootstrapConfig, Figure
    from ldm.features import Extractor
    from ldm.preprocess import Preprocess

__all__ = [
    "FIGURES",
    "FigureRow",
    "FigureText",
    "as_json",
    "extractor_pins",
    "figure_rows",
    "folder_sha256",
    "preprocess_pins",
    "protocol_pins",
]


class FigureText(NamedTuple):
    """A figure's name, how it is written, and whether more is better."""

    name: str
    format: str
    is_better: str


FIGURES: Mapping[str, FigureText] = {
    "psnr_db": FigureText("PSNR dB", "{:.2f}", "more"),
    "ssim": FigureText("SSIM", "{:.4f}", "more"),
    "ms_ssim": FigureText("MS-SSIM", "{:.4f}", "more"),
    "distance": FigureText("perceptual distance", "{:.4f}", "less"),
    "rfid": FigureText("rFID", "{:.3f}", "less"),
    "rkid": FigureText("rKID", "{:.5f}", "less"),
    "fid": FigureText("FID", "{:.3f}", "less"),
    "kid": FigureText("KID", "{:.5f}", "less"),
    "precision": FigureText("precision", "{:.3f}", "more"),
    "recall": FigureText("recall", "{:.3f}", "more"),
}


class FigureRow(NamedTuple):
    """One line of a table, as text."""

    name: str
    value: str
    interval: str
    is_better: str


def figure_rows(figures: "Mapping[str, Figure | None]") -> list[FigureRow]:
    """The figures that there are, in the order of `FIGURES`."""
    return [_row(text, figure) for name, text in FIGURES.items() if (figure := figures.get(name)) is not None]


def _row(text: FigureText, figure: "Figure") -> FigureRow:
    interval = ""
    if figure.interval is not None:
        interval = " to ".join(text.format.format(end) for end in figure.interval)
    return FigureRow(text.name, text.format.format(figure.value), interval, text.is_better)


def as_json(figures: "Mapping[str, Figure | None]") -> dict[str, object]:
    """name → value (None where there is none), and ``intervals``: name → [low, high]."""
    values: dict[str, object] = {name: f.value if f else None for name, f in figures.items()}
    return {**values, "intervals": {name: f.interval for name, f in figures.items() if f and f.interval}}


def preprocess_pins(preprocess: "Preprocess") -> dict[str, str]:
    """Crop, size and resize by name, then every other option."""
    chosen = preprocess.model_dump(mode="json")
    crop = f"{preprocess.crop}, seed {preprocess.seed}" if preprocess.crop == "random" else preprocess.crop
    named = {
        "crop": crop,
        "size": f"{preprocess.sizes_px[0]} px",
        "resize": f"{preprocess.resize_filter}, antialiased",
    }
    left = {k: v for k, v in chosen.items() if k not in ("crop", "seed", "sizes_px", "resize_filter")}
    return {**named, "other preprocessing": ", ".join(f"{name} {value}" for name, value in left.items())}


def extractor_pins(extractor: "Extractor", keep: int) -> dict[str, str]:
    """The network whose features are compared, and of how many images all pairs of features are."""
    return {
        "extractor": f"{extractor.name}, {extractor.num_features} features",
        "extractor sha256": extractor.fingerprint,
        "FID": "of all images, unbiased covariance",
        "KID": "kernel (x·y / D + 1)³, all pairs of kept images",
        "kept images": f"at most {keep}, those with the smallest keyed hashes",
    }


def protocol_pins(bootstrap: "BootstrapConfig", packages: Iterable[str]) -> dict[str, str]:
    """Rounding, dtype, how intervals were computed, versions."""
    percent = f"{100 * bootstrap.level:g} %"
    return {
        "rounding": "to the nearest of 256 levels before anything is measured",
        "dtype": "networks float32, figures float64",
        "intervals": f"{percent}, bootstrap of {bootstrap.resamples} resamples "
        f"({bootstrap.fid_resamples} of FID), seed {bootstrap.seed}",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def folder_sha256(folder: Path, suffixes: Sequence[str] = (".safetensors", ".json")) -> str:
    """Of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in suffixes):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
