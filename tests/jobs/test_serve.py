"""``ldm serve``, as far as it comes without a server; tests/pipelines/serve has the server."""

import socket
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from jobs.cli import main
from pipelines.serve.config import ServeConfig
from pipelines.serve.keys import new_key

REPOSITORY = Path(__file__).parents[2]


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no model" in _refused(capsys, str(tmp_path))


def test_a_port_that_is_taken(
    checkpoint_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = _refused(capsys, str(checkpoint_folders["flow"]), "--port", port)
    assert "--port" in line


def test_others_are_not_served_without_keys(
    checkpoint_folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = str(checkpoint_folders["flow"])
    assert "no API keys" in _refused(capsys, model, "--host", "0.0.0.0")
    keys = tmp_path / "keys"
    keys.write_text(new_key("me")[1] + "\n")
    keys.chmod(0o644)
    line = _refused(capsys, model, "--host", "0.0.0.0", "--access.key-file", str(keys))
    assert "600" in line


def test_an_unknown_option_of_a_stage(
    checkpoint_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = _refused(capsys, str(checkpoint_folders["flow"]), "--sampler.max-replica", "2")
    assert "max-replicas" in line


def test_a_stage_whose_bounds_are_in_disorder(
    checkpoint_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = _refused(capsys, str(checkpoint_folders["flow"]), "--sampler.min-replicas", "3")
    assert "min_replicas 3" in line


def test_the_cluster_file_is_what_ray_and_we_take() -> None:
    content = yaml.safe_load((REPOSITORY / "cluster" / "serve.yaml").read_text())
    deployed = ServeDeploySchema.model_validate(content)
    (application,) = deployed.applications
    assert application.import_path == "pipelines.serve.application:build"
    config = ServeConfig.model_validate(application.args)
    assert set(config.models) == {"default"}
