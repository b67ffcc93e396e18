"""``ldm cluster up``: a Ray cluster of several nodes on this machine, until it is interrupted."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from jobs.config import JobConfig
from jobs.job_server import is_loopback
from jobs.listening import LOOPBACK
from jobs.local_cluster import HEAD, LocalCluster, LocalNodeError, local_cluster
from jobs.local_pools import POOL_NAME, LocalPool
from ldm.errors import UserError

__all__ = ["ClusterUpJob"]

LOOK_EVERY_S = 1.0
# Of nodes that are all alike.
POOL = "node"


class ClusterUpJob(JobConfig):
    """Start a head and several nodes of Ray on this machine, with a token and on loopback, to try a cluster.

    Runs until it is interrupted, and ends all of it then. Nodes of different kinds are pools of a YAML file:
    cluster/local.yaml has those of cluster/kuberay. docs/jobs.md says what listens where.
    """

    nodes: PositiveInt = Field(2, description="nodes beside the head, all alike")
    num_cpus: NonNegativeInt = Field(1, description="CPUs of each, in Ray's count")
    num_gpus: NonNegativeInt = Field(0, description="GPUs of each, in Ray's count")
    pools: dict[str, LocalPool] = Field(
        {}, description="nodes of several kinds instead, by the name of their pool"
    )
    host: str = Field(
        LOOPBACK, description="address of the dashboard; the other servers of Ray are on loopback always"
    )
    dashboard_port: PositiveInt = 8265
    token_file: Path | None = Field(
        None,
        description="file with the token, mode 600; without it a new one, for as long as the cluster runs",
    )
    insecure: bool = Field(False, description="also put the dashboard on an address that others reach")

    @model_validator(mode="after")
    def _pools_or_nodes(self) -> "ClusterUpJob":
        if self.pools and self.model_fields_set & {"nodes", "num_cpus", "num_gpus"}:
            raise ValueError("pools say how many nodes there are; leave out nodes, num_cpus and num_gpus")
        if wrong := [name for name in self.pools if not re.fullmatch(POOL_NAME, name)]:
            raise ValueError(f"pools has {wrong[0]!r}; names have up to 32 of a-z, 0-9 and - inside")
        if HEAD in self.pools:
            raise ValueError(f"pools has {HEAD!r}, the name of the head, which is there in any case")
        return self

    def run(self) -> dict[str, object]:
        """Process of each node by its name, and where the dashboard was, when it is over."""
        self._check_safe()
        alike = LocalPool(nodes=self.nodes, num_cpus=self.num_cpus, num_gpus=self.num_gpus)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with local_cluster(
            self.pools or {POOL: alike},
            host=self.host,
            dashboard_port=self.dashboard_port,
            token_file=self.token_file,
        ) as cluster:
            with suppress(KeyboardInterrupt):
                _show(cluster)
                _watch(cluster)
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


def _show(cluster: LocalCluster) -> None:
    print(f"dashboard at {cluster.url} (it asks for the token; end all with Ctrl+C)\n")
    for name, value in cluster.variables.items():
        print(f"export {name}={value}")
    print()
    for node in cluster.nodes.values():
        print(f"{node.name:<20} pid {node.process.pid}")
    print(flush=True)


def _watch(cluster: LocalCluster) -> None:
    """Until a signal comes. Tells of nodes that ended; LocalNodeError where the head did."""
    told: set[str] = set()
    while True:
        time.sleep(LOOK_EVERY_S)
        for node in cluster.ended_nodes():
            if node.name == HEAD:
                raise LocalNodeError("the head has ended, and its jobs with it")
            if node.name not in told:
                told.add(node.name)
                print(f"{node.name} has ended", flush=True)
