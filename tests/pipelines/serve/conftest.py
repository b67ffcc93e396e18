"""One server for the tests of this folder: every stage on the shared cluster, with tiny models."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.serve.config import (
    JobsConfig,
    ModelSource,
    SamplerPool,
    ServeConfig,
    StagePool,
    UpsamplerStage,
)
from pipelines.serve.generation_request import Limits

MAX_STEPS = 1000


@pytest.fixture(scope="package")
def served_config(
    checkpoint_folders: dict[str, Path],
    save_upsampler: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ServeConfig:
    """Images of 32 px by default; two models, of v-prediction and of a flow; one upsampler, × 2."""
    return ServeConfig(
        models={name: ModelSource(folder=folder) for name, folder in checkpoint_folders.items()},
        ingress=StagePool(num_cpus=0.1, max_ongoing=1000),
        sampler=SamplerPool(num_cpus=1, threads=1, max_rows=8),
        decoder=StagePool(num_cpus=0.5, threads=1),
        upsamplers=(UpsamplerStage(checkpoint=save_upsampler(1), steps=4, num_cpus=0.5, threads=1),),
        limits=Limits(sizes_multiple_px=4, max_side_px=256, max_steps=MAX_STEPS),
        jobs=JobsConfig(url=str(tmp_path_factory.mktemp("jobs"))),
    )


@pytest.fixture(scope="package")
def server_url(ray_cluster: None, served_config: ServeConfig) -> Iterator[str]:
    """Of a running server without keys."""
    from jobs.cluster import ClusterConfig
    from jobs.serve import serving
    from pipelines.serve.application import Checked

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    with serving(Checked(served_config), ClusterConfig(), "127.0.0.1", port):
        yield f"http://127.0.0.1:{port}"
