import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.text_config import TextConfig


@pytest.mark.parametrize(
    ("config", "is_on"),
    [
        ({}, False),
        ({"encoder": "openai/clip-vit-large-patch14", "layer": -2, "max_tokens": 40}, True),
        ({"precomputed": "t5.npy"}, True),
    ],
)
def test_a_config_has_one_source_or_none(config: dict[str, object], is_on: bool) -> None:
    assert TextConfig.model_validate(config).is_on is is_on


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"encoder": "a/b", "precomputed": "npy"}, "exclude each other"),
        ({"precomputed": "npy", "layer": -2}, "options of an encoder"),
        ({"max_tokens": 5}, "options of an encoder"),
        ({"encoder": "a/b", "max_tokens": 0}, "greater than or equal to 1"),
        ({"encoder": "a/b", "tokens": 5}, "Extra inputs are not permitted"),
    ],
)
def test_a_config_that_contradicts_itself_is_told(config: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TextConfig.model_validate(config)


def test_it_waits_for_no_large_import() -> None:
    run = "import sys, pipelines.text_config; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", run], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
