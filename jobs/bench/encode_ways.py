"""The same job done in four ways, each in a process of its own: images/s once it is under way.

usage: python -m jobs.bench.encode_ways WAY SHARDS OUT SECONDS THREADS

    bare              one process, one loop: read, decode, 16 images a batch, VAE, fp16 moments
    pipeline          `ldm encode`
    straightforward   ray.data.read_webdataset → map_batches(VAE actor) → write_parquet
    file-per-image    torch DataLoader (one worker) → VAE → one .npz for each image

Prints ``{"images": …, "seconds": …}``: what was encoded between the first batch's end and the last one's.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.preprocess import Preprocess
from pipelines.shards import list_shards, read_samples

__all__ = ["WAYS", "Clock"]

MICRO_BATCH = 16
UNIT_SIZE = 64
VAE = "f8"


class Clock:
    """Counts images from the end of the first batch on; `is_over` after ``seconds`` of that."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.images = seconds, 0
        self.first_s: float | None = None
        self.last_s = 0.0

    def batch(self, images: int) -> None:
        """A batch has ended."""
        self.last_s = time.perf_counter()
        if self.first_s is None:
            self.first_s = self.last_s
        else:
            self.images += images

    @property
    def is_over(self) -> bool:
        return self.first_s is not None and self.last_s - self.first_s >= self.seconds

    def result(self) -> dict[str, float]:
        """images and seconds, for the JSON line."""
        assert self.first_s is not None
        return {"images": self.images, "seconds": self.last_s - self.first_s}


def decoded(shards: str) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(key, pixels), round and round the shards."""
    preprocess = Preprocess()
    for turn in count():
        for shard in list_shards(shards):
            for sample in read_samples(shard):
                yield f"{turn}-{sample.key}", preprocess.views(sample.image_bytes(), sample.key)[0]


def bare(shards: str, out: Path, seconds: float, threads: int) -> dict[str, float]:
    """What the encoder could do at best with this many threads, in one process."""
    import torch

    from ldm.autoencoder import load
    from ldm.image_tensors import to_model

    torch.set_num_threads(threads)
    autoencoder, clock, stream = load(VAE).to("cpu"), Clock(seconds), decoded(shards)
    while not clock.is_over:
        images = np.stack([next(stream)[1] for _ in range(MICRO_BATCH)])
        moments = autoencoder.encode(to_model(images))
        _ = moments.mean_BChw.half().numpy(), moments.std_BChw.half().numpy()
        clock.batch(MICRO_BATCH)
    return clock.result()


class _OverError(Exception):
    """Ends a run that has been measured for long enough."""


def pipeline(shards: str, out: Path, seconds: float, threads: int) -> dict[str, float]:
    """`ldm encode` with one encoder; the units are timed as the driver hears of their commits."""
    from jobs.cluster import ClusterConfig
    from jobs.encode import EncodeJob
    from pipelines.encode.pools import EncoderPool, TaskPool
    from pipelines.encode.report import UnitReport

    clock = Clock(seconds)

    def watch(report: UnitReport) -> None:
        clock.batch(report.rows)
        if clock.is_over:
            raise _OverError

    job = EncodeJob(
        input=shards,
        output=str(out),
        vae=VAE,
        unit_size=UNIT_SIZE,
        encoder=EncoderPool(num_cpus=threads, micro_batch=MICRO_BATCH),
        reader=TaskPool(num_cpus=0.25, max_size=1),
        decode=TaskPool(max_size=1),
        cluster=ClusterConfig(num_cpus=threads + 2),
    )
    with suppress(_OverError):
        job.run(watch)
    return clock.result()


class _Encoder:
    """The VAE actor of the straightforward way; notes the time of every batch in a file."""

    def __init__(self, threads: int, log: str) -> None:
        import torch

        from ldm.autoencoder import load

        torch.set_num_threads(threads)
        self.autoencoder, self.log = load(VAE).to("cpu"), Path(log)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from ldm.image_tensors import to_model

        moments = self.autoencoder.encode(to_model(np.stack(list(batch["jpg"]))))
        with self.log.open("a") as file:
            file.write(f"{time.perf_counter()} {len(batch['jpg'])}\n")
        mean, std = moments.mean_BChw.half().numpy(), moments.std_BChw.half().numpy()
        return {"key": batch["__key__"], "mean": mean, "std": std}


def straightforward(shards: str, out: Path, seconds: float, threads: int) -> dict[str, float]:
    """As Ray Data's documentation would have it. The images are 256 px already: nothing is resized."""
    import ray
    import ray.data

    out.mkdir(parents=True)
    log = out / "batches.log"
    ray.init(num_cpus=threads + 2, include_dashboard=False, log_to_driver=False)
    tars = sorted(str(path) for path in Path(shards).glob("*.tar"))
    encoded = ray.data.read_webdataset(tars).map_batches(
        _Encoder,
        batch_size=MICRO_BATCH,
        num_cpus=threads,
        concurrency=1,
        fn_constructor_kwargs={"threads": threads, "log": str(log)},
    )
    encoded.write_parquet(str(out / "parquet"))
    times, sizes = zip(*(map(float, line.split()) for line in log.read_text().splitlines()), strict=True)
    return {"images": sum(sizes[1:]), "seconds": times[-1] - times[0]}


def file_per_image(shards: str, out: Path, seconds: float, threads: int) -> dict[str, float]:
    """As most trainers cache latents."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    from ldm.autoencoder import load
    from ldm.image_tensors import to_model

    class Decoded(IterableDataset[tuple[str, NDArray[np.uint8]]]):
        def __iter__(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
            return decoded(shards)

    torch.set_num_threads(threads)
    out.mkdir(parents=True)
    autoencoder, clock = load(VAE).to("cpu"), Clock(seconds)
    for keys, images in DataLoader(Decoded(), batch_size=MICRO_BATCH, num_workers=1):
        moments = autoencoder.encode(to_model(images.numpy()))
        pairs = zip(keys, moments.mean_BChw.half().numpy(), moments.std_BChw.half().numpy(), strict=True)
        for key, mean, std in pairs:
            np.savez(out / f"{key}.npz", mean=mean, std=std)
        clock.batch(len(keys))
        if clock.is_over:
            break
    return clock.result()


WAYS = {
    "bare": bare,
    "pipeline": pipeline,
    "straightforward": straightforward,
    "file-per-image": file_per_image,
}

if __name__ == "__main__":
    way, shards, out, seconds, threads = sys.argv[1:]
    print(json.dumps(WAYS[way](shards, Path(out), float(seconds), int(threads))), flush=True)
