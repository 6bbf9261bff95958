"""Cut the general English prose that Drawplate ships out of two public-domain texts of the Canterbury corpus.

pip download --no-binary :all: --no-deps brotli==1.1.0; tar xf Brotli-1.1.0.tar.gz
python bench/general_text.py Brotli-1.1.0/tests/testdata src/drawplate/data/general_english.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

FEWEST_CHARACTERS, MOST_CHARACTERS, DOCUMENTS_EACH = 550, 1000, 60


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs on one line each; a new one starts after an empty line, or at an indented line."""
    for block in re.split(r"\n\s*\n|\n(?=  [A-Z`])", text):
        yield re.sub(r"\s+", " ", block).strip()


def excerpts(text: str, is_prose: Callable[[str], bool]) -> list[str]:
    """Neighbouring paragraphs of prose, together within the bounds."""
    found: list[str] = []
    together: list[str] = []
    for paragraph in [*paragraphs(text), ""]:
        if is_prose(paragraph):
            together.append(paragraph)
        size = sum(map(len, together))
        if size >= FEWEST_CHARACTERS or not is_prose(paragraph):
            excerpt = "\n\n".join(together)
            if size >= FEWEST_CHARACTERS and len(excerpt) <= MOST_CHARACTERS:
                found.append(excerpt)
            together = []
    return found


def is_story(paragraph: str) -> bool:
    """Not a heading, a row of stars or a single cry."""
    return len(paragraph) >= 40 and not paragraph.startswith("CHAPTER") and "* *" not in paragraph


def is_report(paragraph: str) -> bool:
    """Whole sentences, not headings, lists, addresses or rules."""
    marks = re.search(r"\+\+|\*\*\*| \* |\.\.\.\.|@|=====|____", paragraph)
    if len(paragraph) < 120 or marks or paragraph[-1] not in '.?!)"' or not paragraph[0].isupper():
        return False
    return sum(c.islower() for c in paragraph) > 0.7 * len(paragraph)


def main() -> None:
    """Evenly spaced excerpts of both texts, as JSON lines."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    alice = (folder / "alice29.txt").read_text(encoding="ascii", errors="replace")
    report = (folder / "lcet10.txt").read_text(encoding="ascii", errors="replace")
    alice = alice[alice.index("Alice was beginning") : alice.rindex("THE END")]
    report = report[report.index("PROCEEDINGS\n", 3000) :]
    lines = []
    for source, text, is_prose in (("alice", alice, is_story), ("workshop", report, is_report)):
        found = excerpts(text, is_prose)
        for i in range(DOCUMENTS_EACH):
            excerpt = found[round(i * (len(found) - 1) / (DOCUMENTS_EACH - 1))].replace("`", "'")
            lines.append(json.dumps({"text": excerpt, "source": source}))
    out.write_text("\n".join(lines) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
