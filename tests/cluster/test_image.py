"""The Dockerfile and .dockerignore, as far as they can be judged without Docker."""

import re
import tomllib
from fnmatch import fnmatch

import pytest

from tests.cluster.manifests import ROOT, pods

DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Instructions, with continued lines joined.
LINES = [
    line
    for line in DOCKERFILE.replace("\\\n", " ").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]


def _stages() -> dict[str, tuple[str, list[str]]]:
    """Name → (what it is from, its lines)."""
    stages: dict[str, tuple[str, list[str]]] = {}
    name = ""
    for line in LINES:
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            name = match[2]
            stages[name] = (match[1], [])
        elif name:
            stages[name][1].append(line)
    return stages


def _all_lines(target: str) -> list[str]:
    """Of a stage, with those of what it is from."""
    parent, lines = _stages()[target]
    return (_all_lines(parent) if parent in _stages() else []) + lines


def test_targets_are_what_the_manifests_run() -> None:
    images = {pod.container["image"] for pod in pods() if pod.name != "redis"}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert images == {f"registry.example.com/ray-ldm:{version}-{target}" for target in ("cpu", "gpu")}
    assert {"cpu", "gpu"} <= set(_stages())


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_it_ends_as_the_user_whom_the_pods_name(target: str) -> None:
    lines = _all_lines(target)
    assert lines[-1] == "USER 1000:1000"
    (made,) = [line for line in lines if "useradd" in line]
    assert "--uid 1000" in made
    assert {pod.spec["securityContext"]["runAsUser"] for pod in pods() if pod.name != "redis"} == {1000}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_all_packages_are_constrained_and_none_is_in_an_environment(target: str) -> None:
    installs = [line for line in _all_lines(target) if "pip install" in line]
    assert len(installs) == 2
    assert all("constraints.txt " in line for line in installs)
    assert not any("venv" in line for line in _all_lines(target))


def test_the_base_has_the_oldest_python_that_is_tested() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (image,) = [line for line in LINES if line.startswith("ARG PYTHON_IMAGE=")]
    assert f"python:{requires.removeprefix('>=')}-slim" in image


def test_home_is_where_the_pods_mount_a_volume() -> None:
    assert "HOME=/home/ldm" in " ".join(_all_lines("cpu"))
    for pod in pods():
        if pod.name != "redis":
            assert "/home/ldm" in {mount["mountPath"] for mount in pod.container["volumeMounts"]}


def test_what_is_copied_is_in_the_context_and_nothing_else_is() -> None:
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored[0] == "*"
    kept = {line[1:].rstrip("/") for line in ignored if line.startswith("!")}
    copied = {source for line in LINES if line.startswith("COPY ") for source in line.split()[1:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_no_weights_but_the_default_vaes_get_in() -> None:
    packages = [ROOT / name for name in ("ldm", "pipelines", "jobs")]
    weights = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in package.rglob("*")
        if any(fnmatch(path.name, kind) for kind in ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth"))
    }
    assert weights == {
        f"ldm/assets/{name}/diffusion_pytorch_model.safetensors" for name in ("f4", "f8", "f16")
    }
