"""Is a path between two photographs smoother through the latents than as a cross-fade of the pixels?

    python benchmarks/interpolation.py [--size-px 256] [--checkpoint FOLDER] [--sheets FOLDER]

Eight pairs of photographs of the `demo` extra: of the ten in name order, each of the first eight with the
next. The largest square in the middle, resized. Every path has 9 frames.

The stated measure, chosen before anything was measured: the **coefficient of variation of the perceptual
steps**, step = root of the perceptual distance (`stlpips`) of neighbouring frames. It is 0 for a path that
changes by the same amount from each frame to the next, and large for one that jumps. Beside it, always, the
length of the path (the sum of steps) and its detour (÷ the distance of its own ends): a path that is even
because it wanders is not the better one. "Smoother" means a lower coefficient of variation.

Companions: largest step ÷ mean; root distance of the inner frames to the nearer photograph, in the mean; and
the gradient energy of the middle frame ÷ the mean of the two photographs', below 1 where it is blurred.

    pixels       cross-fade of the photographs, in their 8-bit values
    pixels-vae   cross-fade of their reconstructions: the VAE's blur, without its latent space
    lerp, slerp  f8 latents, whitened by the VAE's own config, decoded

and with a checkpoint (which should have been trained on latents of this size):

    sdedit-S     the lerp path, each frame noised with one noise to strength S and denoised (50 DDIM steps)
    ddim-S       both ends run backwards through DDIM to strength S, slerp between them, and denoised
    seeds        the noises of two seeds, slerp between them, all denoised; not a path between photographs
    seeds-fade   cross-fade of the images that these two seeds are sampled to
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.demo import photo_paths
from ldm.autoencoder import Autoencoder, load
from ldm.conditioning import Conditioning
from ldm.denoiser import DenoiseOptions, Denoiser, seed_noise
from ldm.editing import first_step, sdedit
from ldm.image_tensors import from_model, image_grid, to_model
from ldm.images import encode_png
from ldm.interpolation import path
from ldm.path_smoothness import frame_features, gradient_energy, smoothness, to_nearest_end
from ldm.perceptual import Perceptual, load_perceptual
from ldm.preprocess import Preprocess
from ldm.sampling import Trajectory, sample
from ldm.unet import predict

NUM_PAIRS, NUM_FRAMES = 8, 9
STRENGTHS = (0.3, 0.5)
Way = Callable[[Tensor], Tensor]  # two photographs (2, 3, H, W) → frames (T, 3, H, W), both in [-1, 1]


def photographs(size_px: int) -> tuple[list[str], Tensor]:
    """Names, and float (10, 3, size, size) in [-1, 1]."""
    preprocess = Preprocess(sizes_px=(size_px,))
    names = list(photo_paths())
    pixels = [preprocess.views(path.read_bytes(), name)[0] for name, path in photo_paths().items()]
    return names, to_model(np.stack(pixels))


def ways(autoencoder: Autoencoder, denoiser: Denoiser | None) -> dict[str, Way]:
    """Name → how it makes a path."""
    whitening = autoencoder.whitening

    def latents(ends: Tensor) -> Tensor:
        return autoencoder.encode(ends).mode()

    def through_latents(ends: Tensor, method: str) -> Tensor:
        a, b = whitening.normalise(latents(ends))
        return autoencoder.decode(whitening.denormalise(path(a, b, NUM_FRAMES, method)))

    found: dict[str, Way] = {
        "pixels": lambda ends: to_model(from_model(path(*ends, NUM_FRAMES, "lerp"))),
        "pixels-vae": lambda ends: path(*autoencoder.decode(latents(ends)), NUM_FRAMES, "lerp"),
        "lerp": lambda ends: through_latents(ends, "lerp"),
        "slerp": lambda ends: through_latents(ends, "slerp"),
    }
    if denoiser is not None:
        for s in STRENGTHS:
            found[f"sdedit-{s}"] = lambda ends, s=s: autoencoder.decode(refined(denoiser, latents(ends), s))
            found[f"ddim-{s}"] = lambda ends, s=s: autoencoder.decode(inverted(denoiser, latents(ends), s))
    return found


def refined(denoiser: Denoiser, z_24hw: Tensor, strength: float) -> Tensor:
    """The straight path, every frame denoised from the strength's step: latents (T, C, h, w)."""
    frames = path(*z_24hw, NUM_FRAMES, "lerp")
    return sdedit(denoiser, frames, [strength] * NUM_FRAMES, DenoiseOptions())


@torch.no_grad()
def inverted(denoiser: Denoiser, z_24hw: Tensor, strength: float) -> Tensor:
    """Ends that DDIM itself leads back to, on a great circle at the strength's noise level, denoised."""
    whitening, options = denoiser.info.whitening, DenoiseOptions()
    begin = first_step(strength, options.steps)
    noisy = path(*ddim_inverse(denoiser, whitening.normalise(z_24hw), begin, options), NUM_FRAMES, "slerp")
    trajectories = []
    for x_Chw in noisy:
        trajectory = denoiser.trajectory(tuple(x_Chw.shape), options, x0=x_Chw, first_step=begin)
        trajectory.latent = x_Chw
        trajectories.append(trajectory)
    return whitening.denormalise(sample(denoiser.unet, trajectories, options.batch_size))


def ddim_inverse(denoiser: Denoiser, x0_BChw: Tensor, begin: int, options: DenoiseOptions) -> Tensor:
    """Clean latents at the level of step ``begin``: diffusers' inverse of DDIM, in as many steps."""
    from diffusers import DDIMInverseScheduler

    inverse = DDIMInverseScheduler.from_config(denoiser.scheduler_config, clip_sample=False)
    inverse.set_timesteps(options.steps)
    condition, x = null_condition(denoiser, len(x0_BChw)), x0_BChw
    for t in inverse.timesteps[: options.steps - begin]:
        prediction = predict(denoiser.unet, x, t.expand(len(x)), condition)
        x = inverse.step(prediction, t, x).prev_sample
    return x


def null_condition(denoiser: Denoiser, rows: int) -> Conditioning:
    trajectory: Trajectory = denoiser.trajectory(denoiser.info.latent_shape, DenoiseOptions())
    return trajectory.condition.select(torch.zeros(rows, dtype=torch.int64))


def figures(perceptual: Perceptual, frames: Tensor, ends: Tensor) -> dict[str, float]:
    """All that is said of one path."""
    features, ends_features = frame_features(perceptual, frames), frame_features(perceptual, ends)
    middle, photos = gradient_energy(frames[NUM_FRAMES // 2][None]), gradient_energy(ends)
    return asdict(smoothness(perceptual, features)) | {
        "to_nearest": to_nearest_end(perceptual, features, ends_features),
        "sharpness": float(middle[0] / photos.mean()),
    }


def seed_ways(autoencoder: Autoencoder, denoiser: Denoiser, pair: int) -> dict[str, Tensor]:
    """Frames between what seeds 2·pair and 2·pair + 1 are sampled to: through noise, and as a cross-fade."""
    shape, options = denoiser.info.latent_shape, DenoiseOptions()
    noises = path(seed_noise(shape, 2 * pair), seed_noise(shape, 2 * pair + 1), NUM_FRAMES, "slerp")
    trajectories = [denoiser.trajectory(shape, options, noise=noise) for noise in noises]
    x_TChw = sample(denoiser.unet, trajectories, options.batch_size)
    frames = autoencoder.decode(denoiser.info.whitening.denormalise(x_TChw))
    return {"seeds": frames, "seeds-fade": path(frames[0], frames[-1], NUM_FRAMES, "lerp")}


def main() -> None:
    """Print a row for each pair and way, then the means, and on how many pairs a way is smoother."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size-px", type=int, default=256)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--sheets", type=Path)
    args = parser.parse_args()
    autoencoder, perceptual = load("f8"), load_perceptual("stlpips")
    denoiser = Denoiser.load(args.checkpoint) if args.checkpoint else None
    names, photos = photographs(args.size_px)
    table: dict[str, list[dict[str, float]]] = {}
    for i in range(NUM_PAIRS):
        ends = photos[i : i + 2]
        made = {name: way(ends) for name, way in ways(autoencoder, denoiser).items()}
        if denoiser is not None:
            made |= seed_ways(autoencoder, denoiser, i)
        for name, frames in made.items():
            own_ends = frames[[0, -1]] if name.startswith("seeds") else ends
            table.setdefault(name, []).append(figures(perceptual, frames, own_ends))
            print_row(f"{names[i]}–{names[i + 1]}", name, table[name][-1])
        if args.sheets:
            write_sheet(args.sheets / f"{names[i]}-{names[i + 1]}.png", list(made.values()))
    for name, found in table.items():
        print_row("mean", name, {key: float(np.mean([f[key] for f in found])) for key in found[0]})
    for reference in ("pixels", "pixels-vae"):
        print_wins(table, reference, [name for name in table if not name.startswith(("pixels", "seeds"))])
    if denoiser is not None:
        print_wins(table, "seeds-fade", ["seeds"])


def print_wins(table: dict[str, list[dict[str, float]]], reference: str, names: list[str]) -> None:
    """On how many pairs each way has a lower coefficient of variation than a cross-fade."""
    for name in names:
        pairs = zip(table[name], table[reference], strict=True)
        wins = sum(one["step_cv"] < other["step_cv"] for one, other in pairs)
        print(f"{name}: smoother than {reference} on {wins} of {NUM_PAIRS} pairs")


def write_sheet(file: Path, rows: list[Tensor]) -> None:
    """One path a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet = image_grid(from_model(torch.cat(rows)), NUM_FRAMES)
    file.write_bytes(encode_png(sheet))


def print_row(pair: str, way: str, found: dict[str, float]) -> None:
    print(f"{pair:22} {way:11}", "  ".join(f"{key} {value:6.3f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
