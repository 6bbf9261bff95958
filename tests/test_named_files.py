"""A page or a docstring that names a file of this repository names one that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("", "src/drawplate", "src/drawplate/model", "src/drawplate/planner", "docs")
NAMED = re.compile(r"(?<![\w/.:-])((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|md|yaml|json))\b")
OTHERS = ("torch/_inductor/",)
"""Files of other projects."""
HISTORY = {"docs/log.md", "CHANGELOG.md"}

pages = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("bench/**/*.py")})


def unknown(page: Path, text: str) -> list[str]:
    """The names in a text that lead nowhere, from any place that the text may start from."""
    places = [*(ROOT / place for place in PLACES), page.parent]
    named = {name for name in NAMED.findall(text) if not name.startswith(OTHERS)}
    return sorted(name for name in named if not any((place / name).exists() for place in places))


@pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    if str(page.relative_to(ROOT)) in HISTORY:
        pytest.skip("history names what was")
    assert unknown(page, page.read_text(encoding="utf-8")) == []


LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


@pytest.mark.parametrize("page", [p for p in pages if p.suffix == ".md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_name_that_leads_nowhere_is_found() -> None:
    assert unknown(ROOT / "README.md", "see planner/nowhere.py and planner/search.py") == ["planner/nowhere.py"]
