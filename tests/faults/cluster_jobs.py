"""Clusters on this machine for tests: jobs that are submitted to them, and where their parts ran."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from jobs import cli
from jobs.job_client import JobClient
from jobs.listening import free_ports
from jobs.local_cluster import LocalCluster
from jobs.local_pools import LocalPool
from jobs.ray_token import read_token

__all__ = [
    "DEADLINE_S",
    "ENCODE_GPU",
    "SERVE_GPU",
    "TRAIN_GPU",
    "UNIT_SIZE",
    "encoding",
    "image",
    "join",
    "pools_of",
    "python",
    "rows",
    "serving",
    "submit",
    "submitted",
    "succeed",
    "wait_until",
]

ROOT = Path(__file__).resolve().parents[2]
ENCODE_GPU = LocalPool(num_cpus=2, num_gpus=1, resources={"accelerator_type:L4": 1})
TRAIN_GPU = LocalPool(num_cpus=1, num_gpus=1, resources={"accelerator_type:H100": 1})
SERVE_GPU = LocalPool(num_cpus=1, num_gpus=1)
UNIT_SIZE = 8
# So large that one encoder has not done everything before a second one has started.
SIZE_PX = 96
DEADLINE_S = 300.0


def join(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process gets the cluster's variables."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)


def wait_until(holds: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        time.sleep(0.1)


def python(code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Of a driver, which has this process' variables but for Ray's, and these."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def submit(folder: Path, name: str, command: str, options: Mapping[str, Any], *how: str) -> int:
    """Exit status of ``ldm submit`` of a job with these options."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"command": command, "options": dict(options)}))
    return cli.main(["submit", str(path), *how])


def submitted(capsys: pytest.CaptureFixture[str]) -> str:
    """Id of the job that was submitted last."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("submitted ")]
    return lines[-1].split(":")[0].removeprefix("submitted ")


def client(cluster: LocalCluster) -> JobClient:
    return JobClient(cluster.url, read_token(cluster.token_file))


def succeed(cluster: LocalCluster, job: str) -> None:
    details = client(cluster).wait(job, timeout_s=400)
    assert details.status.value == "SUCCEEDED", client(cluster).logs(job)[-4000:]


def rows(cluster: LocalCluster, kind: str) -> list[dict[str, Any]]:
    """What Ray's state API knows of ``actors``, ``tasks`` or ``nodes``."""
    reply = cluster.get(f"/api/v0/{kind}?limit=10000&detail=1").json()
    found: list[dict[str, Any]] = reply["data"]["result"]["result"]
    return found


def pools_of(cluster: LocalCluster, kind: str, name: str, key: str) -> set[str]:
    """Pools of the nodes on which actors or tasks ran whose ``key`` holds ``name``, dead ones included."""
    labels = {row["node_id"]: row["labels"]["ray.io/node-group"] for row in rows(cluster, "nodes")}
    found = [row for row in rows(cluster, kind) if name in str(row[key]) and row["node_id"]]
    assert found, f"none of {kind} is {name}: {sorted({str(row[key]) for row in rows(cluster, kind)})}"
    return {labels[row["node_id"]] for row in found}


def encoding(source: Path, out: Path, vae: Path, encoders: int = 1) -> dict[str, Any]:
    return {
        "input": str(source), "output": str(out), "vae": str(vae), "unit_size": UNIT_SIZE,
        "preprocess": {"sizes_px": [SIZE_PX]},
        "reader": {"num_cpus": 0.25, "resources": {"pool:encode-gpu": 1}},
        "decode": {"num_cpus": 1, "resources": {"pool:encode-gpu": 1}},
        "encoder": {
            "num_cpus": 0, "num_gpus": 1, "accelerator_type": "L4", "resources": {"pool:encode-gpu": 1},
            "min_size": encoders, "max_size": encoders,
        },
    }  # fmt: skip


@contextmanager
def serving(
    cluster: LocalCluster, folder: Path, model: Path, capsys: pytest.CaptureFixture[str], replicas: int = 1
) -> Iterator[httpx.Client]:
    """A server that was submitted, and is stopped at the end."""
    (port,) = free_ports(1)
    on_gpu = {"num_cpus": 0, "num_gpus": 0.5, "threads": 1, "resources": {"pool:serve-gpu": 1}}
    many = {"min_replicas": replicas, "max_replicas": replicas}
    options = {
        "model": str(model), "port": port, "cache_bytes": 0, "jobs": {"url": str(folder / "jobs")},
        "ingress": {"num_cpus": 0, "max_ongoing": 1000, "resources": {"pool:head": 1}},
        "sampler": {**on_gpu, **many, "max_rows": 8},
        "decoder": {**on_gpu, **many},
        "limits": {"sizes_multiple_px": 4, "max_steps": 1000},
    }  # fmt: skip
    assert submit(folder, "serve", "serve", options) == 0
    job = submitted(capsys)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S, trust_env=False) as http:

        def is_ready() -> bool:
            status = client(cluster).details(job).status
            assert not status.is_terminal(), client(cluster).logs(job)[-4000:]
            with suppress(httpx.TransportError):
                return http.get("/readyz").status_code == 200
            return False

        try:
            wait_until(is_ready, "the server is ready")
            yield http
        finally:
            assert cli.main(["jobs", "stop", job]) == 0
    assert client(cluster).wait(job, timeout_s=DEADLINE_S).status.value == "STOPPED"
    log = client(cluster).logs(job)
    assert "ending what is on its way" in log


def image(http: httpx.Client, seed: int, steps: int = 25) -> str:
    """An image of this seed. Tried again where the connection broke: its proxy may have been on that node."""
    body = {"prompt": "", "seed": seed, "num_inference_steps": steps}
    for _ in range(3):
        with suppress(httpx.TransportError):
            answer = http.post("/v1/images/generations", json=body)
            break
    assert answer.status_code == 200, answer.text
    made: str = answer.json()["data"][0]["b64_json"]
    return made
