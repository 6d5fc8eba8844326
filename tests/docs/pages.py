"""The pages of the documentation and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^(?P<mark><!-- (?:theirs|ours) -->\n)?(?P<fence>```+)(?P<language>[^\s`]*)[^\n]*\n(?P<code>.*?)^(?P=fence)\n?",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    language: str
    code: str
    line: int
    is_theirs: bool
    """Code of another package, for comparison."""


def pages() -> list[Path]:
    """All Markdown files that a reader may come to."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    built = ROOT / "docs" / "_build"
    found += [page for page in sorted((ROOT / "docs").rglob("*.md")) if built not in page.parents]
    return [*found, *sorted((ROOT / "benchmarks").glob("*.md"))]


def name_of(page: Path) -> str:
    """Relative to the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")), "theirs" in (m["mark"] or ""))
        for m in BLOCK.finditer(text)
    ]
