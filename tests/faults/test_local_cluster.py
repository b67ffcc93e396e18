"""``ldm cluster up``: what listens where, who is let in, and that nothing of it is left."""

import ipaddress
import json
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from jobs.listening import free_ports
from jobs.local_cluster import local_cluster
from jobs.ray_token import read_token
from tests.faults.cluster_jobs import ENCODE_GPU, TRAIN_GPU, python
from tests.faults.listening import beyond_loopback, listening

pytestmark = [
    pytest.mark.faults_long,  # clusters of several nodes: minutes
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).resolve().parents[2]
CONNECT = """
import os
import ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
print(sorted(node["NodeName"] for node in ray.nodes()))
"""


def own_addresses() -> list[str]:
    """Of this machine, where others reach it (IPv4)."""
    found = [entry.address for each in psutil.net_if_addrs().values() for entry in each if entry.family == 2]
    return [address for address in found if not ipaddress.ip_address(address).is_loopback]


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_all_of_it_is_on_loopback_and_wants_the_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with local_cluster({"encode-gpu": ENCODE_GPU, "train-gpu": TRAIN_GPU}) as cluster:
        # A driver, so that workers listen, too.
        connected = python(CONNECT, **cluster.variables)
        assert connected.returncode == 0, connected.stderr[-3000:]
        assert connected.stdout == "['encode-gpu-1', 'head', 'train-gpu-1']\n"
        found = listening(cluster)
        ports = {port for places in found.values() for _, port in places}
        print(f"{len(ports)} ports of {len(found)} processes listen")
        assert len(ports) > 10
        assert beyond_loopback(cluster) == []
        assert own_addresses(), "this machine has no other address: nothing was shown"
        assert [(a, p) for a in own_addresses() for p in sorted(ports) if answers(a, p)] == []
        assert all(
            answers("127.0.0.1", int(url.rpartition(":")[2])) for url in (cluster.url, cluster.address)
        )

        jobs = f"{cluster.url}/api/jobs/"
        assert httpx.get(jobs).status_code == 401
        assert httpx.post(jobs, json={"entrypoint": "true"}).status_code == 401
        assert httpx.get(jobs, headers={"Authorization": "Bearer " + "0" * 64}).status_code in (401, 403)
        assert cluster.get("/api/jobs/").status_code == 200
        for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
            refused = python(
                CONNECT,
                RAY_ADDRESS=cluster.address,
                RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
                HOME=str(tmp_path),
                **token,
            )
            assert refused.returncode != 0
            assert "uthenticat" in refused.stderr, refused.stderr[-3000:]
            assert refused.stdout == ""
        assert cluster.token_file.stat().st_mode & 0o777 == 0o600
        token_text = read_token(cluster.token_file)
        members = cluster.processes()
        for process in members:
            with suppress(psutil.NoSuchProcess):
                assert token_text not in " ".join(process.cmdline())
        written = [path for path in cluster.folder.rglob("*") if path.is_file() and path.name != "token"]
        assert len(written) > 10
        assert [path for path in written if token_text.encode() in path.read_bytes()] == []
        folder = cluster.folder
    assert not folder.exists()
    _, alive = psutil.wait_procs(members, timeout=10)
    assert alive == []


def test_the_command_shows_what_to_set_and_ends_all_of_it(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "cluster",
        "up",
        "--nodes",
        "1",
        "--dashboard-port",
        str(port),
    ]
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(10)]
        assert lines[0], process.communicate(timeout=120)[1][-3000:]
        family = psutil.Process(process.pid).children(recursive=True)
        variables = dict(
            line.removeprefix("export ").strip().split("=", 1) for line in lines if line.startswith("export ")
        )
        token = read_token(Path(variables["RAY_AUTH_TOKEN_PATH"]))
        connected = python(CONNECT, **variables)
        process.terminate()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert lines[0] == (
        f"dashboard at http://127.0.0.1:{port} (it asks for the token; end all with Ctrl+C)\n"
    )
    assert connected.stdout == "['head', 'node-1']\n"
    assert token not in "".join(lines) + out + err
    assert {*json.loads(out.splitlines()[-1])["nodes"]} == {"head", "node-1"}
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert not Path(variables["RAY_AUTH_TOKEN_PATH"]).exists()
