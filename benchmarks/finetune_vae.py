"""Fine-tuning the default f=8 VAE on a domain that it has never seen: rendered text.

    python benchmarks/finetune_vae.py out/finetune

Renders pages of English words (those of Python's own documentation) in the fonts that matplotlib carries, on
coloured paper; words, colours and places of the held-out pages are others than those of the training pages.
Runs `ldm evaluate recon`, `ldm train-vae` and `ldm evaluate recon` again, and prints held-out PSNR, SSIM and
MS-SSIM before and after. The protocol is that of the model cards: 256 px, the posterior's mean, 8 bits.
On two cores (AMD EPYC, no GPU) it takes about 13 minutes; what came out is in docs/training.md.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.images import encode_png
from pipelines.shards import Sample, write_tar

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic")
SIZE_PX = 256
NUM_TRAIN, NUM_HELD_OUT = 256, 48
TRAIN = {
    "init": "f8",
    "crop_px": 64,
    "zoom_max": 1.0,
    "crops_per_megapixel": 250,
    "batch_size": 16,
    "steps": 500,
    "learning_rate": 5e-4,
    "warmup_steps": 50,
    "kl_weight": 1e-5,
    "ema_decay": 0.99,
    "log_every": 50,
    "dtype": "fp16",
}


def main(out: Path) -> None:
    """Write the pages, measure, fine-tune, measure; prints a JSON line at the end."""
    words = sorted(set(re.findall(r"[A-Za-z]{2,12}", " ".join(topics.values()))))
    _write_pages(out / "train", words[0::2], NUM_TRAIN, seed=0)
    _write_pages(out / "heldout", words[1::2], NUM_HELD_OUT, seed=1)
    before = _evaluate(out, "f8", "before")
    started_s = time.perf_counter()
    options = [f"--train.{name.replace('_', '-')}={value}" for name, value in TRAIN.items()]
    _ldm("train-vae", str(out / "train"), str(out / "vae"), *options)
    minutes = (time.perf_counter() - started_s) / 60
    after = _evaluate(out, str(out / "vae"), "after")
    gain_db = after["psnr_db"] - before["psnr_db"]
    print(f"{minutes:.1f} minutes of train-vae, held-out PSNR {gain_db:+.2f} dB")
    print(json.dumps({"before": before, "after": after, "gain_db": gain_db, "minutes": minutes}))


def _evaluate(out: Path, vae: str, name: str) -> dict[str, float]:
    page = out / f"{name}.html"
    output = _ldm("evaluate", "recon", str(out / "heldout"), "--vae", vae, "--page", str(page), "--json")
    result = json.loads(output.splitlines()[-1])
    figures = {name: result[name] for name in ("psnr_db", "ssim", "ms_ssim")}
    print(f"{name}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    return figures


def _ldm(*arguments: str) -> str:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _write_pages(folder: Path, words: Sequence[str], count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pages = (Sample(f"{index:04d}", encode_png(np.asarray(_page(words, rng)))) for index in range(count))
    write_tar(folder / "pages.tar", pages)


def _page(words: Sequence[str], rng: np.random.Generator) -> Image.Image:
    """Lines of words in one font, dark on light or light on dark."""
    light, dark = rng.integers(170, 256, 3), rng.integers(0, 90, 3)
    paper, ink = (light, dark) if rng.random() < 0.8 else (dark, light)
    page = Image.new("RGB", (SIZE_PX, SIZE_PX), tuple(paper.tolist()))
    size_px = int(rng.integers(12, 30))
    font = ImageFont.truetype(str(_font_folder() / f"{rng.choice(FONTS)}.ttf"), size_px)
    draw = ImageDraw.Draw(page)
    for top in range(int(rng.integers(0, 10)), SIZE_PX, int(size_px * 1.4)):
        line = " ".join(rng.choice(words, 20))
        draw.text((int(rng.integers(0, 12)), top), line, fill=tuple(ink.tolist()), font=font)
    return page


def _font_folder() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
