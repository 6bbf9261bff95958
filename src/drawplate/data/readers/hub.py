"""A dataset on the Hugging Face hub -> rows.

Data only: a repository's code is never run. Without network the dataset is taken from the cache, or the answer is no
within seconds, where the hub's own client would try for half a minute.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from drawplate.data.readers.table import RowOrProblem
from drawplate.errors import DataError, NeedsNetwork, reason_of
from drawplate.hub_answers import unanswered
from drawplate.recipe import DataSection

PROBE_SECONDS = 3.0
CHOICES = re.compile(r"(?:available configs|Available): \[([^\]]*)\]")
"""What `datasets` says where a configuration is missing, or is not known."""

GATED = "is a gated dataset"
"""What it says of one whose owner lets accounts in one by one; the hub's own answer is no longer in the exception."""


def dataset_rows(section: DataSection) -> Iterator[RowOrProblem]:
    """The rows of the section's dataset, configuration and split, numbered from 1.

    Raises:
        NeedsNetwork: the dataset is not cached on this machine and cannot be fetched.
        DataError: there is no such configuration or split, or its files cannot be read.
    """
    name, split, configuration = str(section.dataset), section.dataset_split, section.dataset_config
    import datasets  # here, because importing it takes a second

    try:
        with _offline_if_unreachable():
            rows = datasets.load_dataset(name, *filter(None, [configuration]), split=split)
    except Exception as error:  # a builder may raise anything for files it cannot read
        raise _refusal(name, split, error) from None
    try:
        yield from enumerate(rows, start=1)
    except (ValueError, OSError) as error:  # bytes that are no UTF-8, files that are gone
        raise _unreadable(name, error) from None


def _refusal(name: str, split: str, error: Exception) -> DataError | NeedsNetwork:
    """No network, a hub that does not answer as it should, no such dataset, or files that cannot be read."""
    fetch = f"python -c \"import datasets; datasets.load_dataset('{name}', split='{split}')\""
    if CHOICES.search(str(error)):
        return _unreadable(name, error)
    if answered := unanswered(f"The dataset {name} is not on this machine and", error, fetch):
        return answered
    if _is_not_found(error) and GATED in str(error):
        return NeedsNetwork(
            f"The dataset {name} is gated: its owner grants access to each account.",
            safe="Nothing was loaded or written.",
            next_step=f"Accept its terms on its page, then run `hf auth login`; then {fetch}",
        )
    if _is_not_found(error) and _hub_answers():
        return DataError(
            f"There is no public dataset {name} on the hub.",
            safe="Nothing was loaded or written.",
            next_step="Check the spelling of data.dataset, or run `hf auth login` if it is private.",
        )
    if isinstance(error, ConnectionError) or _is_not_found(error):
        return NeedsNetwork(
            f"The dataset {name} is not on this machine and could not be fetched: {reason_of(error)}.",
            safe="Nothing was loaded or written.",
            next_step=f"With network: {fetch}",
        )
    return _unreadable(name, error)


def _is_not_found(error: Exception) -> bool:
    from datasets.exceptions import DatasetNotFoundError

    return isinstance(error, DatasetNotFoundError)


def _hub_answers() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _reachable(constants.ENDPOINT)


def _unreadable(name: str, error: Exception) -> DataError:
    choices = CHOICES.search(str(error))
    if choices:
        return DataError(
            f"The dataset {name} has several configurations and data.dataset_config names none of them: {choices[1]}.",
            safe="Nothing was loaded or written.",
            next_step="Set data.dataset_config to one of them.",
        )
    return DataError(
        f"The dataset {name} cannot be read: {reason_of(error)}.",
        safe="Nothing was written.",
        next_step="Check data.dataset, data.dataset_config and data.dataset_split, or download its files and name "
        "them in data.files.",
    )


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """The hub's own offline switch, thrown for a while where its host does not answer (a proxy is trusted to)."""
    import datasets.config
    from huggingface_hub import constants

    if _reachable(constants.ENDPOINT):
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(endpoint)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False
