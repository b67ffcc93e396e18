"""What the whole session shares: an environment without network or threads, and one Ray cluster."""

import os
from collections.abc import Iterator

import pytest

# Before anything imports torch, ray or huggingface_hub, all of which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with 4 CPUs and 2 logical GPUs; a test that does not ask starts none."""
    from jobs.cluster import ClusterConfig, connected

    with connected(ClusterConfig(num_cpus=4, num_gpus=2)):
        yield


def pytest_collection_finish(session: pytest.Session) -> None:
    """Send functions of test modules to Ray's workers as code: a worker cannot import those modules.

    Some distributions install a package called ``tests``, which would be found there instead.
    """
    modules = {item.module for item in session.items if "ray_cluster" in item.fixturenames}
    if modules:
        from ray.cloudpickle import register_pickle_by_value

        for module in modules:
            register_pickle_by_value(module)
