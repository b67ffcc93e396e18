"""``ldm chain`` on this machine: what runs, what is skipped, what is refused."""

import json
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
