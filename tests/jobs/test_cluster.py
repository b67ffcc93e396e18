"""Connecting to Ray: what is reused, and what is refused before Ray waits for it."""

import socket

import pytest
from pydantic import ValidationError

from jobs.cluster import ClusterConfig, connected
from ldm.errors import UserError


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.usefixtures("ray_cluster")
def test_an_initialised_ray_is_reused_and_left_running() -> None:
    import ray

    before = ray.get_runtime_context().get_job_id()
    with connected(ClusterConfig(num_cpus=1)):
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()
    assert {"CPU": 4.0, "GPU": 2.0}.items() <= ray.cluster_resources().items()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there_is_refused_at_once(
    scheme: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was left to wait for it"))
    address = f"{scheme}127.0.0.1:{closed_port}"
    refused = pytest.raises(UserError, match=f"^no Ray cluster at address '{address}' .*refused")
    with refused, connected(ClusterConfig(address=address)):
        pytest.fail("connected to a closed port")


def test_sizes_are_for_an_own_cluster() -> None:
    with pytest.raises(ValidationError, match="leave out address"):
        ClusterConfig(address="auto", num_cpus=2)
