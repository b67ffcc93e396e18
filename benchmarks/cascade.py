"""A small latent cascade on photographs, 8 → 32 → 128 latents, beside bicubic interpolation of the latents.

    python benchmarks/cascade.py out/cascade

Collects the photographs (`benchmarks/photos.py`), cuts crops of 256 px out of them and encodes each crop at
256 and 64 px with the f8 VAE. The first upsampler learns from crops of whole photographs, the second from
crops that show a quarter of the short side: so it makes the 1024 px view of what the first makes at 256 px.
Then held-out photographs are encoded at 64 px, enlarged by one stage and by both, and compared with the
photographs; and the second upsampler makes a latent of 1024×1024, whose seams are measured.

`--only train`, `--only judge` or `--only canvas` does a part. Run again after an interruption: training goes
on. What came out is in docs/upscaling.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import benchmarks.photos as photos
from ldm import unet
from ldm.autoencoder import Autoencoder, load
from ldm.cascade import Sampling, Upsampler, Upsampling, WindowDenoiser
from ldm.distribution import frechet_distance_of_rows
from ldm.image_tensors import from_model, to_model
from ldm.images import decode_image, encode_png
from ldm.perceptual import Perceptual, load_perceptual
from ldm.seams import seam_ratio
from ldm.seeds import keyed_seed
from ldm.upsampling import NUM_NOISE_LEVELS
from pipelines.shards import Sample, write_tar

SIZE_PX, LOW_SIZE_PX, FULL_SIZE_PX = 256, 64, 1024
# A crop of stage 1 shows the short side or down to 1/1.5 of it, one of stage 2 a quarter of that.
ZOOMS = {"stage1": (1.0, 1.5), "stage2": (4.0, 6.0)}
STEPS = {"stage1": 3000, "stage2": 3000}
CROPS_PER_PHOTO = 40
# As preset tiny, wider, with attention in the middle only and one group in GroupNorm.
LAYOUT = {
    "sample_size": SIZE_PX // 8,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (48, 96, 96),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "attention_head_dim": 32,
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "num_class_embeds": NUM_NOISE_LEVELS,
}
TRAIN = {
    "data.size_px": SIZE_PX,
    "data.low_size_px": LOW_SIZE_PX,
    "max_noise_level": 50,
    # Min-SNR weighs errors at the noisiest steps, where colours are decided, 10 to 200 times less.
    "min_snr_gamma": "null",
    "batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "ema_decay": 0.99,
    "log_every": 20,
    "checkpoint_every": 200,
    "samples.num_images": 0,
}
HELD_OUT_CROPS = 4  # of each photograph; every second one is made at 1024 px
SMALL_ZOOMS = (1.0, 1.17)  # of photographs too small for that: the smallest has 300 px
SAMPLING = Sampling(
    seed=0, num_inference_steps=2, scheduler="ddim", noise_level=0, window_overlap=0.25, window_batch=8
)
CANVAS_STEPS = 4
SEAM_LIMIT = 1.02


def main() -> None:
    """Train, judge, measure seams; prints a JSON line at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("train", "judge", "canvas"))
    options = parser.parse_args()
    if options.only in (None, "train"):
        for stage in ZOOMS:
            prepare(options.out, stage)
            train(options.out, stage)
    result: dict[str, object] = {}
    if options.only in (None, "judge"):
        result |= judge(options.out)
    if options.only in (None, "canvas"):
        result |= canvas(options.out)
    print(json.dumps(result))


def prepare(out: Path, stage: str) -> None:
    """Photographs → crops → latents of both sizes."""
    if not (out / "photos").exists():
        photos.collect(out / "photos")
    tar = out / stage / "shards" / "crops.tar"
    if not tar.exists():
        tar.parent.mkdir(parents=True, exist_ok=True)
        crops = _crops(_large(out / "photos" / "train"), ZOOMS[stage], CROPS_PER_PHOTO, SIZE_PX)
        write_tar(tar, (Sample(key, encode_png(np.asarray(crop))) for key, crop in crops))
    sizes = f"--preprocess.sizes-px={SIZE_PX},{LOW_SIZE_PX}"
    _ldm("encode", str(tar.parent), str(out / stage / "latents"), "--vae", "f8", sizes)


def train(out: Path, stage: str) -> None:
    """An upsampler of the crops' latents, the second begun with the first; goes on where it was."""
    first = out / "first_unet"
    if not first.exists():
        torch.manual_seed(0)
        unet.save(UNet2DConditionModel(**LAYOUT), first)
    init = first if stage == "stage1" else out / "stage1" / "upsampler" / "unet"
    options = TRAIN | {"steps": STEPS[stage], "init": init}
    folders = str(out / stage / "latents"), str(out / stage / "upsampler")
    _ldm("train", *folders, *(f"--train.{name.replace('_', '-')}={value}" for name, value in options.items()))


def judge(out: Path) -> dict[str, object]:
    """Each stage, and both, beside bicubic latents and the VAE alone, on held-out photographs."""
    autoencoder, perceptual = load("f8"), load_perceptual("stlpips")
    held_out = out / "photos" / "heldout"
    large = _large(held_out)
    small = [path for path in sorted(held_out.iterdir()) if path not in large]
    pictures = _pictures(large, ZOOMS["stage1"], FULL_SIZE_PX)
    first, second = (_stage(out, stage, number) for number, stage in enumerate(ZOOMS, start=1))
    result: dict[str, object] = {}
    for name, enlarge, low_px, high_px, seen in (
        ("stage 1: 64 → 256 px", first, LOW_SIZE_PX, SIZE_PX, pictures),
        ("the same, other photographs", first, LOW_SIZE_PX, SIZE_PX, _pictures(small, SMALL_ZOOMS, SIZE_PX)),
        ("stage 2: 256 → 1024 px", second, SIZE_PX, FULL_SIZE_PX, pictures[::2]),
        ("both: 64 → 1024 px", lambda z: second(first(z)), LOW_SIZE_PX, FULL_SIZE_PX, pictures[::2]),
    ):
        low, high = _views(seen, low_px), _views(seen, high_px)
        latents = [_encoded(autoencoder, view) for view in low]
        ways: dict[str, Iterator[Tensor]] = {
            "cascade": map(enlarge, latents),
            "bicubic": (_bicubic(latent, high_px // low_px) for latent in latents),
            "vae": (_encoded(autoencoder, view) for view in high),
        }
        result[name] = {}
        for way, made in ways.items():
            images = [autoencoder.decode(latent[None])[0] for latent in made]
            figures = _figures(images, high, low, perceptual)
            result[name][way] = figures  # type: ignore[index]
            print(name, way, {key: round(value, 4) for key, value in figures.items()}, flush=True)
    return result


def canvas(out: Path) -> dict[str, object]:
    """The seams of a latent of 1024×1024, made by the second upsampler of a held-out photograph."""
    autoencoder = load("f8")
    path = max(_large(out / "photos" / "heldout"), key=lambda path: min(Image.open(path).size))
    ((_, picture),) = _crops([path], (1.0, 1.0), 1, 2048)
    low_Chw = _encoded(autoencoder, to_model(np.asarray(picture)[None])[0])
    upsampler = Upsampler.read(out / "stage2" / "upsampler")
    sampling = Sampling(**{**vars(SAMPLING), "num_inference_steps": CANVAS_STEPS, "window_batch": 16})
    upsampling = Upsampling(low_Chw, upsampler, sampling, 1)
    denoiser = WindowDenoiser(unet.load(upsampler.folder), upsampler.info)
    while not upsampling.trajectory.done:
        upsampling.step(lambda batches: map(denoiser, batches))
        print(f"canvas: step {upsampling.trajectory.step_index} of {CANVAS_STEPS}", flush=True)
    ratios = seams(upsampling)
    print(path.name, ratios)
    return {"canvas": list(upsampling.latent_CHW.shape), "seams": ratios, "limit": SEAM_LIMIT}


def seams(upsampling: Upsampling) -> dict[str, float]:
    """Seam ratio at the window borders of the first and of the last step, and at lines that are like them.

    A border lies where a low-resolution value begins, and the latent may have steps there, windows or not:
    the others of those lines say how large.
    """
    latent_HWC = upsampling.latent_CHW.permute(1, 2, 0).numpy()
    last = upsampling.trajectory.num_steps - 1
    at_last = _borders(upsampling, last)
    grid = upsampling.grid
    others = [
        sorted({*range(grid.multiple, side, grid.multiple)} - {*borders})
        for side, borders in zip(grid.canvas_HW, at_last, strict=True)
    ]
    return {
        "first step's": seam_ratio(latent_HWC, *_borders(upsampling, 0)),
        "last step's": seam_ratio(latent_HWC, *at_last),
        "like them, at no border of the last step": seam_ratio(latent_HWC, *others),
    }


def _borders(upsampling: Upsampling, step: int) -> list[list[int]]:
    """Rows and columns at which a window of the step begins or ends, inside of the canvas."""
    grid, corners = upsampling.grid, np.array(upsampling.corners(step))
    return [
        sorted({*corners[:, axis].tolist(), *(corners[:, axis] + side).tolist()} - {0, length})
        for axis, (side, length) in enumerate(zip(grid.window_hw, grid.canvas_HW, strict=True))
    ]


def _stage(out: Path, name: str, number: int) -> Callable[[Tensor], Tensor]:
    """Latent → latent four times as large."""
    upsampler = Upsampler.read(out / name / "upsampler")
    denoiser = WindowDenoiser(unet.load(upsampler.folder), upsampler.info)

    def enlarge(latent_Chw: Tensor) -> Tensor:
        upsampling = Upsampling(latent_Chw, upsampler, SAMPLING, number)
        while not upsampling.trajectory.done:
            upsampling.step(lambda batches: map(denoiser, batches))
        return upsampling.latent_CHW

    return enlarge


def _bicubic(latent_Chw: Tensor, factor: int) -> Tensor:
    return F.interpolate(latent_Chw[None], scale_factor=factor, mode="bicubic")[0]


def _encoded(autoencoder: Autoencoder, image_3HW: Tensor) -> Tensor:
    return autoencoder.encode(image_3HW[None]).mode()[0]


def _figures(
    images: Sequence[Tensor], real: Sequence[Tensor], low: Sequence[Tensor], perceptual: Perceptual
) -> dict[str, float]:
    """Perceptual distance and FD on patches of 256 px, PSNR of what is left when the image is made small.

    FD is of the mean over places of stlpips's last features (AlexNet trained on ImageNet, 256 of them).
    """
    features: list[np.ndarray] = []
    hook = perceptual.stages[-1].register_forward_hook(
        lambda stage, inputs, output: features.append(output.mean((2, 3)).numpy())
    )
    with torch.no_grad():
        pairs = zip(_patches(images), _patches(real), strict=True)
        distances = [float(perceptual(made[None], true[None])) for made, true in pairs]
    hook.remove()
    return {
        "stlpips": float(np.mean(distances)),
        # A pair's features come one after the other.
        "fd": frechet_distance_of_rows(np.concatenate(features[0::2]), np.concatenate(features[1::2])),
        "low_pass_psnr_db": float(np.mean([_psnr_db(*pair) for pair in zip(images, low, strict=True)])),
        "patches": len(distances),
    }


def _patches(images: Sequence[Tensor]) -> list[Tensor]:
    """Squares of 256 px along the diagonal of each image."""
    return [
        image_3HW[:, start : start + SIZE_PX, start : start + SIZE_PX]
        for image_3HW in images
        for start in range(0, image_3HW.shape[1], SIZE_PX)
    ]


def _psnr_db(image_3HW: Tensor, low_3hw: Tensor) -> float:
    """Of the image, made as small as ``low_3hw`` by means over squares."""
    small_3hw = F.avg_pool2d(image_3HW, image_3HW.shape[1] // low_3hw.shape[1])
    levels = [from_model(side[None]).astype(np.float64) for side in (small_3hw, low_3hw)]
    return float(10 * np.log10(255**2 / np.mean((levels[0] - levels[1]) ** 2)))


def _views(pictures: Sequence[Image.Image], size_px: int) -> list[Tensor]:
    """float (3, size_px, size_px) in [-1, 1]."""
    resized = (picture.resize((size_px, size_px), Image.Resampling.LANCZOS) for picture in pictures)
    return [to_model(np.asarray(view)[None])[0] for view in resized]


def _large(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if min(Image.open(path).size) >= FULL_SIZE_PX]


def _pictures(photographs: Sequence[Path], zooms: tuple[float, float], size_px: int) -> list[Image.Image]:
    return [crop for _, crop in _crops(photographs, zooms, HELD_OUT_CROPS, size_px)]


def _crops(
    pictures: Sequence[Path], zooms: tuple[float, float], count: int, size_px: int
) -> Iterator[tuple[str, Image.Image]]:
    """Key and crop: random squares of 1/zoom of the short side, ``count`` of each picture."""
    for index, path in enumerate(pictures):
        image = decode_image(path.read_bytes())
        for number in range(count):
            rng = np.random.Generator(np.random.Philox(keyed_seed("cascade", path.name, number)))
            side = min(image.size) / rng.uniform(*zooms)
            left, top = (rng.uniform(0, length - side) for length in image.size)
            box = (left, top, left + side, top + side)
            crop = image.resize((size_px, size_px), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
            yield f"{index:03d}-{number:03d}", crop


def _ldm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], check=True)


if __name__ == "__main__":
    main()
