"""A page of the documentation, as far as tests read it: blocks of code, links, headings."""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "anchors", "blocks", "links", "needs", "pages"]

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"```(\w*)$")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
NEEDS = re.compile(r"^<!-- needs: (.+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
HEADING = re.compile(r"#{1,6} (.+)")


@dataclass(frozen=True)
class Block:
    """Code between fences. line: its first one in the file, from 1; not_run: why a test leaves it out."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None


def pages() -> list[Path]:
    """README.md, and the pages of docs/ in their order."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def needs(page: Path) -> list[str]:
    """Files that the page takes as there: ``<!-- needs: LATENTS, CHECKPOINT -->``."""
    return [name for line in NEEDS.findall(page.read_text()) for name in line.split(", ")]


def blocks(page: Path) -> list[Block]:
    """Every fenced block. The comment ``<!-- not run: why -->`` stands on the line before its fence."""
    found, start, language, before = [], 0, "", ""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence is None:
            continue
        if not start:
            start, language, before = number + 1, fence[1], lines[number - 1] if number else ""
        else:
            why = NOT_RUN.fullmatch(before)
            text = "\n".join(lines[start:number]) + "\n"
            found.append(Block(page, start + 1, language, text, why[1] if why else None))
            start = 0
    assert not start, f"{page}: a fence of line {start} is not closed"
    return found


def links(page: Path) -> list[str]:
    """Targets of its links and pictures."""
    return [markdown or html for markdown, html in LINK.findall(_prose(page))]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of its headings."""
    found: dict[str, int] = {}
    for line in _prose(page, keep_code=True).splitlines():
        if heading := HEADING.fullmatch(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    return {
        name if not count else f"{name}-{count}" for name, most in found.items() for count in range(most + 1)
    }


def _prose(page: Path, *, keep_code: bool = False) -> str:
    """The text without fenced blocks, and without code in backticks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return text if keep_code else re.sub(r"`[^`\n]*`", "", text)
