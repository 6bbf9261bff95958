from __future__ import annotations

import pytest

from bench.peers.ceiling import ceiling, product_parameters
from bench.shapes import SHAPES


def test_parameters_in_products_are_the_published_counts_without_an_untied_embedding() -> None:
    assert product_parameters(SHAPES["3b"]) == pytest.approx(3.21e9, rel=0.01)
    assert product_parameters(SHAPES["8b"]) == pytest.approx(8.03e9 - 128256 * 4096, rel=0.01)


def test_longer_rows_cost_attention() -> None:
    assert ceiling(SHAPES["3b"], 2048, 794e12) == pytest.approx(56_000, rel=0.02)
    assert ceiling(SHAPES["3b"], 512, 794e12) > ceiling(SHAPES["3b"], 2048, 794e12)
