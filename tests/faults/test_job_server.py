"""``ldm submit``, ``jobs`` and ``chain --address`` on a real Ray head with its job server and a token."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from PIL import Image

from jobs import cli
from jobs.listening import free_ports

pytestmark = [
    pytest.mark.faults_long,  # a head to start, and a process for every job: a minute and more
    # Ray's own client follows logs with it.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
LONG = {"crop_px": 8, "crops_per_image": 100_000}  # a tar of three pictures: longer than any test waits
SHORT = {"crop_px": 8, "crops_per_image": 5_000}


@dataclass(frozen=True)
class Head:
    """A running head. ``folder``: where Ray keeps everything, its logs included."""

    url: str
    token: str
    folder: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head of its own with the dashboard on loopback and token authentication."""
    with tempfile.TemporaryDirectory(prefix="ldm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, token = Path(name), uuid.uuid4().hex
        (folder / "token").write_text(token)
        (folder / "token").chmod(0o600)
        port, dashboard_port, agent_port, client_port = free_ports(4)
        inherited = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "LDM_"))}
        environment = {
            **inherited,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            # Ray's agents write the environment of jobs into their logs at the level info.
            "RAY_LOGGER_LEVEL": "warning",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            "--disable-usage-stats", "--node-ip-address", "127.0.0.1", "--port", str(port),
            "--temp-dir", str(folder / "ray"),
            "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port),
            "--dashboard-agent-listen-port", str(agent_port), "--ray-client-server-port", str(client_port),
            "--include-dashboard", "true", "--num-cpus", "2", "--object-store-memory", "80000000",
        ]  # fmt: skip
        log = folder / "start.log"
        with log.open("w") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{dashboard_port}"
            wait_until(lambda: answers(url, token), 120, log)
            yield Head(url, token, folder)
        finally:
            end(process)


def answers(url: str, token: str) -> bool:
    try:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.get(f"{url}/api/jobs/", headers=headers, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def wait_until(holds: Callable[[], object], timeout_s: float, log: Path) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.2)


def end(process: "subprocess.Popen[bytes]") -> None:
    """The head and what it started, and nothing else that is Ray's on this machine."""
    members = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(30)
    _, alive = psutil.wait_procs(members, timeout=10)
    for member in alive:
        member.kill()


@pytest.fixture
def address(head: Head, monkeypatch: pytest.MonkeyPatch) -> str:
    """The head's URL; this process has its token. RAY_API_SERVER_ADDRESS of the session leads elsewhere."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.folder / "token"))
    return head.url


@pytest.fixture
def photos(tmp_path: Path, photo: Callable[[int], bytes]) -> Path:
    """A working folder with three pictures, one of which is to stay here."""
    folder = tmp_path / "work/photos"
    folder.mkdir(parents=True)
    for index in range(3):
        (folder / f"{index}.png").write_bytes(photo(index))
    (folder / "stays.png").write_bytes(photo(3))
    return folder


def job_file(path: Path, **job: Any) -> str:
    path.write_text(yaml.safe_dump({"command": "shards", **job}))
    return str(path)


def sizes(tar: Path) -> dict[str, tuple[int, int]]:
    """source → size of the pictures in a shard."""
    found = {}
    with tarfile.open(tar) as archive:
        for member in archive.getnames():
            if member.endswith(".json"):
                source = json.load(archive.extractfile(member))["source"]  # type: ignore[arg-type]
                image = archive.extractfile(member.removesuffix(".json") + ".png")
                found[source] = Image.open(image).size  # type: ignore[arg-type]
    return found


def ended(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The line of --json."""
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_a_job_runs_with_its_folder_and_its_secrets(
    head: Head,
    address: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = f"secret-{uuid.uuid4().hex}"
    monkeypatch.setenv("MY_SECRET", secret)
    monkeypatch.setenv("LDM_SHARDS__RESIZE_PX", "16")  # proof that variables arrive: the pictures are smaller
    job = job_file(
        tmp_path / "pack.yaml",
        options={"src": "photos", "out": str(tmp_path / "out")},
        working_dir=str(photos.parent),
        excludes=["stays.png"],
        env=["MY_SECRET", "LDM_SHARDS__RESIZE_PX"],
        resources={"num_cpus": 1},
    )
    assert cli.main(["submit", job, "--address", address, "--follow"]) == 0
    out, err = capsys.readouterr()
    job_id = out.split(":")[0].removeprefix("submitted ")
    assert f"3 samples of 0 classes in 1 shards: {tmp_path}/out\n" in out
    assert sizes(tmp_path / "out/shard-000000.tar") == {f"{index}.png": (20, 16) for index in range(3)}
    assert cli.main(["jobs", "logs", job_id, "--address", address]) == 0
    log = capsys.readouterr().out
    assert log in out
    assert cli.main(["jobs", "list", "--address", address]) == 0
    listed = capsys.readouterr().out
    assert f"{job_id}  pack  SUCCEEDED  0  " in listed
    assert secret not in out + err + log + listed
    written = [
        path for path in (head.folder / "ray").rglob("*") if path.is_file() and "sockets" not in path.parts
    ]
    assert len(written) > 10
    assert [path for path in written if secret.encode() in path.read_bytes()] == []


def test_the_exit_status_is_the_jobs_own(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_file(tmp_path / "bad.yaml", options={"src": "/nowhere", "out": str(tmp_path / "out")})
    assert cli.main(["submit", job, "--address", address, "--wait"]) == 2
    out, err = capsys.readouterr()
    job_id = out.split(":")[0].removeprefix("submitted ")
    assert err.endswith(f"ldm submit: failed: job {job_id} FAILED: exit status 2\n")
    assert cli.main(["jobs", "logs", job_id, "--follow", "--address", address]) == 0
    assert "ldm shards: error: no such folder: /nowhere" in capsys.readouterr().out


def test_stop(address: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path / "long.yaml", options={"src": str(photos), "out": str(tmp_path / "out"), **LONG})
    assert cli.main(["submit", job, "--address", address, "--json"]) == 0
    job_id = ended(capsys)["job"]
    wait_until(lambda: [*tmp_path.glob(".out.*")], 60, tmp_path / "long.yaml")
    assert cli.main(["jobs", "stop", job_id, "--address", address, "--json"]) == 0
    assert ended(capsys) == {"job": job_id, "status": "STOPPED"}
    assert not (tmp_path / "out").exists()


def test_without_the_token_nothing_is_told(
    head: Head,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert httpx.get(f"{address}/api/jobs/", timeout=10).status_code == 401
    assert httpx.post(f"{address}/api/jobs/", json={"entrypoint": "true"}, timeout=10).status_code == 401
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert cli.main(["jobs", "list", "--address", address]) == 2
    assert capsys.readouterr().err.startswith(
        f"ldm jobs list: error: {address} refuses the token; set RAY_AUTH"
    )
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["jobs", "list", "--address", address]) == 2
    assert f"{address} asks for a token, and there is none" in capsys.readouterr().err


def test_a_job_that_is_not_there(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["logs"], ["logs", "--follow"], ["stop"]):
        assert cli.main(["jobs", *words, "--address", address, "none_such"]) == 2
        error = capsys.readouterr().err
        assert error.endswith("none_such does not exist; see ldm jobs list\n"), error


def test_a_killed_chain_finds_its_running_job(
    head: Head, address: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(name: str, options: dict[str, int]) -> dict[str, Any]:
        return {
            "name": name, "command": "shards",
            "options": {"src": str(photos), "out": str(tmp_path / name), **options},
        }  # fmt: skip

    path = tmp_path / "chain.yaml"
    stages = [stage("first", SHORT), stage("second", {})]
    path.write_text(yaml.safe_dump({"state": str(tmp_path / "state"), "stages": stages}))
    chain = ["chain", str(path), "--address", address]
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *chain], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        submitted = first.stdout.readline()
        first.send_signal(signal.SIGKILL)
    assert submitted.startswith("first: submitted ")
    assert cli.main(chain) == 0
    out = capsys.readouterr().out
    assert out.startswith(submitted.replace("submitted", "found"))
    assert "first: done\nsecond: submitted " in out
    assert out.endswith("second: done\n")
    assert cli.main(chain) == 0
    assert capsys.readouterr().out == "first: complete\nsecond: complete\n"
