"""A dataset on the Hugging Face hub -> rows.

Data only: a repository's code is never run. Without network the dataset is taken from the cache, or the answer is no
within seconds, where the hub's own client would try for half a minute.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from drawplate.data.formats import RowOrProblem
from drawplate.errors import DataError, NeedsNetwork, reason_of

PROBE_SECONDS = 3.0


def dataset_rows(name: str, split: str) -> Iterator[RowOrProblem]:
    """The rows of one split, numbered from 1.

    Raises:
        NeedsNetwork: the dataset is not cached on this machine and cannot be fetched.
        DataError: there is no such split, or its files cannot be read.
    """
    import datasets  # here, because importing it takes a second
    from datasets.exceptions import DatasetNotFoundError

    try:
        with _offline_if_unreachable():
            rows = datasets.load_dataset(name, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise NeedsNetwork(
            f"The dataset {name} is not on this machine and could not be fetched: {reason_of(error)}.",
            safe="Nothing was loaded or written.",
            next_step=f"With network: python -c \"import datasets; datasets.load_dataset('{name}', split='{split}')\"",
        ) from None
    except Exception as error:  # a builder may raise anything for files it cannot read
        raise DataError(
            f"The dataset {name} cannot be read: {reason_of(error)}.",
            safe="Nothing was written.",
            next_step="Check data.dataset and data.dataset_split, or download its files and name them in data.files.",
        ) from None
    yield from enumerate(rows, start=1)


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
