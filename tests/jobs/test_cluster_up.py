"""``ldm cluster up``: what is refused before anything starts, and what a node is started with. No Ray."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jobs import cli
from jobs.cluster_up import ClusterUpJob
from jobs.local_pools import LocalPool
from jobs.ray_token import make_token, read_token
from tests.cluster.manifests import ROOT, clusters


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["cluster", "up", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_an_address_of_others_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--host", host)
    assert f"others reach {host}, and the token would go there without TLS" in line
    assert "--insecure" in line


@pytest.mark.parametrize("mode", ["disabled", ""])
def test_a_cluster_without_token_is_refused(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert f"RAY_AUTH_MODE is '{mode}'" in refused(capsys)


def test_a_token_file_that_others_read_or_that_is_empty_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    arguments = ["--token-file", str(file), "--dashboard-port", port]
    assert f"token file {file} is empty" in refused(capsys, *arguments)
    file.write_text("secret-of-the-test")
    file.chmod(0o640)
    line = refused(capsys, *arguments)
    assert "is open to others (mode 640)" in line
    assert "secret-of-the-test" not in line


def test_a_port_that_is_taken_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(capsys, "--dashboard-port", port)
    assert f"cannot listen at 127.0.0.1:{port}" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 2, "pools": {"a": {}}}, "pools say how many nodes"),
        ({"pools": {"head": {}}}, "the name of the head"),
        ({"pools": {"a_b": {}}}, "names have up to 32"),
        ({"pools": {"a": {"nodes": 0}}}, "greater than 0"),
    ],
)
def test_pools_that_mean_nothing_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ClusterUpJob.model_validate(options)


def test_a_token_is_new_and_nobody_elses_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        tokens = [make_token(tmp_path / name) for name in ("a", "b")]
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert [read_token(tmp_path / name) for name in ("a", "b")] == tokens
    assert len({*tokens}) == 2
    assert all(len(bytes.fromhex(token)) == 32 for token in tokens)
    with pytest.raises(FileExistsError):
        make_token(tmp_path / "a")
    assert read_token(tmp_path / "a") == tokens[0]


def test_a_node_offers_what_its_pool_says_and_its_pool() -> None:
    pool = LocalPool(num_cpus=0, num_gpus=1, resources={"accelerator_type:L4": 1})
    options = pool.start_options("encode-gpu")
    found = dict(zip(options[::2], options[1::2], strict=True))
    assert json.loads(found.pop("--resources")) == {"accelerator_type:L4": 1, "pool:encode-gpu": 1000}
    assert found == {"--num-cpus": "0", "--num-gpus": "1", "--object-store-memory": "200000000"}


def test_the_example_has_the_pools_of_kubernetes_with_their_kinds_of_gpu() -> None:
    values = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    pools = ClusterUpJob.model_validate(values).pools
    groups = [group for name in ("shared", "serve") for group in clusters()[name]["spec"]["workerGroupSpecs"]]
    assert {*pools} == {group["groupName"] for group in groups}
    for group in groups:
        pool, there = pools[group["groupName"]], group["resources"]
        kinds = {name for name in there if name.startswith("accelerator_type:")}
        assert {*pool.resources} == kinds
        assert (pool.num_gpus > 0) == (int(there.get("GPU", "0")) > 0)
        assert (pool.num_cpus > 0) == (int(there.get("CPU", "0")) > 0)
