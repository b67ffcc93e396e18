"""Ray Serve's HAProxy in front of a server: settings of a Ray cluster that is started for it."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jobs.cluster import ClusterConfig
from jobs.listening import free_ports
from ldm.errors import UserError

__all__ = ["haproxy"]

# An ingress that is to go waits so long for the proxy to know; Ray's 30 s are for load balancers elsewhere.
DRAINING_S = 2
# Its sockets are below a node's id, and the path of a socket is 108 bytes at the most.
SHORT_FOLDER = "/tmp"


@contextmanager
def haproxy(cluster: ClusterConfig) -> Iterator[None]:
    """A Ray that is started inside the block has HAProxy in place of Serve's own proxy.

    Ray reads all of it from the environment of its processes, so that a cluster which runs already has what
    it was started with. UserError where one would be joined.
    """
    import ray

    if cluster.address or "RAY_ADDRESS" in os.environ or ray.is_initialized():
        raise UserError(
            "--haproxy is for a cluster that this command starts",
            do="start the cluster's nodes with RAY_SERVE_ENABLE_HA_PROXY=1 in their environment",
        )
    with (
        tempfile.TemporaryDirectory(prefix="ldm-", dir=SHORT_FOLDER) as folder,
        _environment(_settings(Path(folder))),
    ):
        yield


def _settings(folder: Path) -> dict[str, str]:
    """Its own files and ports, as there may be other servers on this machine."""
    stats_port, metrics_port = free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
    }


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
