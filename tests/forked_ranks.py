"""Ranks of torch.distributed (gloo) as processes, forked from a server that has imported what takes seconds.

A fresh interpreter imports torch and diffusers for each rank: most of what a test of several ranks costs.
"""

import multiprocessing
import pickle
import runpy
import sys
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["run_ranks"]

TIMEOUT_S = 120
PRELOADED = [
    "torch.distributed.fsdp", "pipelines.train.unet", "pipelines.train.vae", "ldm.perceptual",
    # Models import these where they are built.
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
]  # fmt: skip


def run_ranks(world: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(rank, world, *arguments)`` on every rank of a process group, in a process each.

    What a rank prints is in the test's captured output.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    meet = str(folder / f"meet-{uuid.uuid4().hex}")
    calls = [_pickled(partial(_rank, rank, world, meet, work, arguments), work) for rank in range(world)]
    ranks = [
        context.Process(target=runpy.run_path, args=(__file__, {"CALL": call}, "__rank__"), daemon=True)
        for call in calls
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_S)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * world, f"the ranks ended with {codes}"


def _pickled(call: Callable[[], None], work: Callable[..., None]) -> bytes:
    """With the code of the tests' modules: some distributions install a package that is called ``tests``."""
    from ray import cloudpickle

    for function in (_rank, work):
        cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    data: bytes = cloudpickle.dumps(call)
    return data


def _rank(rank: int, world: int, meet: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    work(rank, world, *arguments)
    dist.destroy_process_group()


if __name__ == "__rank__":
    pickle.loads(CALL)()  # type: ignore[name-defined]  # noqa: F821  # run_path's
