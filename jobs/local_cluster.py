"""A Ray cluster of several nodes on this machine: a head, and raylets that join it, each a ``ray start``.

It listens on loopback and asks for a token; docs/jobs.md has what jobs listen at. Nothing of it outlives
`local_cluster`, and no other Ray on this machine is touched: it is ended by its own processes, never by name.
Imports no Ray.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from jobs.job_server import asks_for_token
from jobs.listening import LOOPBACK, free_ports, why_it_cannot_listen
from jobs.local_pools import LocalPool
from jobs.loopback_start import PATIENCE_S
from jobs.ray_token import PATH_VARIABLE, make_token, read_token
from ldm.errors import LdmError, UserError

__all__ = ["HEAD", "LocalCluster", "LocalNode", "LocalNodeError", "local_cluster"]

HEAD = "head"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 60.0
POLL_S = 0.2
LOG_TAIL_CHARS = 2000
# Paths of Ray's sockets are below it, and such a path has 107 bytes at the most.
SHORT_FOLDER = "/tmp"
# From SIGTERM to SIGKILL of a stopped job: `ldm serve` ends what is on its way in more than Ray's 3 s.
JOB_STOP_WAIT_S = 60
# Of what nodes do not inherit: settings of another cluster, and options of jobs.
PREFIXES = ("RAY_", "LDM_")
WILDCARDS = ("0.0.0.0", "::")


class LocalNodeError(LdmError):
    """A node that did not start."""


@dataclass(frozen=True)
class LocalNode:
    """A running ``ray start --block``, whose children are the node. The head is a pool of its own."""

    name: str
    pool: str
    process: "subprocess.Popen[bytes]"
    log: Path


class LocalCluster:
    """A running cluster: see `local_cluster`. nodes: by name, the head's first."""

    def __init__(self, folder: Path, token_file: Path, host: str, dashboard_port: int) -> None:
        self.folder, self.token_file = folder, token_file
        self.url = f"http://{LOOPBACK if host in WILDCARDS else host}:{dashboard_port}"
        (gcs_port,) = free_ports(1)
        self.address = f"{LOOPBACK}:{gcs_port}"
        self.nodes: dict[str, LocalNode] = {}
        self._host, self._started = host, 0

    @property
    def variables(self) -> dict[str, str]:
        """What a driver and ``ldm submit`` need in their environment."""
        return {
            "RAY_API_SERVER_ADDRESS": self.url,
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            PATH_VARIABLE: str(self.token_file),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # jobs.loopback_start says why
        }

    def start_head(self) -> None:
        """It counts no CPU, as that of cluster/kuberay: drivers run there, and no work."""
        port = self.address.rpartition(":")[2]
        dashboard_port = self.url.rpartition(":")[2]
        options = [
            "--head", "--port", port, "--no-monitor",
            "--include-dashboard", "true", "--dashboard-host", self._host, "--dashboard-port", dashboard_port,
            *LocalPool(num_cpus=0).start_options(HEAD),
        ]  # fmt: skip
        self._start(HEAD, HEAD, options, lambda: self._answers("/api/jobs/"))
        if not asks_for_token(self.url):
            raise LocalNodeError(f"{self.url} answers without the token")

    def start_nodes(self, pools: Mapping[str, LocalPool]) -> list[str]:
        """Nodes of these pools; their names, as ``encode-gpu-1``. A name is never given twice."""
        return [self.start_node(pool, each) for pool, each in pools.items() for _ in range(each.nodes)]

    def start_node(self, pool: str, each: LocalPool) -> str:
        """One node, which is alive when this returns; its name.

        One after the other: together they would be short of CPU, and miss Ray's deadlines.
        """
        name = f"{pool}-{1 + sum(node.pool == pool for node in self.nodes.values())}"
        options = ["--address", self.address, *each.start_options(pool)]
        self._start(name, pool, options, lambda: self._is_alive(name))
        return name

    def alive_nodes(self) -> dict[str, str]:
        """Name → Ray's id of the nodes that the head takes for alive."""
        reply = self.get("/api/v0/nodes?limit=1000").json()
        rows = reply["data"]["result"]["result"]
        return {row["node_name"]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def get(self, path: str) -> httpx.Response:
        """Ask the dashboard, with the token."""
        headers = {"Authorization": f"Bearer {read_token(self.token_file)}"}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def processes(self, name: str | None = None) -> list[psutil.Process]:
        """Of one node, or of all: ``ray start`` and all that came of it, workers and drivers included."""
        found = []
        for node in [self.nodes[name]] if name else self.nodes.values():
            with suppress(psutil.NoSuchProcess):
                first = psutil.Process(node.process.pid)
                found += [*first.children(recursive=True), first]
        return found

    def kill_node(self, name: str) -> None:
        """SIGKILL of all of its processes at one moment, without a word to the cluster."""
        members = self.processes(name)
        # Stopped first, so that none sees another die.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for member in members:
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(number)
        self.nodes[name].process.wait(STOP_TIMEOUT_S)

    def ended_nodes(self) -> list[LocalNode]:
        """Nodes whose ``ray start`` has ended."""
        return [node for node in self.nodes.values() if node.process.poll() is not None]

    def stop(self) -> None:
        """End all of it: nodes first, as they would look for their head."""
        members = self.processes()
        for node in reversed(self.nodes.values()):
            node.process.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for node in self.nodes.values():
            with suppress(subprocess.TimeoutExpired):
                node.process.wait(max(0.0, deadline_s - time.monotonic()))
        _, alive = psutil.wait_procs(members, timeout=5.0)
        for member in alive:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(alive, timeout=5.0)
        for node in self.nodes.values():
            node.process.wait(STOP_TIMEOUT_S)

    def _start(self, name: str, pool: str, options: list[str], is_up: Callable[[], bool]) -> None:
        """Return when the node is up."""
        node = self._popen(name, pool, options)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_up():
            if node.process.poll() is not None or time.monotonic() > deadline_s:
                said = node.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
                raise LocalNodeError(f"node {name} did not start: {said}")
            time.sleep(POLL_S)

    def _popen(self, name: str, pool: str, options: list[str]) -> LocalNode:
        # Short, as it is in the paths of sockets; and each node's own, as on machines of their own.
        self._started += 1
        folder = self.folder / str(self._started)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            "--node-ip-address", LOOPBACK, "--node-name", name, "--temp-dir", str(folder),
            "--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0",
            *options,
        ]  # fmt: skip
        log = self.folder / f"{name}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                env=self._environment(pool),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                # Ctrl+C is for `ldm cluster up`, which ends its nodes in order.
                start_new_session=True,
            )
        self.nodes[name] = LocalNode(name, pool, process, log)
        return self.nodes[name]

    def _environment(self, pool: str) -> dict[str, str]:
        """Of a node, and so of its workers and drivers."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
        code = [str(Path(__file__).resolve().parents[1]), *filter(None, [inherited.get("PYTHONPATH")])]
        return {
            **inherited,
            **{name: value for name, value in self.variables.items() if name != "RAY_ADDRESS"},
            # This command's code and interpreter: the entrypoint of a job is `python -m jobs.cli`.
            "PYTHONPATH": os.pathsep.join(code),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]),
            "RAY_START_HOOK": "jobs.loopback_start.keep_loopback",
            "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_WAIT_S),
            # Nodes end together: there is none to which work could move in the 30 s that Ray waits for that.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            # All nodes share the CPUs of one machine: Ray's 15 s and 60 s are for a machine each.
            "RAY_agent_register_timeout_ms": str(1000 * PATIENCE_S),
            "RAY_worker_register_timeout_seconds": str(PATIENCE_S),
            # At the level info Ray's agents write the environment of jobs, with its secrets, into their logs.
            "RAY_LOGGER_LEVEL": "warning",
            # As KubeRay does: Ray makes the label ray.io/node-group of it.
            "RAY_NODE_TYPE_NAME": pool,
            # Else they look for the network card that has the machine's name.
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }

    def _is_alive(self, name: str) -> bool:
        with suppress(httpx.HTTPError):
            return name in self.alive_nodes()
        return False

    def _answers(self, path: str) -> bool:
        try:
            return self.get(path).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


@contextmanager
def local_cluster(
    pools: Mapping[str, LocalPool],
    *,
    host: str = LOOPBACK,
    dashboard_port: int | None = None,
    token_file: Path | None = None,
) -> Iterator[LocalCluster]:
    """A cluster with these pools is up inside the block.

    host: of the dashboard; all else is on loopback. token_file: without it one is made. UserError where the
    port is taken, or the token cannot be used.
    """
    if token_file is not None:
        read_token(token_file)
    port = dashboard_port or free_ports(1)[0]
    check_port(host, port)
    folder = Path(tempfile.mkdtemp(prefix="ldm-", dir=SHORT_FOLDER))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if token_file is None:
            make_token(folder / "token")
        cluster = LocalCluster(folder, (token_file or folder / "token").absolute(), host, port)
        stack.callback(cluster.stop)
        cluster.start_head()
        cluster.start_nodes(pools)
        yield cluster


def check_port(host: str, port: int) -> None:
    """UserError where nothing can listen there."""
    if reason := why_it_cannot_listen(host, port):
        raise UserError(
            f"the dashboard cannot listen at {host}:{port} ({reason})", do="give another --dashboard-port"
        )
