"""Every message that docs/troubleshooting.md explains is one that the code can print."""

import ast
import re
from functools import cache

import pytest

from tests.docs.markdown_page import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
FILLED_IN = "…"


@cache
def messages() -> frozenset[str]:
    """Every text of the sources, with a sign for each value that is filled in."""
    found = set()
    for package in ("ldm", "pipelines", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            found |= {_text(node) for node in ast.walk(ast.parse(path.read_text()))}
    return frozenset(found - {""})


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or FILLED_IN for part in node.values)
    return ""


ROWS = ROW.findall(PAGE.read_text())


def test_the_page_has_its_rows() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(lines) > 100
    assert len({message for message, *_ in ROWS}) == len(ROWS)


@pytest.mark.parametrize("message", [message for message, *_ in ROWS])
def test_the_message_is_one_of_the_source(message: str) -> None:
    assert message in messages()
