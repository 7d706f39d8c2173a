"""Positions, pages and slots of a decode step against plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.ops.paging import positions_kernel


@pytest.mark.parametrize("requests", [0, 1, 3, 17])
@pytest.mark.parametrize("page_size", [1, 16, 24])
def test_positions(rng, requests: int, page_size: int):
    """Lengths at and around the borders of pages too."""
    width = 7
    lengths = rng.integers(0, width * page_size, requests).astype(np.int32)
    borders = [0, page_size - 1, page_size, width * page_size - 1]
    lengths[:4] = borders[:requests]
    table = rng.integers(0, 99, (requests, width)).astype(np.int32)
    kernel, before = positions_kernel(page_size), lengths.tolist()
    shared = rng.integers(0, page_size * 3, requests).astype(np.int32)
    position, page, slot, own, longer = kernel(lengths, table, shared)
    assert position.tolist() == before
    assert page.tolist() == [int(table[r, n // page_size]) for r, n in enumerate(before)]
    assert slot.tolist() == [n % page_size for n in before]
    assert longer is lengths and lengths.tolist() == [n + 1 for n in before]
    assert own.tolist() == [n + 1 - b for n, b in zip(before, shared.tolist(), strict=True)]


def test_rows_that_fill_up_and_a_length_beyond_the_table():
    lengths, table = np.array([-1, 32], np.int32), np.full((2, 2), 5, np.int32)
    position, page, _, own, longer = positions_kernel(16)(lengths, table, np.zeros(2, np.int32))
    assert position.tolist() == [0, 32] and page.tolist() == [-1, 0]
    assert longer.tolist() == [-1, 33] and own.tolist() == [0, 33]
