"""Ranges of a decode batch: every tile once, balanced, and a NumPy twin of the kernel's walk."""

from __future__ import annotations

import numpy as np
import pytest
from tests.attention.oracle import draw_levels

from tilewright.attention import planner, ranges
from tilewright.attention.merge import State, merge
from tilewright.attention.ranges import TILE
from tilewright.attention.table import MAX_KEYS, Table
from tilewright.attention.variant import Full, SlidingWindow
from tilewright.toolchain import compilers

LENGTHS = [
    [], [0], [1], [64], [65, 0, 0, 1000], [5] * 40, [0] * 9, [33_000, 1, 64, 0, 700], [1 << 20],
]  # fmt: skip
HEADS = (1, 3, 8, 12, 32)


def walk(cuts: np.ndarray, lengths: list[int], kv_heads: int):
    """The pieces of each range as the kernel walks them: (range, request, group, begin, end, tiles
    of the unit as its keys are now)."""
    groups = kv_heads // ranges.head_block(kv_heads)
    for n in range(len(cuts) - 1):
        unit, tile, last = order(cuts[n], groups), cuts[n]["tile"], cuts[n + 1]
        while unit < order(last, groups) or (unit == order(last, groups) and last["tile"] > 0):
            request, group = divmod(unit, groups)
            tiles = -(-lengths[request] // TILE)
            end = int(last["tile"]) if unit == order(last, groups) else tiles
            yield n, request, group, int(tile), max(end, int(tile)), tiles
            unit, tile = unit + 1, 0


def order(cut, groups: int) -> int:
    return int(cut["node"]) * groups + int(cut["unit"])


def units(lengths, kv_heads: int) -> np.ndarray:
    return np.full(len(lengths), kv_heads // ranges.head_block(kv_heads))


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: str(len(x)) + "_" + str(sum(x)))
@pytest.mark.parametrize("kv_heads", HEADS)
@pytest.mark.parametrize("ctas", [1, 7, 132, 264])
def test_every_tile_is_in_one_range(lengths, kv_heads, ctas):
    if not lengths:
        return
    cuts = ranges.cut(np.array(lengths), kv_heads, ctas)
    assert ranges.is_sound(cuts, units(lengths, kv_heads))
    together = ranges.head_block(kv_heads)
    assert 1 <= len(cuts) - 1 <= max(ctas // together, 1)
    tiles = [-(-n // TILE) for n in lengths]
    seen = {
        (r, g): np.zeros(t, int) for r, t in enumerate(tiles) for g in range(kv_heads // together)
    }
    pieces = {key: [] for key in seen}
    for n, request, group, begin, end, _ in walk(cuts, lengths, kv_heads):
        seen[request, group][begin:end] += 1
        pieces[request, group].append((n, begin))
    assert all((count == 1).all() for count in seen.values())
    for parts in pieces.values():  # those that share a unit name the same first and last range
        assert parts[0][1] == 0
        owners = [n for n, _ in parts]
        assert owners == list(range(owners[0], owners[-1] + 1))
        for n, begin in parts[1:]:
            assert begin > 0 and (cuts[n]["first"], cuts[n]["last"]) == (owners[0], owners[-1])


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("kv_heads", HEADS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_planner_in_cpp_agrees_exactly(rng, monkeypatch, kv_heads, depth):
    """With NumPy: the cuts, and the balance; of requests that share keys, too, and see few of
    them."""
    variant, native = SlidingWindow(window=900) if depth == 3 else Full(), planner.native()
    values = {n: x for n, x in variant.fixed if np.isscalar(x)}
    shape = planner.Shape("decode", kv_heads, 3, variant.traced.mask, values, 5, "", 1)
    assert shape.most_tiles == (16 if depth == 3 else -(-MAX_KEYS // TILE))
    for requests in (0, 1, 9, 40, 700):
        for most in (1, 3, 900, 1 << 20, MAX_KEYS // 4):
            shared = draw_levels(rng, requests, depth)
            count = requests + sum(len(x) - 1 for x in shared)
            keys = rng.integers(0, most, count)
            tree = Table.dense(keys, shared=shared).tree(keys)
            indptr = np.cumsum([0, *rng.integers(0, 6, requests)]).astype(np.int32)
            for workers in (1, 7, 132, 264):
                made = []
                for library in (native, None):
                    monkeypatch.setattr(planner, "native", lambda library=library: library)
                    made.append(planner.cut(indptr, tree, keys, shape, workers))
                np.testing.assert_array_equal(made[0][0], made[1][0])
                assert made[0][2] == pytest.approx(made[1][2], rel=1e-12)
                own = np.append(np.zeros(count - requests, int), np.diff(indptr) > 0)
                exist = own if depth else 1
                assert ranges.is_sound(made[0][0], units(keys, kv_heads) * exist)


def test_ranges_cost_alike():
    lengths = np.random.default_rng(0).integers(1, 9000, 70)
    cuts = ranges.cut(lengths, 8, 264)
    work = np.zeros(len(cuts) - 1)
    for n, _, _, begin, end, _ in walk(cuts, lengths.tolist(), 8):
        work[n] += end - begin + 0.5
    assert work.max() < work.mean() + 1.5


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_growing_lengths_stay_covered(kv_heads):
    planned, now = [100, 0, 700, 64], [900, 65, 701, 3]
    cuts = ranges.cut(np.array(planned), kv_heads, 40)
    seen = [np.zeros(-(-n // TILE), int) for n in now]
    for _, request, group, begin, end, _ in walk(cuts, now, kv_heads):
        if group == 0:
            seen[request][begin:end] += 1
    assert all((count == 1).all() for count in seen)


def test_cuts_from_outside_are_checked():
    cuts, two = ranges.cut(np.array([300, 5000]), 4, 30), np.array([1, 1])
    assert ranges.is_sound(cuts, two) and ranges.is_sound(cuts[:0], two)
    assert not ranges.is_sound(cuts, np.array([1, 1, 1])) and not ranges.is_sound(cuts[:-1], two)
    for name in ("node", "unit", "first", "last"):
        for at in (0, 3, len(cuts) - 1):
            for change in (-1, 1, 1 << 20):
                damaged = cuts.copy()
                damaged[name][at] += change
                assert not ranges.is_sound(damaged, two), (name, at, change)
    for tile in (-1, 1 << 28):
        cuts["tile"][3] = tile
        assert not ranges.is_sound(cuts, two)


@pytest.mark.parametrize("ctas", [1, 5, 64])
def test_partial_states_merge_to_attention(rng, ctas):
    """The kernel's algorithm on NumPy: partial states of the pieces, merged in order of ranges."""
    lengths, kv_heads, group, d = [130, 0, 1, 700, 64], 6, 2, 16
    cuts = ranges.cut(np.array(lengths), kv_heads, ctas)
    together = ranges.head_block(kv_heads)
    q = rng.standard_normal((len(lengths), kv_heads, group, d))
    k = [rng.standard_normal((n, kv_heads, d)) for n in lengths]
    v = [rng.standard_normal((n, kv_heads, d)) for n in lengths]

    def attend(request, head, keys):
        s = q[request, head] @ k[request][keys, head].T
        if not s.size:
            return State(np.zeros((group, d)), np.full(group, -np.inf))
        top = s.max(1)
        weights = np.exp(s - top[:, None])
        total = weights.sum(1)
        return State(weights @ v[request][keys, head] / total[:, None], top + np.log(total))

    parts: dict[tuple[int, int], list[State]] = {}
    for _, request, g, begin, end, _ in walk(cuts, lengths, kv_heads):
        for member in range(together):
            head = g * together + member
            keys = slice(begin * TILE, end * TILE)
            parts.setdefault((request, head), []).append(attend(request, head, keys))
    assert len(parts) == len(lengths) * kv_heads
    for (request, head), states in parts.items():
        whole, got = attend(request, head, slice(None)), merge(states)
        np.testing.assert_allclose(got.o, whole.o, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got.lse, whole.lse, rtol=1e-12)
