"""A small latent cascade on photographs, 8 → 32 → 128 latents, beside bicubic interpolation of the latents.

    python benchmarks/cascade.py out/cascade

Collects the photographs (`benchmarks/photos.py`), cuts crops of 256 px out of them and encodes each crop at
256 and 64 px with the f8 VAE. The first upsampler learns from crops of whole photographs, the second from
crops that show a quarter of the short side: so it makes the 1024 px view of what the first makes at 256 px.
Run it again after any interruption: it goes on. What came out is in docs/upscaling.md.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import benchmarks.photos as photos
from ldm.images import decode_image, encode_png
from ldm.seeds import keyed_seed
from pipelines.shards import Sample, write_tar

SIZE_PX, LOW_SIZE_PX = 256, 64
# A crop of stage 1 shows the short side or down to 1/1.5 of it, one of stage 2 a quarter of that.
ZOOMS = {"stage1": (1.0, 1.5), "stage2": (4.0, 6.0)}
MIN_SIDE_PX = 1024  # shorter pictures would be magnified for stage 2
CROPS_PER_PHOTO = 40
TRAIN = {
    "preset": "tiny",
    "data.size_px": SIZE_PX,
    "data.low_size_px": LOW_SIZE_PX,
    "max_noise_level": 100,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "ema_decay": 0.99,
    "log_every": 20,
    "checkpoint_every": 200,
    "samples.num_images": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1400, help="of each training")
    options = parser.parse_args()
    for stage in ZOOMS:
        prepare(options.out, stage)
        train(options.out, stage, options.steps)


def prepare(out: Path, stage: str) -> None:
    """Photographs → crops → latents of both sizes."""
    if not (out / "photos").exists():
        photos.collect(out / "photos")
    tar = out / stage / "shards" / "crops.tar"
    if not tar.exists():
        tar.parent.mkdir(parents=True, exist_ok=True)
        write_tar(tar, _crops(_large(out / "photos" / "train"), ZOOMS[stage], CROPS_PER_PHOTO))
    sizes = f"--preprocess.sizes-px={SIZE_PX},{LOW_SIZE_PX}"
    _ldm("encode", str(tar.parent), str(out / stage / "latents"), "--vae", "f8", sizes)


def train(out: Path, stage: str, steps: int) -> None:
    options = [f"--train.{name.replace('_', '-')}={value}" for name, value in TRAIN.items()]
    _ldm(
        "train",
        str(out / stage / "latents"),
        str(out / stage / "upsampler"),
        f"--train.steps={steps}",
        *options,
    )


def _large(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if min(Image.open(path).size) >= MIN_SIDE_PX]


def _crops(pictures: Sequence[Path], zooms: tuple[float, float], count: int) -> Iterator[Sample]:
    """Random squares of 1/zoom of the short side, at 256 px; those of all pictures in turn."""
    for index, path in enumerate(pictures):
        image = decode_image(path.read_bytes())
        for number in range(count):
            rng = np.random.Generator(np.random.Philox(keyed_seed("cascade", path.name, number)))
            side = min(image.size) / rng.uniform(*zooms)
            left, top = (rng.uniform(0, length - side) for length in image.size)
            box = (left, top, left + side, top + side)
            crop = image.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
            yield Sample(f"{index:03d}-{number:03d}", encode_png(np.asarray(crop)))


def _ldm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], check=True)


if __name__ == "__main__":
    main()
