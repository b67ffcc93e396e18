"""Links of the documentation lead somewhere, and its index names every page."""

from pathlib import Path

import pytest

from tests.docs.markdown_page import ROOT, anchors, blocks, links

INDEX = ROOT / "docs" / "README.md"
LINKING = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "cluster").rglob("*.md")),
]


def broken(page: Path) -> list[str]:
    """Relative links of a page to a file or heading that is not there."""
    wrong = []
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    assert broken(page) == []


def test_the_index_names_every_page() -> None:
    linked = {(INDEX.parent / link.partition("#")[0]).resolve() for link in links(INDEX) if "://" not in link}
    assert {page.name for page in (ROOT / "docs").glob("*.md") if page not in linked} == {INDEX.name}


def test_every_picture_is_shown() -> None:
    shown = {(page.parent / link).resolve() for page in LINKING for link in links(page)}
    assert [path.name for path in (ROOT / "docs" / "pictures").iterdir() if path not in shown] == []


def test_what_is_wrong_with_a_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text(
        "# A `b_c` d: E, (f)\n\n## Twice\n\n## Twice\n\n```sh\n# no heading\n```\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "[1](there.md) [2](there.md#a-b_c-d-e-f) [3](there.md#twice-1) [4](#own) [5](https://a.b/c)\n\n"
        "# Own\n\n`[6](code.md)`\n\n```sh\n[7](code.md)\n```\n\n"
        '[8](gone.md) [9](there.md#gone) [10](#gone) ![11](gone.svg) <img src="gone.png"> '
        "[12](there.md#twice-2) [13](there.md#no-heading)\n"
    )
    assert broken(page) == [
        "gone.md", "there.md#gone", "#gone", "gone.svg", "gone.png", "there.md#twice-2",
        "there.md#no-heading",
    ]  # fmt: skip


def test_blocks_are_found_with_their_line_and_why_they_are_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n```sh\nls\npwd\n```\n\n<!-- not run: no GPU -->\n```python\nimport a\n```\n")
    found = [(block.line, block.language, block.text, block.not_run) for block in blocks(page)]
    assert found == [(4, "sh", "ls\npwd\n", None), (10, "python", "import a\n", "no GPU")]
