"""Ways of training on the same latents, each in a process of its own, for ``ldm bench train``.

usage: python -m jobs.bench.train_ways WAY DATASET LOG THREADS CONFIG [SECONDS]
CONFIG is UnetTraining as JSON.

bare      a plain loop; all tensors in memory, batches by index
loader    the product's loader alone
cached    the product's step on the product's loader, without Ray
online    the product's step on latents that the VAE makes in the loop, from pixels in memory

Appends a JSON line with steps_per_s to LOG about every second, for SECONDS or until it is killed.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.dataset import LatentDataset
    from pipelines.train.config import UnetTraining
    from pipelines.train.loader import LatentBatch

LINE_S = 1.0


def main(way: str, url: str, log: str, threads: str, config: str, seconds: str = "inf") -> None:
    import torch

    from pipelines.dataset import LatentDataset
    from pipelines.train.config import UnetTraining

    torch.set_num_threads(int(threads))
    training = UnetTraining.model_validate_json(config)
    _repeat(WAYS[way](LatentDataset.open(url), training), Path(log), float(seconds))


def _repeat(step: Callable[[], object], log: Path, seconds: float) -> None:
    """Steps for so long, but no longer than the process lives that started this one."""
    started_by, steps_per_line, end = os.getppid(), _steps_per_line(step), perf_counter() + seconds
    while os.getppid() == started_by and perf_counter() < end:
        begin = perf_counter()
        for _ in range(steps_per_line):
            step()
        with log.open("a") as file:
            file.write(json.dumps({"steps_per_s": steps_per_line / (perf_counter() - begin)}) + "\n")


def _steps_per_line(step: Callable[[], object]) -> int:
    """The same for all lines of this process: their mean is that of their steps."""
    step()
    begin, steps = perf_counter(), 0
    while perf_counter() - begin < LINE_S:
        step()
        steps += 1
    return steps


def _bare(dataset: "LatentDataset", config: "UnetTraining") -> Callable[[], None]:
    """As one writes it in an afternoon: the same model, optimizer, average and loss."""
    import torch
    from diffusers import DDPMScheduler

    from ldm.ema import averaged, constant_decay
    from pipelines.train.plan import build_unet, plan

    info = plan(dataset, config, None)
    torch.manual_seed(0)
    model = build_unet(config, info).train()
    ema = averaged(model, constant_decay(config.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, fused=True)
    alpha_bar = DDPMScheduler.from_config(config.noise_schedule.scheduler_config()).alphas_cumprod
    mean, std, labels = _all_rows(dataset)
    shift, scale = (torch.tensor(v).view(1, -1, 1, 1) for v in (info.shift, info.scale))
    null = len(info.class_names or ())

    def step() -> None:
        index = torch.randint(len(mean), (config.batch_size,))
        x0 = (mean[index] + std[index] * torch.randn_like(mean[index]) - shift) / scale
        noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
        a, s = alpha_bar[t].sqrt().view(-1, 1, 1, 1), (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
        shown = torch.where(torch.rand(len(x0)) < config.condition_dropout, null, labels[index])
        (predicted,) = model(a * x0 + s * noise, t, None, class_labels=shown, return_dict=False)
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        weight = snr.clamp(max=config.min_snr_gamma) / (snr + 1)
        loss = (weight * (predicted - (a * noise - s * x0)).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        ema.update_parameters(model)

    return step


def _all_rows(dataset: "LatentDataset") -> "tuple[Any, Any, Any]":
    import numpy as np
    import torch

    from pipelines.latent_table import read_latents

    parts = []
    for path in dataset.manifest()["path"].to_pylist():
        with dataset.filesystem.open(dataset.path(path), "rb") as stream:
            parts.append(read_latents(stream))
    mean = np.concatenate([part.moments.mean_NChw for part in parts]).astype(np.float32)
    std = np.concatenate([part.moments.std_NChw for part in parts]).astype(np.float32)
    labels = [label for part in parts for label in part.labels]
    return torch.from_numpy(mean), torch.from_numpy(std), torch.tensor(labels)


def _loader(dataset: "LatentDataset", config: "UnetTraining") -> Callable[[], object]:
    batches = _batches(dataset, config)
    return lambda: next(batches)


def _cached(dataset: "LatentDataset", config: "UnetTraining") -> Callable[[], None]:
    return _product_step(dataset, config, _batches(dataset, config))


def _online(dataset: "LatentDataset", config: "UnetTraining") -> Callable[[], None]:
    """Each batch's latents are encoded in the loop; its pixels are photographs in memory already."""
    import numpy as np
    import torch

    from jobs.bench.photos import crops
    from ldm.autoencoder import load
    from ldm.image_tensors import to_model
    from ldm.images import decode_image

    vae = load("f8")
    size_px = dataset.header.preprocess.sizes_px[0]
    photos = islice(crops(size_px), 64)
    pixels = cycle([np.asarray(decode_image(photo.image or b"")) for photo in photos])

    def encoded() -> "Iterator[LatentBatch]":
        for batch in _batches(dataset, config):
            with torch.no_grad():
                moments = vae.encode(to_model(np.stack([next(pixels) for _ in batch.keys_B])))
            yield replace(batch, z_BChw=moments.sample(batch.noise_BChw))

    return _product_step(dataset, config, encoded())


def _product_step(
    dataset: "LatentDataset", config: "UnetTraining", batches: "Iterator[LatentBatch]"
) -> Callable[[], None]:
    import torch

    from pipelines.train.plan import plan
    from pipelines.train.state import TrainState

    state = TrainState(config, plan(dataset, config, None), torch.device("cpu"))
    numbers = iter(range(1, sys.maxsize))

    def step() -> None:
        state.step(next(batches), next(numbers))

    return step


def _batches(dataset: "LatentDataset", config: "UnetTraining") -> "Iterator[LatentBatch]":
    from pipelines.train.plan import open_loader

    return open_loader(dataset, config).batches(rank=0, world=1)


WAYS: dict[str, Callable[["LatentDataset", "UnetTraining"], Callable[[], object]]] = {
    "bare": _bare,
    "loader": _loader,
    "cached": _cached,
    "online": _online,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
