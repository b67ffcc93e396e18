"""The tiny job as a subcommand, in an environment that sets no options."""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from jobs import cli


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``tiny_job``, which ``ldm tiny-job`` runs."""
    for name in [name for name in os.environ if name.startswith("LDM_")]:
        monkeypatch.delenv(name)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setitem(cli.COMMANDS, "tiny-job", ("tiny_job", "does next to nothing"))
    return import_module("tiny_job")
