"""Log lines as JSON; tests/faults/test_run_logs.py has those of workers."""

import json
import logging
from collections.abc import Iterator

import pytest
from ray._common.formatters import JSONFormatter

from ldm.errors import UserError
from pipelines import json_logs


@pytest.fixture(autouse=True)
def _factory() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


def test_a_line_has_run_stage_level_time_and_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_RUN_ID", "20261129T120000Z-00000000")
    monkeypatch.setenv("LDM_STAGE", "evaluate recon")
    json_logs.name_records()
    record = logging.getLogger("x").makeRecord("x", logging.WARNING, "f.py", 3, "%d left", (2,), None)
    line = json.loads(JSONFormatter().format(record))
    assert (line["run_id"], line["stage"]) == ("20261129T120000Z-00000000", "evaluate recon")
    assert (line["levelname"], line["message"]) == ("WARNING", "2 left") and line["asctime"]


def test_without_a_run_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_RUN_ID", raising=False)
    monkeypatch.delenv("LDM_STAGE", raising=False)
    json_logs.name_records()
    assert not hasattr(logging.getLogger("x").makeRecord("x", 20, "f.py", 3, "m", (), None), "run_id")


def test_text_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_LOG_FORMAT", raising=False)
    assert not json_logs.is_json() and json_logs.ray_options() == {}
    monkeypatch.setenv("LDM_LOG_FORMAT", "json")
    monkeypatch.setenv("LDM_RUN_ID", "r")
    monkeypatch.delenv("LDM_STAGE", raising=False)
    options = json_logs.ray_options()
    assert options["logging_config"].encoding == "JSON"
    assert options["runtime_env"]["env_vars"] == {"LDM_RUN_ID": "r"}
    monkeypatch.setenv("LDM_LOG_FORMAT", "yaml")
    with pytest.raises(UserError, match="LDM_LOG_FORMAT is 'yaml'; allowed: text, json"):
        json_logs.is_json()
