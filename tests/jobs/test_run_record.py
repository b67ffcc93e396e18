"""The record of a run: what it holds, where it is, and that a job neither fails nor changes because of it."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jobs import cli, run_facts
from jobs.run_record import Machine, RunRecord, read_records, records_folder, write_record
from jobs.run_stages import STAGES, RunStage, values_at
from jobs.stage_record import fingerprint
from pipelines.process import this_process

ROOT = Path(__file__).resolve().parents[2]
# Commands that leave nothing behind, or only in something that another command made.
WITHOUT = {
    "verify", "gc", "stats", "bench encode", "bench train", "bench tiling", "bench serve", "bench cluster",
    "plan", "runs", "cluster up", "submit", "jobs list", "jobs logs", "jobs stop", "chain",
}  # fmt: skip


@pytest.fixture
def recorded_tiny(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ldm tiny-job INPUT OUTPUT`` leaves a record."""
    monkeypatch.setitem(STAGES, "tiny-job", RunStage("output", ("input",)))


def only_record(output: Path) -> RunRecord:
    (record,) = read_records(str(output))
    return record


def test_every_command_is_known_to_leave_something_or_nothing() -> None:
    assert STAGES.keys() | WITHOUT == cli.COMMANDS.keys()
    assert STAGES.keys() & WITHOUT == set()


def test_options_of_the_stages_exist() -> None:
    from importlib import import_module

    from jobs.config import job_class

    for command, stage in STAGES.items():
        for path in (stage.output, *stage.inputs, *stage.vaes):
            model = job_class(import_module(cli.COMMANDS[command][0]))
            for name in path.split("."):
                assert name in model.model_fields, (command, path)
                model = model.model_fields[name].annotation


@pytest.mark.usefixtures("recorded_tiny")
def test_what_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out"
    source.write_bytes(b"abc")
    line = ["tiny-job", str(source), str(out), "--batch-size", "3", "--token", "hunter2", "--json"]
    assert cli.main(line) == 0
    assert capsys.readouterr().err == ""
    record = only_record(out)
    assert record.command == "tiny-job"
    assert record.line == f"ldm tiny-job {source} {out} --batch-size 3 --token '***' --json"
    assert record.config["batch_size"] == 3 and record.config["pool"] == {"min_size": 2, "max_size": 3}
    assert (record.status, record.error, record.output) == ("done", None, str(out))
    assert record.figures == {"input": str(source), "batch_size": 3, "psnr_db": "inf"}
    (read,) = record.inputs
    assert (read.kind, read.url) == ("file", str(source))
    assert read.fingerprint == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert record.outputs == ()  # it wrote nothing
    assert record.versions.keys() == {"python", "ray-ldm", "torch", "ray", "diffusers"}
    assert record.machine.nodes == 1 and record.machine.cpus == os.cpu_count()
    assert record.started <= str(record.ended) and record.seconds is not None
    (file,) = (tmp_path / "out.runs").iterdir()
    assert file.name == f"{record.run}.json"
    assert "hunter2" not in file.read_text()


@pytest.mark.usefixtures("recorded_tiny")
@pytest.mark.parametrize(
    ("end", "exit_status", "status", "error"),
    [
        ("failure", 1, "failed", "RuntimeError: out of luck"),
        ("interrupt", 130, "interrupted", "KeyboardInterrupt: "),
    ],
)
def test_a_run_that_does_not_end_well_has_a_record(
    tmp_path: Path, end: str, exit_status: int, status: str, error: str
) -> None:
    assert cli.main(["tiny-job", "in", str(tmp_path / "out"), "--end", end]) == exit_status
    record = only_record(tmp_path / "out")
    assert (record.status, record.error, record.figures) == (status, error, {})


@pytest.mark.usefixtures("recorded_tiny")
def test_a_mistake_that_is_found_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    assert cli.main(["tiny-job", "in", str(tmp_path / "out"), "--end", "user error"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("recorded_tiny")
def test_no_run_writes_over_the_record_of_another(tmp_path: Path) -> None:
    for _ in range(3):
        cli.main(["tiny-job", "in", str(tmp_path / "out")])
    assert len(read_records(str(tmp_path / "out"))) == 3


@pytest.mark.usefixtures("recorded_tiny")
def test_a_record_that_cannot_be_kept_is_told_and_the_job_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["tiny-job", "in", str(tmp_path / "file/out"), "--json"]) == 0
    printed, told = capsys.readouterr()
    assert json.loads(printed)["input"] == "in"
    (line,) = told.splitlines()
    assert line.startswith("ldm: this run's record is not kept: ")


@pytest.mark.usefixtures("ray_cluster")
def test_the_record_is_there_as_soon_as_ray_is(tmp_path: Path) -> None:
    from jobs.cluster import ClusterConfig, connected
    from jobs.current_run import recorded
    from jobs.sample import SampleJob

    with recorded("sample", [], SampleJob(checkpoint="none", out=tmp_path / "out")) as tell:
        assert not (tmp_path / "out.runs").exists()
        with connected(ClusterConfig()):
            begun = only_record(tmp_path / "out")
            assert os.environ["LDM_RUN_ID"] == begun.run
        tell({"images_per_s": 2.5})
    ended = only_record(tmp_path / "out")
    assert "LDM_RUN_ID" not in os.environ
    assert (begun.status, begun.shown_status, ended.status) == ("running", "running", "done")
    assert (ended.machine.nodes, ended.machine.cpus, ended.machine.gpus) == (1, 4, 2)
    assert ended.run == begun.run and ended.figures == {"images_per_s": 2.5}


@pytest.mark.usefixtures("ray_cluster")
def test_a_mistake_that_is_found_at_work_is_recorded(tmp_path: Path) -> None:
    from jobs.cluster import ClusterConfig, connected
    from jobs.current_run import recorded
    from jobs.sample import SampleJob
    from ldm.errors import UserError

    job = SampleJob(checkpoint="none", out=tmp_path / "out")
    with pytest.raises(UserError), recorded("sample", [], job), connected(ClusterConfig()):
        raise UserError("disk full", do="free space")
    record = only_record(tmp_path / "out")
    assert (record.status, record.error) == ("failed", "disk full; free space")


KILLED = """
import os, signal, sys
from jobs import current_run, run_facts
from jobs.shards import ShardsJob

job = ShardsJob(src="in", out=sys.argv[1])
with current_run.recorded("shards", [], job):
    current_run._current.begin(run_facts.machine())
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_has_a_record_that_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    record = only_record(out)
    assert (record.status, record.shown_status, record.ended) == ("running", "killed", None)


def _record(output: str, **changes: object) -> RunRecord:
    parts = {
        "run": "20261129T120000Z-00000000", "command": "encode", "line": "ldm encode", "config": {},
        "versions": {}, "commit": None, "process": this_process(), "machine": Machine(host="h"),
        "started": "2026-11-29T12:00:00.000+00:00", "output": output,
    }  # fmt: skip
    return RunRecord.model_validate(parts | changes)


def test_records_on_an_object_store() -> None:
    record = _record("memory://bucket/latents")
    write_record(record)
    write_record(record.model_copy(update={"status": "done"}))
    filesystem, folder = records_folder("memory://bucket/latents")
    assert [entry["name"] for entry in filesystem.ls(folder, detail=True)] == [
        "/bucket/latents.runs/20261129T120000Z-00000000.json"
    ]
    for place in ("memory://bucket/latents", "memory://bucket", "memory://bucket/latents.runs"):
        assert [found.status for found in read_records(place)] == ["done"]


def test_a_bucket_has_its_records_inside() -> None:
    assert records_folder("s3://bucket")[1] == "bucket/.runs"
    assert records_folder("s3://bucket/a/b")[1] == "bucket/a/b.runs"
    assert records_folder("/data")[1] == "/data.runs"


def test_a_record_changes_no_folder_for_a_chain(tmp_path: Path) -> None:
    (tmp_path / "all/samples").mkdir(parents=True)
    (tmp_path / "all/samples/a.png").write_bytes(b"1")
    before = fingerprint(str(tmp_path / "all"))
    write_record(_record(str(tmp_path / "all/samples")))
    assert fingerprint(str(tmp_path / "all")) == before
    (tmp_path / "all/b.png").write_bytes(b"1")
    assert fingerprint(str(tmp_path / "all")) != before


def test_figures_are_numbers_and_short_texts() -> None:
    result = {
        "loss": 0.5, "nan": math.nan, "ok": True, "none": None, "long": "x" * 201, "page": "out/a.html",
        "points": [{"fid": 1.5}, {"fid": 2}], "images": [{"psnr": 1.0}] * 33, "classes": {"cat": 3},
    }  # fmt: skip
    assert run_facts.figures(result) == {
        "loss": 0.5, "nan": "nan", "page": "out/a.html", "points.0.fid": 1.5, "points.1.fid": 2,
        "classes.cat": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://key:secret@host/b", "s3://***@host/b"),
        ("https://host/a.tar?X-Sig=abc&b=1", "https://host/a.tar?***"),
        ("a?b and c@d", "a?b and c@d"),
        (["--vae", "https://u:p@h/v?t=1"], ["--vae", "https://***@h/v?***"]),
    ],
)
def test_secrets_of_urls_are_left_out(given: object, kept: object) -> None:
    assert run_facts.without_secrets(given) == kept


def test_every_place_that_is_given_is_found() -> None:
    from jobs.serve import ServeJob

    job = ServeJob(
        model="/a",
        more_models={"b": {"folder": "/b"}},
        upsamplers=[{"checkpoint": "/u1"}, {"checkpoint": "/u2"}],
    )
    places = [values_at(job, path) for path in STAGES["serve"].inputs]
    assert places == [["/a"], ["/b"], ["/u1", "/u2"]]
    assert values_at(job, STAGES["serve"].output) == ["out/serve/jobs"]
