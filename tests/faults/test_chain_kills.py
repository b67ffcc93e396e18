"""SIGKILL of a chain in each of its stages: again, only what is missing is done, to the same last byte."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from pipelines.train.snapshots import SNAPSHOTS, find_snapshot
from tests.faults.killed_jobs import kill_everything

pytestmark = [pytest.mark.faults_long, pytest.mark.timeout(3000)]

STAGES = ("encode", "train", "evaluate", "deploy")
READY = "(end it with Ctrl+C)"
CLUSTER = {"num_cpus": 4}
SMALL = {"num_cpus": 0.5, "threads": 1}
PROGRESS_S, END_S = 600, 300


@dataclass(frozen=True)
class Started:
    """``ldm chain`` as a process, and everything that it and its stages print."""

    process: "subprocess.Popen[str]"
    log: Path

    def printed(self) -> str:
        return self.log.read_text()

    def states(self) -> list[str]:
        """Stages that are over, with their state, as it prints them."""
        return re.findall(
            rf"^(?:{'|'.join(STAGES)}|shards): (?:complete|done)$", self.printed(), re.MULTILINE
        )

    def wait_until(self, holds: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + PROGRESS_S
        while not holds():
            assert self.process.poll() is None, f"it has ended:\n{self.printed()[-3000:]}"
            assert time.monotonic() < deadline_s, f"no progress:\n{self.printed()[-3000:]}"
            time.sleep(0.02)


@contextmanager
def started(file: Path) -> Iterator[Started]:
    """The chain of a file; killed with all that it started at the end of the block, unless it has ended."""
    log = file.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "chain", str(file)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield Started(process, log)
    finally:
        if process.poll() is None:
            kill_everything(process)


@pytest.fixture
def photos(tmp_path: Path, photo: Callable[[int], bytes]) -> Path:
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.png").write_bytes(photo(index))
    return tmp_path / "photos"


def pack(photos: Path, out: Path, crops_per_image: int) -> dict[str, Any]:
    return {
        "name": "shards",
        "command": "shards",
        "options": {
            "src": str(photos), "out": str(out), "crop_px": 32, "crops_per_image": crops_per_image,
        },
    }  # fmt: skip


def write_chain(file: Path, root: Path, *stages: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump({"state": str(root / "state"), "stages": list(stages)}))
    return file


def run(file: Path) -> list[str]:
    with started(file) as chain:
        assert chain.process.wait(END_S) == 0, chain.printed()
        return chain.states()


def records(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "state").glob("*.json")}


def written(*roots: Path) -> dict[Path, int]:
    """When each file was last written, in nanoseconds, but for what says who may write."""
    files = [file for root in roots for file in root.rglob("*") if file.is_file()]
    return {file: file.stat().st_mtime_ns for file in files if file.parent.name != "writers"}


def test_killed_while_it_packs(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "chain"
    file = write_chain(tmp_path / "chain.yaml", root, pack(photos, root / "shards", 3000))
    with started(file) as chain:
        chain.wait_until(lambda: [*root.glob(".shards.*/shards/*.tar")])
    assert not (root / "shards").exists()
    assert (run(file), run(file)) == (["shards: done"], ["shards: complete"])
    killed = root.rename(tmp_path / "killed")
    assert run(file) == ["shards: done"]
    assert records(killed) == records(root)
    for path in (root / "shards").iterdir():
        assert (killed / "shards" / path.name).read_bytes() == path.read_bytes()


def test_killed_in_every_stage(photos: Path, vae_folder: Path, tmp_path: Path) -> None:
    """Encode, train, evaluate, deploy: five starts, of which four are killed, against one that is not."""
    root = tmp_path / "chain"
    file = four_stages(tmp_path, photos, vae_folder)
    commits, snapshots = root / "latents/commits", root / "model" / SNAPSHOTS
    with started(file) as chain:
        chain.wait_until(lambda: len([*commits.glob("*.json")]) > 5)
    assert chain.states() == []
    kept = written(commits)
    with started(file) as chain:
        chain.wait_until((snapshots / "latest.json").exists)
    assert chain.states() == ["encode: done"]
    assert kept.items() <= written(commits).items()  # what was committed was not encoded again
    kept, step = written(root / "latents"), find_snapshot(snapshots).step
    with started(file) as chain:
        chain.wait_until(lambda: "guidance 1, 2 steps: " in chain.printed())
    assert chain.states() == ["encode: complete", "train: done"]
    assert f"resuming from step {step}\n" in chain.printed()
    kept |= written(root / "model")
    with started(file) as chain:
        chain.wait_until(lambda: READY in chain.printed())
    assert chain.states() == ["encode: complete", "train: complete", "evaluate: done"]
    kept |= written(root / "reports")
    states, image = serve_one(file)
    assert states == ["encode: complete", "train: complete", "evaluate: complete", "deploy: done"]
    assert written(root / "latents", root / "model", root / "reports") == kept

    killed = root.rename(tmp_path / "killed")
    assert serve_one(file) == ([f"{stage}: done" for stage in STAGES], image)
    assert len(records(root)) == len(STAGES)
    assert records(killed) == records(root)
    for folder in ("latents/data", "latents/commits", "model/unet", "reports"):
        paths = made_in(root, folder)
        assert paths == made_in(killed, folder)
        for path in paths:
            assert (killed / path).read_bytes() == (root / path).read_bytes(), path


def made_in(root: Path, folder: str) -> set[Path]:
    """Files below ``root / folder``, but for the records of runs, of which killed ones have more."""
    files = {file for file in (root / folder).rglob("*") if file.is_file() and file.parent.suffix != ".runs"}
    assert files
    return {file.relative_to(root) for file in files}


def four_stages(folder: Path, photos: Path, vae: Path) -> Path:
    """A chain that reads SHARDS and HELD_OUT in ``folder`` and writes below its ``chain``."""
    root, shards, held_out = folder / "chain", folder / "SHARDS", folder / "HELD_OUT"
    for name, out, crops_per_image in (("many", shards, 500), ("few", held_out, 12)):
        run(write_chain(folder / f"{name}.yaml", folder / name, pack(photos, out, crops_per_image)))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    training = {
        "preset": "tiny", "batch_size": 4, "steps": 60, "checkpoint_every": 20, "log_every": 10,
        "warmup_steps": 10, "threads": 1, "samples": {"num_images": 0}, "data": {"validation_rows": 0},
    }  # fmt: skip
    encode = {
        "input": str(shards), "output": str(root / "latents"), "vae": str(vae), "unit_size": 32,
        "preprocess": {"sizes_px": [32]}, "cluster": CLUSTER,
    }  # fmt: skip
    train = {
        "dataset": str(root / "latents"), "out": str(root / "model"), "train": training, "cluster": CLUSTER
    }  # fmt: skip
    evaluate = {
        "checkpoint": str(root / "model"), "reference": str(held_out), "num_images": 8, "guidance": [1, 3],
        "steps": [2], "extractor": "random", "page": str(root / "reports/page.html"),
        "bootstrap": {"resamples": 20, "fid_resamples": 5}, "cluster": CLUSTER,
    }  # fmt: skip
    deploy = {
        "model": str(root / "model"), "port": port, "ingress": {"num_cpus": 0.1}, "sampler": SMALL,
        "decoder": SMALL, "jobs": {"url": str(folder / "jobs")}, "cluster": CLUSTER,
    }  # fmt: skip
    named = zip(STAGES, (encode, train, evaluate, deploy), strict=True)
    commands = {"evaluate": "evaluate samples", "deploy": "serve"}
    stages = [{"name": n, "command": commands.get(n, n), "options": options} for n, options in named]
    return write_chain(folder / "chain.yaml", root, *stages)


def serve_one(file: Path) -> tuple[list[str], bytes]:
    """Run the chain until its server has made an image, and end that server; states, and the image."""
    port = yaml.safe_load(file.read_text())["stages"][-1]["options"]["port"]
    with started(file) as chain:
        chain.wait_until(lambda: READY in chain.printed())
        body = {"prompt": "cat", "seed": 7, "num_inference_steps": 3}
        made = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body, timeout=END_S)
        assert made.status_code == 200, made.text
        for child in psutil.Process(chain.process.pid).children():
            child.terminate()
        assert chain.process.wait(END_S) == 0, chain.printed()
        return chain.states(), json.loads(made.content)["data"][0]["b64_json"]
