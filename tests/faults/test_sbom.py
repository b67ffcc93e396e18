"""``make sbom`` lists what is installed, and nothing else. It fetches its tools the first time."""

import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.test_tree import ROOT, canonical

pytestmark = pytest.mark.faults_long


def test_the_bill_lists_what_is_installed_in_the_pinned_versions(tmp_path: Path) -> None:
    bill = tmp_path / "sbom.json"
    # Of this interpreter's environment, which is not to be installed again: `-o`.
    command = ["make", "sbom", f"SBOM={bill}", f"BIN={Path(sys.executable).parent}", "-o", ".venv/.installed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(bill.read_text())
    assert content["bomFormat"] == "CycloneDX"
    listed = {canonical(part["name"]): part["version"] for part in content["components"]}
    installed = {canonical(part.name): part.version for part in distributions()}
    assert listed == installed
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [
        match for line in lines if (match := re.match(r"([\w.-]+)==([^;\s]+)(; python_version.*)?$", line))
    ]
    wanted = {canonical(pin[1]): pin[2] for pin in pins if pin[3] is None}
    assert len(listed.keys() & wanted.keys()) > 150
    assert {name: version for name, version in listed.items() if wanted.get(name, version) != version} == {}
