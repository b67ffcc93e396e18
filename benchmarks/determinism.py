"""How much an image depends on the batch it was made in: alone against in a batch of eight.

usage: python benchmarks/determinism.py CHECKPOINT

Eight requests of mixed schedulers, step counts and guidance on a trained checkpoint (`ldm train`, or
`out/demo/checkpoint` of `make demo`), in fp32 on the CPU. Prints, for each, the largest difference of its
latent (whitened, before decoding) between the two.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from jobs.cluster import ClusterConfig, connected
from pipelines.generate import Sampler

MIX = (
    ("ddim", 10, 1.0),
    ("ddim", 25, 3.0),
    ("ddpm", 20, 3.0),
    ("euler", 15, 5.0),
    ("dpmpp", 12, 3.0),
    ("dpmpp", 20, 1.0),
    ("euler", 30, 3.0),
    ("ddim", 50, 7.5),
)


def main(folder: Path) -> None:
    """Print a table and the largest difference."""
    sampler = Sampler(folder, threads=None)
    num_classes = max(1, len(sampler.info.class_names or ()))
    columns = {
        "label": np.arange(len(MIX)) % num_classes,
        "seed": np.arange(len(MIX)),
        "scheduler": np.array([scheduler for scheduler, _, _ in MIX]),
        "num_inference_steps": np.array([steps for _, steps, _ in MIX]),
        "guidance": np.array([guidance for _, _, guidance in MIX]),
    }

    def latents(rows: slice) -> torch.Tensor:
        result = sampler({name: column[rows] for name, column in columns.items()})
        return sampler.info.whitening.normalise(torch.from_numpy(result["latent"]))

    together = latents(slice(None))
    largest = 0.0
    for row, (scheduler, steps, guidance) in enumerate(MIX):
        difference = float((latents(slice(row, row + 1))[0] - together[row]).abs().max())
        largest = max(largest, difference)
        print(f"{scheduler:12} {steps:3} steps  guidance {guidance:<4} {difference:.1e}")
    print(f"largest difference {largest:.1e}; standard deviation of the latents {float(together.std()):.2f}")


if __name__ == "__main__":
    with connected(ClusterConfig(num_cpus=1)):  # which the sampler asks where it runs
        main(Path(sys.argv[1]))
