"""What must hold of the repository as a whole."""

import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_BYTES = 5_200_000  # default models are at most 5 MB each


def canonical(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def kept_files() -> list[Path]:
    """Files that are, or could be, committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"]
)
def test_file_exists(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_no_file_is_too_large() -> None:
    assert [path for path in kept_files() if path.stat().st_size > MAX_FILE_BYTES] == []


def test_every_direct_dependency_is_pinned_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [re.match(r"([\w.-]+)==[^;\s]+(; python_version (<|>=) \"3\.11\")?$", line) for line in lines]
    assert [line for line, pin in zip(lines, pins, strict=True) if not pin and not line.startswith("#")] == []
    pinned = {canonical(pin[1]) for pin in pins if pin}
    direct = {canonical(re.split(r"[^\w.-]", line)[0]) for line in requires("ray-ldm") or []}
    assert "torch" in direct
    assert direct - pinned == set()


def test_version_is_stated_once() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    stated = re.search(r'^version = "(.+)"$', project, flags=re.MULTILINE)
    assert stated is not None
    assert version("ray-ldm") == stated[1]
    released = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert released[:1] in ([], [stated[1]])


def test_import_contracts_are_kept() -> None:
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run([*lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
