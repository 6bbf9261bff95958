"""What a hub answered, in words: too many requests, a fault of its own, or a page that is not the hub's.

The clients wrap the answer in several exceptions, and which HTTP library they use changes with their versions; so the
answer is found by what it has, a status, along the chain of exceptions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from drawplate.errors import NeedsNetwork, reason_of

LOGIN_PAGES = ("x-repo-commit", "does not seem to be served by")
SOON = "Try again in some minutes"


def unanswered(what: str, error: BaseException, fetch: str) -> NeedsNetwork | None:
    """The error for a hub that answered, but not with what was asked for; None where no such answer is in the chain.

    Args:
        what: the model or data set, as a sentence begins.
        error: what the client raised.
        fetch: the command that fetches it.
    """
    for one in _chain(error):
        response = getattr(one, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int) and (status >= 500 or status in (401, 403, 408, 429)):
            return _refused(what, status, response, fetch)
        if isinstance(one, json.JSONDecodeError) or any(words in str(one).lower() for words in LOGIN_PAGES):
            return _error(
                f"{what} could not be fetched: what answered is not the hub, but a page of somebody else's.",
                "Log in to this network with a browser, or check HF_ENDPOINT and the proxy; then",
                fetch,
            )
    return None


def _refused(what: str, status: int, response: Any, fetch: str) -> NeedsNetwork:
    try:
        name = f" ({HTTPStatus(status).phrase})"
    except ValueError:
        name = ""
    said = f"{what} could not be fetched: the hub answered {status}{name}."
    if status in (401, 403):
        return _error(said, "Ask its owner for access or run `hf auth login`; then", fetch)
    wait = str(getattr(response, "headers", {}).get("retry-after") or "")
    when = f"Try again in {wait} seconds" if wait.isdigit() else f"Try again after {wait}" if wait else SOON
    more = "; `hf auth login` raises the limit" if status == HTTPStatus.TOO_MANY_REQUESTS else ""
    return _error(said, f"{when}{more}:", fetch)


def _error(what: str, advice: str, fetch: str) -> NeedsNetwork:
    safe = "Nothing was trained or written; what was fetched so far is kept for the next attempt."
    return NeedsNetwork(what, safe=safe, next_step=f"{advice} {fetch}")


def said_by(error: BaseException) -> str:
    """The reason of the innermost exception, which is the one that knows it."""
    *_, last = _chain(error)
    return f"{type(last).__name__}: {reason_of(last)}" if isinstance(last, Exception) else type(last).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
