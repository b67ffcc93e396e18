"""Servers as processes of their own: kills, ends and upgrades while images are being made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from jobs.listening import free_ports
from pipelines.serve.keys import new_key

pytestmark = pytest.mark.faults_long

START_S, DEADLINE_S = 120.0, 180.0
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEPS = 300
SMALL = {"num_cpus": 0.5, "threads": 1}


def _options(folder: Path) -> dict[str, Any]:
    return {
        "ingress": {"num_cpus": 0.1, "max_ongoing": 1000},
        "sampler": {**SMALL, "max_rows": 8},
        "decoder": SMALL,
        "limits": {"sizes_multiple_px": 4, "max_steps": 1000},
        "jobs": {"url": str(folder / "jobs")},
        "cache_bytes": 0,
    }


def _wait_until_ready(http: httpx.Client, process: "subprocess.Popen[str] | None" = None) -> None:
    end = time.monotonic() + START_S
    while True:
        assert process is None or process.poll() is None, "it ended before it was ready"
        assert time.monotonic() < end, "not ready"
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


@contextmanager
def _served(model: Path, folder: Path, *arguments: str) -> Iterator[tuple[httpx.Client, Any, str]]:
    """A client of ``ldm serve``, its process, and its key."""
    key, entry = new_key("tester")
    key_file, config, (port,) = folder / "keys", folder / "serve.yaml", free_ports(1)
    key_file.touch(mode=0o600)
    key_file.write_text(entry + "\n")
    config.write_text(json.dumps(_options(folder)))
    command = [sys.executable, "-m", "jobs.cli", "serve", str(model), "--port", str(port)]
    command += ["--access.key-file", str(key_file), "--config", str(config), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as http:
            _wait_until_ready(http, process)
            yield http, process, key
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _make(http: httpx.Client, key: str, seed: int, steps: int = STEPS) -> httpx.Response:
    body = {"class_label": 0, "seed": seed, "num_inference_steps": steps}
    return http.post("/v1/images/generations", json=body, headers={"Authorization": f"Bearer {key}"})


def _kill_samplers(process: "subprocess.Popen[str]") -> None:
    samplers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ServeReplica" in " ".join(child.cmdline()) and "sampler" in " ".join(child.cmdline())
    ]
    assert samplers
    for sampler in samplers:
        sampler.kill()


def _image(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    image: str = answer.json()["data"][0]["b64_json"]
    return image


@pytest.mark.parametrize("arguments", [[], ["--haproxy"]], ids=["own proxy", "haproxy"])
def test_a_server_is_killed_in_part_and_ended(
    checkpoint_folders: dict[str, Path], tmp_path: Path, arguments: list[str]
) -> None:
    with (
        _served(checkpoint_folders["flow"], tmp_path, *arguments) as (http, process, key),
        ThreadPoolExecutor(8) as threads,
    ):
        for headers in ({}, {"Authorization": "Bearer " + "x" * 43}):
            refused = http.post("/v1/images/generations", json={}, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
        undisturbed = _image(_make(http, key, seed=1))

        again = threads.submit(_make, http, key, 1)
        time.sleep(0.5)
        _kill_samplers(process)
        assert _image(again.result(DEADLINE_S)) == undisturbed

        many = [threads.submit(_make, http, key, seed) for seed in range(8)]
        time.sleep(0.5)
        _kill_samplers(process)
        assert all(_image(each.result(DEADLINE_S)) for each in many)

        last = [threads.submit(_make, http, key, seed) for seed in (1, 2)]
        time.sleep(0.5)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, output[-3000:]
        assert all(_image(each.result(DEADLINE_S)) for each in last)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """``serve`` commands against a head node of its own with a dashboard on the loopback."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    gcs, dashboard, agent, client = free_ports(4)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    environment = {**os.environ, **token, "PYTHONPATH": str(REPOSITORY)}
    head = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=8", f"--port={gcs}"]
    head += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    head += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    process = subprocess.Popen(
        head, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"

    def serve(*arguments: str) -> str:
        command = [str(BIN / "serve"), arguments[0], "-a", address, *arguments[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < end
            try:
                headers = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}
                if httpx.get(f"{address}/api/version", headers=headers, timeout=5.0).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.3)
        yield serve
    finally:
        with suppress(ProcessLookupError):  # it did not start
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def test_an_upgrade_drops_no_request(
    cluster: Callable[..., str], checkpoint_folders: dict[str, Path], tmp_path: Path
) -> None:
    """``serve deploy`` of cluster/serve.yaml, small and of other models; and again, while images are made."""
    if shutil.which("serve", path=str(BIN)) is None:
        pytest.fail("Ray's `serve` command is not installed")
    content = yaml.safe_load((REPOSITORY / "cluster" / "serve.yaml").read_text())
    (port,) = free_ports(1)
    content["http_options"]["port"] = port
    (application,) = content["applications"]
    application["args"] = {
        "models": {"default": {"folder": str(checkpoint_folders["flow"])}},
        **_options(tmp_path),
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(content))
    cluster("deploy", str(file))
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as http,
        ThreadPoolExecutor(4) as threads,
    ):
        _wait_until_ready(http)
        before = _image(_make(http, "none", seed=1))
        pending: list[Future[httpx.Response]] = [
            threads.submit(_make, http, "none", seed) for seed in range(4)
        ]
        time.sleep(0.5)
        application["args"]["sampler"]["max_rows"] = 4
        application["args"]["decoder"] = {**SMALL, "max_ongoing": 32}
        file.write_text(yaml.safe_dump(content))
        cluster("deploy", str(file))
        begin = time.monotonic()
        while time.monotonic() - begin < 30:
            pending += [threads.submit(_make, http, "none", seed, 50) for seed in range(2)]
            time.sleep(1.0)
        assert all(_image(each.result(DEADLINE_S)) for each in pending)
        assert "RUNNING" in cluster("status")
        assert _image(_make(http, "none", seed=1)) == before
