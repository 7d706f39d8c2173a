"""Positions, pages and slots of a decode step against plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.ops.rope import lengthen_kernel, positions_kernel


@pytest.mark.parametrize("requests", [0, 1, 3, 17])
@pytest.mark.parametrize("page_size", [1, 16, 24])
def test_positions(rng, requests: int, page_size: int):
    """Lengths at and around the borders of pages too."""
    width = 7
    lengths = rng.integers(1, width * page_size + 1, requests).astype(np.int32)
    borders = [1, page_size, page_size + (page_size * width > page_size), width * page_size]
    lengths[:4] = borders[:requests]
    table = rng.integers(0, 99, (requests, width)).astype(np.int32)
    kernel, before = positions_kernel(page_size), lengths.copy()
    position, page, slot = kernel(lengths, table)
    last = [int(n) - 1 for n in before]
    assert position.tolist() == last and lengths.tolist() == before.tolist()
    assert page.tolist() == [int(table[r, n // page_size]) for r, n in enumerate(last)]
    assert slot.tolist() == [n % page_size for n in last]
    assert lengthen_kernel()(lengths) is lengths
    assert lengths.tolist() == [n + 2 for n in last]


def test_a_length_beyond_the_table_reads_nothing():
    lengths, table = np.array([0, 33], np.int32), np.full((2, 2), 5, np.int32)
    position, page, _ = positions_kernel(16)(lengths, table)
    assert position.tolist() == [-1, 32] and page.tolist() == [0, 0]
