"""Several raylets on this machine: what listens, where the stages run, and SIGKILL of nodes and of the head."""

import ipaddress
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from jobs import cli
from jobs.job_client import JobClient
from jobs.local_cluster import HEAD, LocalCluster, free_ports, local_cluster
from jobs.local_pools import LocalPool
from jobs.ray_token import read_token
from pipelines.dataset import LatentDataset
from pipelines.shards import Sample, write_tar
from tests.faults.test_kills import tree
from tests.faults.test_train_resize import OPTIONS as TRAINING
from tests.faults.test_train_resize import on_one_process

pytestmark = [
    pytest.mark.faults_long,  # a cluster for each test: minutes
    pytest.mark.timeout(900),
    # Ray's own client follows logs with it.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
CPU_DECODE = LocalPool(num_cpus=2)
ENCODE_GPU = LocalPool(num_cpus=0, num_gpus=1, resources={"accelerator_type:L4": 1})
TRAIN_GPU = LocalPool(num_cpus=1, num_gpus=1, resources={"accelerator_type:H100": 1})
SERVE_CPU = LocalPool(num_cpus=2)
SERVE_GPU = LocalPool(num_cpus=0, num_gpus=1)
SAMPLES, UNIT_SIZE = 240, 8
DEADLINE_S = 180.0


def of(pool: LocalPool, nodes: int) -> LocalPool:
    return pool.model_copy(update={"nodes": nodes})


@contextmanager
def up(monkeypatch: pytest.MonkeyPatch, **pools: LocalPool) -> Iterator[LocalCluster]:
    """A cluster whose variables this process has. pools: names with _ in place of -."""
    with local_cluster({name.replace("_", "-"): pool for name, pool in pools.items()}) as cluster:
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        yield cluster


def wait_until(holds: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        time.sleep(0.1)


# -- jobs


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
        "preprocess": {"sizes_px": [32]},
        "reader": {"num_cpus": 0.25, "resources": {"pool:cpu-decode": 1}},
        "decode": {"num_cpus": 1, "resources": {"pool:cpu-decode": 1}},
        "encoder": {
            "num_cpus": 0, "num_gpus": 1, "accelerator_type": "L4", "resources": {"pool:encode-gpu": 1},
            "min_size": encoders, "max_size": encoders,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photo: Callable[[int], bytes]) -> Path:
    """Six tars; every ninth sample is bad, so that quarantine has to survive, too."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(6):
        keys = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        images = [b"no image" if key % 9 == 0 else photo(key % 16) for key in keys]
        write_tar(
            folder / f"s{shard}.tar", [Sample(f"{k:05d}", i) for k, i in zip(keys, images, strict=True)]
        )
    return folder


NUM_UNITS = 6 * SAMPLES // UNIT_SIZE


@pytest.fixture(scope="module")
def undisturbed(
    shards: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one process with a Ray of its own makes of the shards."""
    out = tmp_path_factory.mktemp("undisturbed") / "latents"
    options = {
        **encoding(shards, out, vae_folder), "reader": {"num_cpus": 0.25}, "decode": {"num_cpus": 1},
        "encoder": {"num_cpus": 1}, "cluster": {"num_cpus": 3},
    }  # fmt: skip
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps(options))
    command = [sys.executable, "-m", "jobs.cli", "encode", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return latents_of(out)


def latents_of(out: Path) -> dict[str, bytes]:
    """A dataset without what is told of each run."""
    return {name: data for name, data in tree(out).items() if not name.startswith("runs/")}


def committed(out: Path) -> int:
    return len(list(out.glob("commits/*.json")))


# -- what listens


def listening(cluster: LocalCluster) -> dict[str, list[tuple[str, int]]]:
    """Title of a process of the cluster → (address, port) on which it listens."""
    found: dict[str, list[tuple[str, int]]] = {}
    for process in cluster.processes():
        with suppress(psutil.NoSuchProcess):
            addresses = [
                (entry.laddr.ip, entry.laddr.port)
                for entry in process.net_connections("inet")
                if entry.status == psutil.CONN_LISTEN
            ]
            if addresses:
                title = " ".join(process.cmdline())[:300]
                found.setdefault(f"{process.pid} {title}", []).extend(addresses)
    return found


def beyond_loopback(cluster: LocalCluster) -> list[tuple[str, str, int]]:
    return [
        (title, address, port)
        for title, places in listening(cluster).items()
        for address, port in places
        if not ipaddress.ip_address(address).is_loopback
    ]


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


def python(code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Of a driver, which has this process' variables but for Ray's, and these."""
    import os

    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **variables}, capture_output=True, text=True, timeout=120
    )


CONNECT = """
import ray
ray.init(address="auto", log_to_driver=False)
print(sorted(node["NodeName"] for node in ray.nodes()))
"""


def test_all_of_it_is_on_loopback_and_wants_the_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with up(monkeypatch, cpu_decode=CPU_DECODE, encode_gpu=ENCODE_GPU) as cluster:
        # A driver, so that workers listen, too.
        connected = python(CONNECT, **cluster.variables)
        assert connected.returncode == 0, connected.stderr[-3000:]
        assert connected.stdout == "['cpu-decode-1', 'encode-gpu-1', 'head']\n"
        found = listening(cluster)
        ports = {port for places in found.values() for _, port in places}
        print(f"{len(ports)} ports of {len(found)} processes listen")
        assert len(ports) > 10
        assert beyond_loopback(cluster) == []
        assert own_addresses(), "this machine has no other address: nothing was shown"
        assert [(a, p) for a in own_addresses() for p in sorted(ports) if answers(a, p)] == []
        assert all(answers("127.0.0.1", int(url.rpartition(":")[2])) for url in (cluster.url, cluster.address))

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
    command = [sys.executable, "-m", "jobs.cli", "cluster", "up", "--nodes", "1", "--dashboard-port", str(port)]
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(10)]
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


# -- where the stages run


@contextmanager
def serving(
    cluster: LocalCluster, folder: Path, model: Path, capsys: pytest.CaptureFixture[str], samplers: int = 1
) -> Iterator[httpx.Client]:
    """A server that was submitted, and is stopped at the end."""
    (port,) = free_ports(1)
    on_gpu = {"num_cpus": 0, "num_gpus": 0.5, "threads": 1, "resources": {"pool:serve-gpu": 1}}
    replicas = {"min_replicas": samplers, "max_replicas": samplers}
    options = {
        "model": str(model), "port": port, "cache_bytes": 0, "jobs": {"url": str(folder / "jobs")},
        "ingress": {"num_cpus": 0.5, "max_ongoing": 1000, "resources": {"pool:serve-cpu": 1}},
        "sampler": {**on_gpu, **replicas, "max_rows": 8},
        "decoder": {**on_gpu, **replicas},
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

        wait_until(is_ready, "the server is ready")
        yield http
    assert cli.main(["jobs", "stop", job]) == 0
    assert client(cluster).wait(job, timeout_s=DEADLINE_S).status.value == "STOPPED"
    log = client(cluster).logs(job)
    assert "ending what is on its way" in log


def image(http: httpx.Client, seed: int, steps: int = 25) -> str:
    """An image of this seed. Tried again where the connection broke: its proxy may have been on that node."""
    body = {"class_label": 0, "seed": seed, "num_inference_steps": steps}
    for _ in range(3):
        with suppress(httpx.TransportError):
            answer = http.post("/v1/images/generations", json=body)
            break
    assert answer.status_code == 200, answer.text
    made: str = answer.json()["data"][0]["b64_json"]
    return made


def test_each_stage_runs_on_the_nodes_that_its_resources_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    shards: Path,
    vae_folder: Path,
    undisturbed: dict[str, bytes],
) -> None:
    """Three nodes with GPUs, and two for what counts CPUs only."""
    latents, model = tmp_path / "latents", tmp_path / "model"
    with up(
        monkeypatch,
        cpu_decode=CPU_DECODE,
        encode_gpu=ENCODE_GPU,
        train_gpu=TRAIN_GPU,
        serve_cpu=SERVE_CPU,
        serve_gpu=SERVE_GPU,
    ) as cluster:
        assert submit(tmp_path, "encode", "encode", encoding(shards, latents, vae_folder), "--wait") == 0
        assert latents_of(latents) == undisturbed
        assert pools_of(cluster, "actors", "UnitEncoder", "class_name") == {"encode-gpu"}
        assert pools_of(cluster, "tasks", "_decode_row", "name") == {"cpu-decode"}

        training = {
            "preset": "tiny", "batch_size": 16, "steps": 20, "num_gpus": 1, "threads": 1,
            "resources": {"pool:train-gpu": 1}, "log_every": 10,
        }  # fmt: skip
        options = {"dataset": str(latents), "out": str(model), "train": training}
        assert submit(tmp_path, "train", "train", options, "--wait") == 0
        assert pools_of(cluster, "actors", "RayTrainWorker", "class_name") == {"train-gpu"}
        assert json.loads((model / "ldm.json").read_text())["step"] == 20
        capsys.readouterr()

        with serving(cluster, tmp_path, model, capsys) as http:
            made = image(http, seed=1)
            assert image(http, seed=1) == made
            assert pools_of(cluster, "actors", "sampler", "class_name") == {"serve-gpu"}
            assert pools_of(cluster, "actors", "decoder", "class_name") == {"serve-gpu"}
            assert pools_of(cluster, "actors", "ingress", "class_name") == {"serve-cpu"}
            places = beyond_loopback(cluster)
            print("listens beyond loopback while it serves:", *places, sep="\n  ")
            # Serve's replicas take calls of other stages there, with the token; nothing tells them otherwise.
            assert all("ServeReplica" in title for title, *_ in places)


# -- kills


def test_encoding_goes_on_without_a_node(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    shards: Path,
    vae_folder: Path,
    undisturbed: dict[str, bytes],
) -> None:
    out = tmp_path / "latents"
    with up(monkeypatch, cpu_decode=of(CPU_DECODE, 2), encode_gpu=of(ENCODE_GPU, 2)) as cluster:
        assert submit(tmp_path, "encode", "encode", encoding(shards, out, vae_folder, encoders=2)) == 0
        job = submitted(capsys)
        for victim in ("encode-gpu-1", "cpu-decode-1"):
            seen = committed(out)
            wait_until(lambda seen=seen: committed(out) >= seen + 5, "units are committed")  # type: ignore[misc]
            cluster.kill_node(victim)
        at_kill = committed(out)
        succeed(cluster, job)
    assert at_kill < NUM_UNITS, "it had ended before the second kill"
    assert latents_of(out) == undisturbed
    print(f"nodes killed with at most {at_kill} of {NUM_UNITS} units committed")


def test_training_goes_on_without_a_node(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_latents: Callable[..., Path],
) -> None:
    dataset, out = write_latents(tmp_path / "latents", count=200, size_px=64), tmp_path / "model"
    training = {**TRAINING, "num_workers": 2, "num_gpus": 1, "resources": {"pool:train-gpu": 1}}

    def lines() -> list[dict[str, Any]]:
        file = out / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    with up(monkeypatch, train_gpu=of(TRAIN_GPU, 2), serve_gpu=LocalPool(num_cpus=1, num_gpus=1)) as cluster:
        options = {"dataset": str(dataset), "out": str(out), "train": training}
        assert submit(tmp_path, "train", "train", options) == 0
        job = submitted(capsys)
        wait_until(lambda: lines() and lines()[-1]["step"] >= 15, "steps are done")
        reached = lines()[-1]["step"]
        cluster.kill_node("train-gpu-1")
        succeed(cluster, job)
        assert pools_of(cluster, "actors", "RayTrainWorker", "class_name") == {"train-gpu"}
    steps = [line["step"] for line in lines()]
    assert steps == list(range(1, TRAINING["steps"] + 1))
    workers = [line["workers"] for line in lines()]
    last_on_two = sum(count == 2 for count in workers)
    assert workers == [2] * last_on_two + [1] * (len(workers) - last_on_two)
    assert 0 < last_on_two < len(workers)
    assert reached - last_on_two <= TRAINING["checkpoint_every"]
    expected = on_one_process(dataset, tmp_path / "one")
    differences = {line["step"]: abs(line["loss"] / expected[line["step"]] - 1) for line in lines()}
    assert max(differences[step] for step in range(1, 51)) <= 1e-5
    print(f"killed at step {reached}, went on from {last_on_two}, differs by {max(differences.values()):.1e}")


def test_serving_goes_on_without_a_node(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checkpoint_folders: dict[str, Path],
) -> None:
    with (
        up(monkeypatch, serve_cpu=SERVE_CPU, serve_gpu=of(SERVE_GPU, 2)) as cluster,
        serving(cluster, tmp_path, checkpoint_folders["flow"], capsys, samplers=2) as http,
        ThreadPoolExecutor(8) as threads,
    ):
        wait_until(lambda: replicas_by_node(cluster, "sampler") == [1, 1], "a sampler on each node")
        undisturbed = {seed: image(http, seed, steps=300) for seed in range(4)}
        again = [threads.submit(image, http, seed, 300) for seed in (*range(4), *range(4))]
        time.sleep(1.0)
        assert not any(each.done() for each in again)
        cluster.kill_node("serve-gpu-1")
        assert [each.result(DEADLINE_S) for each in again] == [undisturbed[seed % 4] for seed in range(8)]
        assert [image(http, seed, steps=300) for seed in range(4)] == [undisturbed[seed] for seed in range(4)]


def replicas_by_node(cluster: LocalCluster, name: str) -> list[int]:
    alive = [
        row["node_id"]
        for row in rows(cluster, "actors")
        if name in row["class_name"] and "ServeReplica" in row["class_name"] and row["state"] == "ALIVE"
    ]
    return sorted(alive.count(node) for node in set(alive))


def test_after_the_head_was_killed_the_same_job_ends_as_if_undisturbed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    shards: Path,
    vae_folder: Path,
    undisturbed: dict[str, bytes],
) -> None:
    out = tmp_path / "latents"
    options = encoding(shards, out, vae_folder)
    with up(monkeypatch, cpu_decode=CPU_DECODE, encode_gpu=ENCODE_GPU) as cluster:
        assert submit(tmp_path, "encode", "encode", options) == 0
        wait_until(lambda: committed(out) >= 10, "units are committed")
        cluster.kill_node(HEAD)
        assert not answers("127.0.0.1", int(cluster.url.rpartition(":")[2]))
    done = committed(out)
    assert 10 <= done < NUM_UNITS
    before = shutil.copytree(out / "commits", tmp_path / "commits")
    with up(monkeypatch, cpu_decode=CPU_DECODE, encode_gpu=ENCODE_GPU):
        capsys.readouterr()
        assert submit(tmp_path, "encode", "encode", options, "--follow") == 0
        said = capsys.readouterr().out
    assert f"{NUM_UNITS - done} units done, {done} skipped" in said
    assert latents_of(out) == undisturbed
    for path in before.iterdir():
        assert path.read_bytes() == (out / "commits" / path.name).read_bytes()
    assert LatentDataset.open(str(out)).is_derived_current()
