"""HTML -> the text a reader sees.

The main text of an ordinary page is found by trafilatura, which leaves menus and footers out. Where that cannot serve
(the page is to be split at its own headings, is too large, or has no main text to find) all visible text is taken, a
line for each block element. That second way reads the parser's events without building a tree, so it is linear in the
file's size and has no depth at which text is silently lost: libxml2's trees stop at 256 levels (2,048 with huge_tree)
and drop what is deeper. Nothing outside the file is fetched, and scripts are neither run nor read.
"""

from __future__ import annotations

import contextlib

from lxml import etree

from drawplate.units import MIB

MAIN_TEXT_MAX_BYTES = 8 * MIB  # trafilatura takes about a second per MiB
MAIN_TEXT_MIN_SHARE = 0.02  # of all visible text; less means that the main text was missed
BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details", "dialog", "div",
    "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header",
    "hr", "li", "main", "nav", "ol", "option", "p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead",
    "title", "tr", "ul",
))  # fmt: skip
CELLS = frozenset(("td", "th"))
UNSEEN = frozenset(("annotation", "head", "noscript", "script", "style", "svg", "template"))


def html_to_text(html: str, *, whole: bool) -> tuple[str, str]:
    """A page's text, and a remark on how it was found (empty for the usual way).

    Args:
        html: the decoded page.
        whole: take all visible text, so that no heading is lost.
    """
    visible = visible_text(html)
    if whole:
        return visible, ""
    if len(html) > MAIN_TEXT_MAX_BYTES:
        return visible, "all visible text was taken: the page is too large for its main text to be looked for"
    main = _main_text(html)
    if len(main) < MAIN_TEXT_MIN_SHARE * len(visible):
        return visible, "all visible text was taken: no main text was found"
    return main, ""


def visible_text(html: str) -> str:
    """All text outside scripts, styles and the head, a line for each block element, spaces collapsed."""
    collector = _Collector()
    parser = etree.HTMLParser(target=collector, encoding="utf-8", huge_tree=True, no_network=True)
    # where libxml2 gives up at a broken place, what came before it has been collected, and 0 characters is refused
    with contextlib.suppress(etree.LxmlError):
        etree.fromstring(html.encode("utf-8", "replace"), parser)
    return collector.text()


def _main_text(html: str) -> str:
    import trafilatura  # here, because importing it takes half a second

    try:
        return trafilatura.extract(html, include_comments=False) or ""
    except (ValueError, RecursionError, etree.LxmlError):
        return ""


class _Collector:
    """Receives the parser's events; keeps pieces of text and the line breaks between blocks."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._unseen = 0
        self._preformatted = 0

    def start(self, tag: str, attributes: object) -> None:
        self._unseen += tag in UNSEEN
        self._preformatted += tag == "pre"
        self._break(tag)

    def end(self, tag: str) -> None:
        self._break(tag)
        self._preformatted -= tag == "pre"
        self._unseen -= tag in UNSEEN

    def data(self, text: str) -> None:
        if self._unseen:
            return
        self._pieces.append(text if self._preformatted else _collapse(text))

    def comment(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass

    def _break(self, tag: str) -> None:
        if tag in BLOCKS:
            self._pieces.append("\n")
        elif tag in CELLS:
            self._pieces.append(" ")

    def text(self) -> str:
        lines = "".join(self._pieces).split("\n")
        return "\n".join(" ".join(line.split()) for line in lines if line.strip())


def _collapse(text: str) -> str:
    words = " ".join(text.split())
    if not words:
        return " " if text else ""
    return (" " if text[0].isspace() else "") + words + (" " if text[-1].isspace() else "")
