"""Ray processes of a measurement's own on this machine: a head with a token, and nodes."""

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.listening import free_ports

__all__ = ["Head", "started_head", "started_node"]

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.2
# What `ray start` prints once GCS and raylet answer.
STARTED = "Ray runtime started."
# Nobody keeps many units here; without it each node would take a third of the machine's memory for itself.
OBJECT_STORE_BYTES = 150_000_000
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Head:
    """A running head. address: of its GCS; environment: of processes that are to join it."""

    address: str
    folder: Path
    environment: Mapping[str, str]


@contextmanager
def started_head(
    *,
    port: int,
    resources: Mapping[str, float],
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Head]:
    """A head that counts ``resources``, as long as the block runs.

    options: more of them for ``ray start``; environment: more variables of the head alone. RuntimeError with
    the end of its log where it does not start.
    """
    # Paths of sockets are bounded to 107 bytes, so the folder's is short.
    with tempfile.TemporaryDirectory(prefix="ldm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(uuid.uuid4().hex)
        joining = _environment(token)
        agent_port, client_port = free_ports(2)
        command = [
            "--head", "--node-ip-address", "127.0.0.1", "--port", str(port), "--include-dashboard", "false",
            "--temp-dir", str(folder / "ray"), "--dashboard-agent-listen-port", str(agent_port),
            "--ray-client-server-port", str(client_port), *options,
        ]  # fmt: skip
        log = folder / "head.log"
        with _ray_start(command, resources, {**joining, **(environment or {})}, log):
            yield Head(f"127.0.0.1:{port}", folder, joining)


@contextmanager
def started_node(head: Head, resources: Mapping[str, float]) -> Iterator[None]:
    """A raylet that joins ``head``, as long as the block runs."""
    command = [
        "--address", head.address, "--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", "0",
        "--min-worker-port", "0", "--max-worker-port", "0",
    ]  # fmt: skip
    with _ray_start(command, resources, head.environment, head.folder / f"node-{uuid.uuid4().hex}.log"):
        yield


def _environment(token: Path) -> dict[str, str]:
    # The caller's own Ray, its address and its token, are another.
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "LDM_"))}
    return {
        **inherited,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Nodes end when nothing runs on them: they need not wait 30 s for that.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "OMP_NUM_THREADS": "1",
        # Or the line that tells of the start would wait in a buffer.
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


@contextmanager
def _ray_start(
    options: Sequence[str], resources: Mapping[str, float], environment: Mapping[str, str], log: Path
) -> Iterator[None]:
    counted = dict(resources)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options,
        "--num-cpus", f"{counted.pop('CPU', 0):g}", "--num-gpus", f"{counted.pop('GPU', 0):g}",
        "--resources", json.dumps(counted), "--object-store-memory", str(OBJECT_STORE_BYTES),
    ]  # fmt: skip
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        _wait_until_started(process, log)
        yield
    finally:
        _end(process)


def _wait_until_started(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while STARTED not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(
                f"Ray did not start within {START_TIMEOUT_S:.0f} s:\n{log.read_text()[-2000:]}"
            )
        time.sleep(LOOK_EVERY_S)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The process and all that it started, nodes of the fake provider too; nothing else that is Ray's."""
    if process.poll() is not None:
        return
    members = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_TIMEOUT_S)
    _, alive = psutil.wait_procs(members, timeout=5)
    for member in alive:
        member.kill()
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)
