"""``ldm cluster up``: a Ray cluster of several nodes on this machine, until it is interrupted."""

import os
import signal
import threading
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from jobs.config import JobConfig
from jobs.job_server import is_loopback
from jobs.local_cluster import HEAD, LOOPBACK, LocalCluster, LocalNodeError, local_cluster
from jobs.local_pools import LocalPool, Pools
from ldm.errors import UserError

__all__ = ["ClusterUpJob"]

LOOK_EVERY_S = 1.0


class ClusterUpJob(JobConfig):
    """Start a head and several nodes of Ray on this machine, with a token and on loopback, to try a cluster.

    Runs until it is interrupted, and ends all of it then. Nodes of different kinds are pools of a YAML file:
    cluster/local.yaml has those of cluster/kuberay. docs/clusters.md says what listens where.
    """

    nodes: PositiveInt = Field(2, description="nodes beside the head, all alike")
    num_cpus: NonNegativeInt = Field(1, description="CPUs of each, in Ray's count")
    num_gpus: NonNegativeInt = Field(0, description="GPUs of each, in Ray's count")
    pools: Pools = Field({}, description="nodes of several kinds instead, by the name of their pool")
    host: str = Field(LOOPBACK, description="address of the dashboard; nodes are on loopback always")
    dashboard_port: PositiveInt = 8265
    token_file: Path | None = Field(
        None, description="file with the token, mode 600; without it a new one, for as long as the cluster runs"
    )
    insecure: bool = Field(False, description="also put the dashboard on an address that others reach")

    @model_validator(mode="after")
    def _pools_or_nodes(self) -> "ClusterUpJob":
        if self.pools and self.model_fields_set & {"nodes", "num_cpus", "num_gpus"}:
            raise ValueError("pools say how many nodes there are; leave out nodes, num_cpus and num_gpus")
        return self

    def run(self) -> dict[str, object]:
        """Name of every node → its process, and where the dashboard was, when it is over."""
        self._check_safe()
        stop = _stopped_by_signals()
        alike = LocalPool(nodes=self.nodes, num_cpus=self.num_cpus, num_gpus=self.num_gpus)
        with local_cluster(
            self.pools or {None: alike},
            host=self.host,
            dashboard_port=self.dashboard_port,
            token_file=self.token_file,
        ) as cluster:
            _show(cluster)
            _watch(cluster, stop)
            print("ending it", flush=True)
        return {
            "url": cluster.url,
            "nodes": {node.name: node.process.pid for node in cluster.nodes.values()},
        }

    def _check_safe(self) -> None:
        mode = os.environ.get("RAY_AUTH_MODE", "token")
        if mode != "token":
            raise UserError(
                f"RAY_AUTH_MODE is {mode!r}: without a token, whoever reaches Ray runs what he likes here",
                do="unset it",
            )
        if not self.insecure and not is_loopback(f"http://{self.host}"):
            raise UserError(
                f"others reach {self.host}, and the token would go there without TLS",
                allowed=f"{LOOPBACK}, with a tunnel of your own (ssh -L)",
                do="--insecure if its network is yours alone",
            )


def _stopped_by_signals() -> threading.Event:
    # Before anything starts: a signal on the way would else leave nodes to their own.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _show(cluster: LocalCluster) -> None:
    print(f"dashboard at {cluster.url} (it asks for the token; end all with Ctrl+C)\n")
    for name, value in cluster.variables.items():
        print(f"export {name}={value}")
    print()
    for node in cluster.nodes.values():
        print(f"{node.name:<20} pid {node.process.pid}")
    print(flush=True)


def _watch(cluster: LocalCluster, stop: threading.Event) -> None:
    """Until a signal comes. Tells of nodes that ended; LocalNodeError where the head did."""
    told: set[str] = set()
    while not stop.wait(LOOK_EVERY_S):
        for node in cluster.ended_nodes():
            if node.name == HEAD:
                raise LocalNodeError("the head has ended, and its jobs with it")
            if node.name not in told:
                told.add(node.name)
                print(f"{node.name} has ended", flush=True)
