"""``ldm chain`` on this machine: what runs, what is skipped, what is refused."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from jobs.chain import ChainJob, StageError
from jobs.chain_file import read_chain
from jobs.stage_record import StageRecords, fingerprint, stage_digest
from ldm.errors import LdmError, UserError


@pytest.fixture
def photos(tmp_path: Path, photo: Callable[[int], bytes]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.png").write_bytes(photo(index))
    return folder


def pack(src: Path, out: Path, **options: object) -> dict[str, Any]:
    return {"name": out.name, "command": "shards", "options": {"src": str(src), "out": str(out), **options}}


def write_chain(path: Path, *stages: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"state": str(path.parent / "state"), "stages": list(stages)}))
    return path


def run(path: Path) -> object:
    return ChainJob(chain=path).run()["stages"]


def test_stages_run_in_order_and_only_once(tmp_path: Path, photos: Path) -> None:
    path = write_chain(
        tmp_path / "chain.yaml", pack(photos, tmp_path / "a"), pack(photos, tmp_path / "b", resize_px=16)
    )
    assert run(path) == {"a": "done", "b": "done"}
    written = (tmp_path / "a/shard-000000.tar").stat().st_mtime_ns
    assert run(path) == {"a": "complete", "b": "complete"}
    assert (tmp_path / "a/shard-000000.tar").stat().st_mtime_ns == written
    assert (tmp_path / "a/shard-000000.tar").read_bytes() != (tmp_path / "b/shard-000000.tar").read_bytes()


def test_a_failed_stage_ends_the_chain_with_its_status(
    tmp_path: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_chain(
        tmp_path / "chain.yaml",
        pack(photos, tmp_path / "a"),
        pack(tmp_path / "missing", tmp_path / "b"),
        pack(photos, tmp_path / "c"),
    )
    assert cli.main(["chain", str(path)]) == 2
    assert capfd.readouterr().err == (
        f"ldm shards: error: no such folder: {tmp_path}/missing; "
        "give a folder of images; sub-folders are classes\n"
        "ldm chain: failed: stage b ended with status 2; run the chain again to go on\n"
    )
    assert not (tmp_path / "c").exists()
    (tmp_path / "missing").symlink_to(photos)
    assert run(path) == {"a": "complete", "b": "done", "c": "done"}


def test_a_stage_killed_between_its_end_and_its_record_is_not_run_again(tmp_path: Path, photos: Path) -> None:
    """`ldm shards` would refuse the folder that is there."""
    path = write_chain(tmp_path / "chain.yaml", pack(photos, tmp_path / "a"))
    run(path)
    record = tmp_path / "state/a.json"
    begun = json.loads(record.read_text()) | {"left": {}}
    record.write_text(json.dumps(begun))
    assert run(path) == {"a": "done"}
    assert json.loads(record.read_text())["left"] == {str(tmp_path / "a"): fingerprint(str(tmp_path / "a"))}


def test_an_output_that_was_changed_is_not_taken_for_complete(tmp_path: Path, photos: Path) -> None:
    path = write_chain(tmp_path / "chain.yaml", pack(photos, tmp_path / "a"))
    run(path)
    (tmp_path / "a/shard-000000.tar").write_bytes(b"other")
    for _ in range(2):  # nor the second time, by a record of the first attempt
        with pytest.raises(StageError, match="stage a ended with status 2"):
            run(path)


def test_other_options_are_another_stage_and_all_after_it(tmp_path: Path, photos: Path) -> None:
    first, second = pack(photos, tmp_path / "a"), pack(photos, tmp_path / "b")
    path = write_chain(tmp_path / "chain.yaml", first, second)
    run(path)
    first["options"]["out"] = str(tmp_path / "a2")
    first["options"]["resize_px"] = 16
    write_chain(path, first, second)
    with pytest.raises(
        StageError, match="stage b"
    ):  # what it follows has changed; shards refuses to write again
        run(path)
    assert (tmp_path / "a2").is_dir()


def test_what_is_not_left_is_reported(tmp_path: Path, photos: Path) -> None:
    stage = pack(photos, tmp_path / "a") | {"done_when": str(tmp_path / "a/nothing")}
    with pytest.raises(
        LdmError, match=f"stage a ended well and left no {tmp_path}/a/nothing: see its done_when"
    ):
        run(write_chain(tmp_path / "chain.yaml", stage))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages in FILE is a list; allowed"),
        ([{"command": "shards"}], "stages.0.name in FILE is missing; add it"),
        (
            [{"name": "a", "command": "shards", "options": {"src": "s"}}],
            "stages.0.options.out in FILE is missing; add it",
        ),
        (
            [{"name": "a", "command": "shards", "options": {"src": "s", "out": "o", "croppx": 1}}],
            "unknown option stages.0.options.croppx in FILE; did you mean 'stages.0.options.crop_px'?",
        ),
        ([{"name": "a/b", "command": "shards"}], "stages.0.name in FILE is 'a/b'; allowed"),
        (
            [{"name": "a", "command": "decode"}],
            "stages.0 in FILE: stage a: no record of 'ldm decode' is known",
        ),
        ([{"name": "a", "command": "shards"}] * 2, "two stages are named 'a'"),
        (
            [{"name": "a", "command": "serve"}, {"name": "b", "command": "shards"}],
            "stage a runs until it is stopped: only the last stage may",
        ),
    ],
)
def test_mistakes_in_a_chain(stages: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    path = write_chain(tmp_path / "chain.yaml", *stages)
    with pytest.raises(UserError) as caught:
        run(path)
    assert str(caught.value).replace(str(path), "FILE").startswith(message)
    assert not (tmp_path / "state").exists()


def test_a_new_shard_makes_an_encoded_dataset_incomplete(
    tmp_path: Path, photos: Path, latent_folder: Path
) -> None:
    stage = {
        "name": "encode",
        "command": "encode",
        "options": {"input": str(photos), "output": str(latent_folder)},
    }
    chain = read_chain(write_chain(tmp_path / "chain.yaml", stage))
    (config,) = chain.check(tmp_path / "chain.yaml", on_cluster=False)
    (encode,) = chain.stages
    from fsspec.implementations.local import LocalFileSystem

    records = StageRecords(LocalFileSystem(), str(tmp_path / "state"))
    before = stage_digest(encode, config, [])
    assert encode.records(config) == (f"{latent_folder}/stats.json",)
    left = records.complete(encode, before, encode.records(config))
    assert records.left_by(encode, stage_digest(encode, config, [])) == left
    assert stage_digest(encode, config, ["other"]) != before
    (photos / "3.png").write_bytes((photos / "0.png").read_bytes())
    after = stage_digest(encode, config, [])
    assert after != before
    assert records.left_by(encode, after) is None


@pytest.mark.faults_long
@pytest.mark.timeout(1800)
def test_a_chain_killed_in_every_stage_is_the_undisturbed_one(
    tmp_path: Path, photos: Path, vae_folder: Path
) -> None:
    """SIGKILL of everything while a stage runs: again, only what is missing is done, to the same weights."""
    killed = [start_and_kill(tmp_path, photos, vae_folder, stage) for stage in ("shards", "encode", "train")]
    path = tmp_path / "killed.yaml"
    assert killed == [0, 1, 2]  # stages that were complete when it was killed
    assert run(path) == {"shards": "complete", "encode": "complete", "train": "done"}
    assert run(path) == {"shards": "complete", "encode": "complete", "train": "complete"}
    whole = three_stages(tmp_path, photos, vae_folder, "whole")
    assert run(whole) == {"shards": "done", "encode": "done", "train": "done"}
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def three_stages(tmp_path: Path, photos: Path, vae: Path, name: str) -> Path:
    root = tmp_path / name
    cluster = {"num_cpus": 4}
    training = {
        "preset": "tiny", "batch_size": 4, "steps": 120, "checkpoint_every": 10, "log_every": 10,
        "warmup_steps": 10, "threads": 1, "samples": {"num_images": 0}, "data": {"validation_rows": 0},
    }  # fmt: skip
    stages = [
        pack(photos, root / "shards", crop_px=32, crops_per_image=3000),
        {"name": "encode", "command": "encode", "options": {
            "input": str(root / "shards"), "output": str(root / "latents"), "vae": str(vae), "unit_size": 64,
            "preprocess": {"sizes_px": [32]}, "cluster": cluster}},
        {"name": "train", "command": "train", "options": {
            "dataset": str(root / "latents"), "out": str(root / "model"), "train": training,
            "cluster": cluster}},
    ]  # fmt: skip
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"state": str(root / "state"), "stages": stages}))
    return path


def start_and_kill(tmp_path: Path, photos: Path, vae: Path, stage: str) -> int:
    """Run the chain, kill all of it while that stage runs; returns how many stages were complete."""
    import psutil

    root = tmp_path / "killed"
    is_at_work: dict[str, Callable[[], object]] = {
        "shards": lambda: [*root.glob(".shards.*/shards/*.tar")],
        "encode": lambda: len([*root.glob("latents/commits/*.json")]) > 5,
        "train": lambda: [*root.glob("model/snapshots/*")],
    }
    path = three_stages(tmp_path, photos, vae, "killed")
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "chain", str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline_s = time.monotonic() + 400
            while not is_at_work[stage]():
                assert process.poll() is None, "it ended before it was killed"
                assert time.monotonic() < deadline_s, "no progress"
                time.sleep(0.02)
        finally:
            members = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for member in members:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.send_signal(number)
        output, _ = process.communicate(timeout=60)
    return output.count(": complete") + output.count(": done")
