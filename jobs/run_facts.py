"""What a run record says of a run's surroundings and its result: versions, commit, machine, figures."""

import math
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, SecretStr

from jobs.run_record import Figure, Machine

__all__ = ["cluster", "commit", "figures", "machine", "secrets_of", "versions", "without_secrets"]

PACKAGES = ("ray-ldm", "torch", "ray", "diffusers")
ROOT = Path(__file__).resolve().parents[1]
GIT_TIMEOUT_S = 10
# A result may have a figure for each image: those are in the stage's own files.
MAX_LIST = 32
MAX_TEXT = 200
# user:password@ and ?signature of a URL.
SECRET_IN_URL = re.compile(r"(?<=://)[^/\s@]+@|\?[^\s'\"]+")


def versions() -> dict[str, str]:
    """Of Python, and of what is installed of `PACKAGES`. Imports none of them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the working tree that this code is in; None where it is in none, or git cannot tell."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine() -> Machine:
    """This one. GPUs count where the run has loaded torch, and only then are of use to it."""
    torch = sys.modules.get("torch")
    gpus = torch.cuda.device_count() if torch is not None else 0
    return Machine(host=socket.gethostname(), cpus=os.cpu_count() or 1, gpus=gpus)


def cluster() -> Machine:
    """The cluster that Ray is connected to, now."""
    import ray

    total = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's own
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    return Machine(
        host=socket.gethostname(), nodes=nodes, cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0)
    )


def figures(result: Mapping[str, object]) -> dict[str, Figure]:
    """Numbers and short texts of a result by their path, ``points.0.fid``; long lists are left out."""
    return dict(_flat(result, ""))


def secrets_of(config: BaseModel) -> list[str]:
    """The values of its secret options, wherever in it they are."""
    found = []
    for _, value in config:
        if isinstance(value, SecretStr):
            found.append(value.get_secret_value())
        elif isinstance(value, BaseModel):
            found += secrets_of(value)
    return [secret for secret in found if secret]


def without_secrets(value: object, secrets: Sequence[str] = ()) -> object:
    """Plain values with ``***`` for ``secrets``, and for what is before the @ and after the ? of a URL."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return SECRET_IN_URL.sub(_masked, value) if "://" in value else value
    if isinstance(value, Mapping):
        return {key: without_secrets(each, secrets) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each, secrets) for each in value]
    return value


def _masked(found: re.Match[str]) -> str:
    return "***@" if found[0].endswith("@") else "?***"


def _flat(value: object, path: str) -> Iterator[tuple[str, Figure]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _flat(each, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        if len(value) <= MAX_LIST:
            for index, each in enumerate(value):
                yield from _flat(each, f"{path}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, str(value)  # JSON has no such number
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int | float):
        yield path, value
    elif isinstance(value, str) and len(value) <= MAX_TEXT:
        yield path, str(without_secrets(value))
