"""The ``ldm`` command: how it finds a job, what it prints, and its exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jobs import cli

ROOT = Path(__file__).resolve().parents[2]
HEAVY_MODULES = ("torch", "ray", "pydantic", "pydantic_settings", "yaml", "numpy", "diffusers")


@pytest.mark.parametrize("args", ["[]", "['--help']", "['evaluate']", "['nonsense']"])
def test_no_heavy_module_is_imported_before_a_job_runs(args: str) -> None:
    code = f"import sys; from jobs.cli import main; main({args}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    imported = done.stdout.splitlines()[-1].split()
    assert "jobs.cli" in imported
    assert set(imported) & set(HEAVY_MODULES) == set()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["-h"]) == 0
    out = capsys.readouterr().out
    for command, (_, summary) in cli.COMMANDS.items():
        assert len(re.findall(rf"^  {command} +{re.escape(summary)}$", out, flags=re.MULTILINE)) == 3


def test_version_is_that_of_the_installed_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ldm {version('ray-ldm')}\n"


def test_first_word_of_a_two_word_command_lists_its_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate"]) == 0
    out = capsys.readouterr().out
    assert "evaluate recon" in out
    assert "train-vae" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["encod"], "unknown command 'encod'; did you mean 'encode'?"),
        (["evaluate", "recn", "x"], "unknown command 'evaluate recn'; did you mean 'evaluate recon'?"),
        (["evaluate", "zzzzzzzz"], "unknown command 'evaluate zzzzzzzz'; did you mean 'evaluate by-f'?"),
        (["--jsn"], "unknown command '--jsn'; allowed: " + ", ".join(cli.COMMANDS)),
    ],
)
def test_unknown_command(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"ldm: error: {message}\n")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["evaluate", "recon", "out"], "evaluate recon"),
        (["train-vae", "in"], "train-vae"),
        (["train"], "train"),
        (["evaluate"], None),
    ],
)
def test_longest_command(args: list[str], expected: str | None) -> None:
    assert cli.longest_command(args) == expected


def test_help_of_a_job_shows_descriptions_and_defaults(
    tiny: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["tiny-job", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "Do next to nothing.\n\nA second paragraph of help." in out
    assert "images per batch (default: 8)" in out
    assert "fewest actors (default: 2)" in out
    for option in ("INPUT", "--flips, --no-flips", "--pool.max-size", "--config FILE", "--json"):
        assert option in out


def test_json_is_the_last_line_and_is_standard_json(
    tiny: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tiny-job", "in", "--batch-size", "3", "--json"]) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last_line) == {"input": "in", "batch_size": 3, "psnr_db": "Infinity"}


def test_without_json_nothing_is_added(tiny: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tiny-job", "in"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["in", "--end", "user error"], "no class 'owl'; allowed: cat, dog; choose one"),
        (["in", "--batch-size", "x"], "--batch-size is 'x'; allowed: a valid integer"),
        (["in", "--flip"], "unknown option '--flip'; did you mean '--flips'?"),
    ],
)
def test_user_error_is_one_line_and_status_2(
    tiny: ModuleType, args: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tiny-job", *args, "--json"]) == 2
    assert capsys.readouterr() == ("", f"ldm tiny-job: error: {line}\n")


def test_failure_is_a_traceback_with_a_summary_and_status_1(
    tiny: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tiny-job", "in", "--end", "failure", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback")
    assert err.endswith("\nldm tiny-job: failed: RuntimeError: out of luck\n")


def test_interrupt_is_status_130(tiny: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tiny-job", "in", "--end", "interrupt"]) == 130
    assert capsys.readouterr().err == "ldm tiny-job: interrupted\n"
