"""What runs a page's blocks fails where a command does, and makes smaller what the pages say."""

import re
from pathlib import Path

import pytest

from tests.docs.markdown_page import blocks, pages
from tests.docs.page_shell import SMALLER, PageShell, smaller


@pytest.fixture
def shell(tmp_path: Path) -> PageShell:
    return PageShell(tmp_path, key="a/b", port=1234, GREETING="hello")


def test_blocks_of_a_page_share_a_folder(shell: PageShell) -> None:
    shell.run("sh", "echo $GREETING > one\nls one")
    shell.run("python", "from pathlib import Path\nassert Path('one').read_text() == 'hello\\n'")


@pytest.mark.parametrize(
    ("language", "text"),
    [("sh", "false\ntouch after"), ("sh", "false | touch after; exit 1"), ("python", "1 / 0")],
)
def test_a_command_that_fails_is_told(shell: PageShell, language: str, text: str) -> None:
    with pytest.raises(AssertionError, match=r"ended with 1:"):
        shell.run(language, text)
    assert "false\ntouch" not in text or not (shell.folder / "after").exists()


def test_a_server_that_does_not_start_is_told(shell: PageShell) -> None:
    with pytest.raises(AssertionError, match="no model"):
        shell.run("sh", "ldm serve .")


def test_a_block_is_made_smaller() -> None:
    typed = "ldm train LATENTS OUT --train.preset small --train.steps 500\nldm decode LATENTS#KEY a.png\n"
    less = "ldm train LATENTS OUT --train.preset tiny --train.steps 2\nldm decode LATENTS#a/b a.png\n"
    assert smaller(typed, key="a/b", port=1) == less
    assert smaller("curl http://127.0.0.1:8000/v1", key="", port=81) == "curl http://127.0.0.1:81/v1"


@pytest.mark.parametrize("pattern", SMALLER)
def test_what_is_made_smaller_is_on_a_page(pattern: str) -> None:
    assert any(re.search(pattern, block.text) for page in pages() for block in blocks(page))
