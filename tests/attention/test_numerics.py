"""What kernels and the reference owe at the edges: integer division, NaN, long contexts, repeatable
bits. Every wanted value is computed here, in float64 NumPy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from tests.attention import oracle_hooks
from tests.attention.cases import TYPES, arrays_of, bind, csr, paged, queries

import tilewright as tw
from tilewright import knobs
from tilewright.attention import reference
from tilewright.attention.kv import MAX_KEYS
from tilewright.codegen import prelude_files
from tilewright.toolchain import compilers, cxx

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")

# ---------------------------------------------------------------------------- integer division


def test_division_of_vectors_is_that_of_numpy():
    """vfloor_div and vfloor_mod of the prelude: pairs of hostile numbers, six integer types."""
    kinds = {"int8": 8, "int16": 16, "int32": 32, "int64": 64, "uint32": 32, "uint64": 64}
    source = prelude_files.prelude("cpu.h") + "".join(
        f"""
extern "C" __attribute__((visibility("default")))
void divide_{kind}(int n, const {kind}_t* a, const {kind}_t* b, {kind}_t* q, {kind}_t* r) {{
  for (int i = 0; i < n; i += 8) {{
    auto x = tw::load<{kind}_t, 8>(a + i), y = tw::load<{kind}_t, 8>(b + i);
    tw::store<{kind}_t, 8>(q + i, tw::vfloor_div<{kind}_t, 8>(x, y));
    tw::store<{kind}_t, 8>(r + i, tw::vfloor_mod<{kind}_t, 8>(x, y));
  }}
}}"""
        for kind in kinds
    )
    library = cxx.load(cxx.compile_cpp(source))
    for kind in kinds:
        limits = np.iinfo(kind)
        small = [x for x in range(-9, 10) if x >= limits.min]
        numbers = [limits.min, limits.min + 1, limits.max - 1, limits.max, *small]
        a, b = (np.ravel(x) for x in np.meshgrid(*[np.array(numbers, kind)] * 2))
        a, b = (np.append(x, np.zeros(-len(x) % 8, kind)) for x in (a, b))
        q, r = np.empty_like(a), np.empty_like(a)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (a, b, q, r)]
        getattr(library, f"divide_{kind}")(len(a), *pointers)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(q, np.floor_divide(a, b), kind)
            np.testing.assert_array_equal(r, np.remainder(a, b), kind)


@tw.variant
class Divided:
    """Scores are the results of divisions: by a scalar, by a value of the head, of a scalar."""

    by = tw.scalar("int32")
    of = tw.per_head("int32")

    def logits(self, s, at):
        quotients = (at.kv - at.qo) // self.by + self.of[at.qo_head] // self.by
        return s * 0.0 + quotients % 7 + (at.kv % self.by) % 5 + (self.by // at.kv) % 3


@pytest.mark.parametrize("by", oracle_hooks.HOSTILE)
@pytest.mark.parametrize("qo_len", [1, 5])
def test_divisors_of_any_value(rng, by, qo_len):
    """0 gives 0, the least number by −1 is itself: on the CPU and in the reference."""
    kv = paged(rng, [150], (16, 2, 16))
    for pages in arrays_of(kv)[:2]:
        pages[...] = np.nan_to_num(pages)
    q, indptr = queries(rng, [qo_len], 4, 16)
    of = np.array([-(2**31), 2**31 - 1, 0, -1], np.int32)
    attn = tw.Attention(4, 2, 16, Divided(by=by))

    def quotient(a, b):
        a, b = np.broadcast_arrays(np.asarray(a, np.int64), np.asarray(b, np.int64))
        found = np.where(b == 0, 0, a // np.where(b == 0, 1, b))
        return np.where(found == 2**31, -(2**31), found)  # as int32 wraps around

    def left(a, b):
        return np.where(np.equal(b, 0), 0, np.asarray(a, np.int64) - quotient(a, b) * b)

    qo, key = np.arange(150 - qo_len, 150)[:, None], np.arange(150)[None]
    values = reference.gather(kv, 0)[1]
    wanted = np.empty((qo_len, 4, 16))
    for head in range(4):
        total = quotient(key - qo, by) + quotient(of[head], by)
        total = (total + 2**31) % 2**32 - 2**31
        scores = left(total, 7) + left(left(key, by), 5) + left(quotient(by, key), 3)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        wanted[:, head] = weights / weights.sum(1, keepdims=True) @ values[:, head // 2]
    state = attn.run(q, kv, attn.plan(indptr, kv), of=of)
    np.testing.assert_allclose(state.o, wanted, rtol=2e-6, atol=2e-6)
    found = reference.attention(q, kv, indptr, attn.variant, of=of)
    np.testing.assert_allclose(found.o, wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- NaN


@tw.variant
class Own:
    """Query head h sees the keys k with k % 4 == h % 4 only: rows of one token differ."""

    def mask(self, at):
        return tw.equal(at.kv % 4, at.qo_head % 4) & (at.kv <= at.qo)


@pytest.mark.parametrize(
    ("variant", "group", "dtype"),
    [
        (tw.Causal(), 1, "float32"),
        (tw.Causal(), 12, "bfloat16"),
        (tw.SlidingWindow(window=9), 7, "float16"),
        (Own(), 4, "float16"),
        (Own(), 12, "float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("qo_len", [1, 2, 40])
def test_bad_values_reach_those_who_see_them(rng, variant, group, dtype, qo_len):
    """NaN and Inf in V of single keys, everywhere in the tiles: exact for each row."""
    kv = paged(rng, [150], (16, 2, 24), TYPES[dtype])
    q, indptr = queries(rng, [qo_len], 2 * group, 24)
    keys, values = (x.copy() for x in reference.gather(kv, 0))
    bad = {7: np.nan, 64: np.inf, 127: -np.inf, 139: np.nan, 144: np.inf, 147: np.nan}
    names = arrays_of(kv)[4]
    for key, what in bad.items():
        arrays_of(kv)[1][names[key // 16], key % 16, :, key % 24] = what
        values[key, :, key % 24] = what
    qo, key = np.arange(150 - qo_len, 150)[:, None], np.arange(150)[None]
    wanted = np.empty((qo_len, 2 * group, 24))
    for head in range(2 * group):
        seen = key <= qo
        if variant == tw.SlidingWindow(9):
            seen = seen & (key > qo - 9)
        elif variant == Own():
            seen = seen & (key % 4 == head % 4)
        scores = q[:, head].astype(np.float64) @ keys[:, head // group].T / np.sqrt(24)
        weights = np.where(seen, np.exp(scores), 0)
        weights /= weights.sum(1, keepdims=True)
        for row in range(qo_len):
            mine = seen[row]
            wanted[row, head] = weights[row, mine] @ values[mine, head // group]
    attn = tw.Attention(2 * group, 2, 24, variant)
    state = attn.run(q, kv, attn.plan(indptr, kv))
    assert np.isfinite(wanted).any() and np.isfinite(state.lse).all()
    np.testing.assert_allclose(state.o, wanted, rtol=5e-6, atol=5e-6)
    found = reference.attention(q, kv, indptr, variant)
    np.testing.assert_allclose(found.o, wanted, rtol=1e-9, atol=1e-9)


def test_a_freed_page_does_not_matter(rng):
    """A window cache whose freed pages are page 0, never written."""
    kv = paged(rng, [100], (16, 1, 16))
    attn = tw.Attention(3, 1, 16, tw.SlidingWindow(window=20))
    q, indptr = queries(rng, [2], 3, 16)
    wanted = attn.run(q, kv, attn.plan(indptr, kv))
    names = arrays_of(kv)[4]
    null = np.setdiff1d(np.arange(len(arrays_of(kv)[0])), names)[0]
    for array in arrays_of(kv)[:2]:
        assert np.isnan(array[null]).all()
    names[:4] = null
    found = attn.run(q, kv, attn.plan(indptr, kv))
    np.testing.assert_array_equal(found.o, wanted.o)
    np.testing.assert_array_equal(found.lse, wanted.lse)


# ---------------------------------------------------------------------------- long contexts


@pytest.mark.parametrize(
    ("requests", "keys", "qo_len", "heads", "most"),
    [(16, 131072, 1, 1, 2e-5), (1, 131072, 3, 12, 2e-5), (2, 1 << 20, 1, 4, 2e-5)],
)
def test_the_mean_of_many_equal_values(requests, keys, qo_len, heads, most):
    """q = 0: o is the mean of V, and V is 0.1 throughout; one page, named again and again."""
    page = np.full((1, 64, 1, 16), 0.1, np.float32)
    indptr = np.arange(requests + 1, dtype=np.int32) * (keys // 64)
    names = np.zeros(indptr[-1], np.int32)
    kv = csr(page, page, indptr, names, np.full(requests, keys, np.int32))
    attn = tw.Attention(heads, 1, 16)
    q = np.zeros((requests * qo_len, heads, 16), np.float32)
    state = attn.run(q, kv, attn.plan(np.arange(requests + 1) * qo_len, kv))
    assert np.abs(state.o / np.float64(np.float32(0.1)) - 1).max() < most
    seen = keys - qo_len + 1 + np.arange(qo_len)
    np.testing.assert_allclose(state.lse[:qo_len, 0], np.log(seen), rtol=1e-5)


def long_cache(length):
    """One page of 65536 keys, named as often as the length needs."""
    k = np.zeros((1, 65536, 1, 8), np.float32)
    v = np.arange(65536, dtype=np.float32)[None, :, None, None] + np.zeros(8, np.float32)
    pages = -(-length // 65536)
    kv_len = np.array([length], np.int64)
    return csr(k, v, np.array([0, pages], np.int32), np.zeros(pages, np.int32), kv_len)


@pytest.mark.parametrize("length", [MAX_KEYS, MAX_KEYS - 1, MAX_KEYS - 63, 2**31 - 65536])
def test_lengths_near_the_end_of_int32(length):
    """The last 100 keys are seen; a plan holds no lengths, so that one of a short cache will do."""
    attn = tw.Attention(2, 1, 8, tw.SlidingWindow(window=100))
    plan = attn.plan([0, 1], long_cache(5))
    state = attn.run(np.zeros((1, 2, 8), np.float32), long_cache(length), plan)
    seen = np.arange(length - 100, length) % 65536
    np.testing.assert_allclose(state.o, np.full((1, 2, 8), seen.mean()), rtol=1e-6)
    np.testing.assert_allclose(state.lse, np.log(100), rtol=1e-6)


@pytest.mark.parametrize("length", [MAX_KEYS + 1, 2**31 - 1, 2**31, 2**32 + 5])
def test_longer_lengths_are_refused(length):
    with pytest.raises(tw.errors.ArgumentError, match=f"A109.*{length}.*{MAX_KEYS}"):
        long_cache(length)


# ---------------------------------------------------------------------------- repeatable bits


def bits(state: Any, rows: slice = slice(None)) -> tuple[bytes, bytes]:
    return state.o[rows].tobytes(), state.lse[rows].tobytes()


@pytest.mark.parametrize("qo_len", [1, 9, 60])
def test_bits_depend_on_the_request_alone(rng, qo_len):
    """Not on workers, on threads, on the other requests, nor on the place in the batch."""
    lengths = [2900, 700, 1, 0, 1300]
    qo_lengths = [qo_len, 1, 3, 2, qo_len]
    kv = paged(rng, lengths, (16, 2, 32))
    q, indptr = queries(rng, qo_lengths, 6, 32)
    attn = tw.Attention(6, 2, 32)
    together = attn.run(q, kv, attn.plan(indptr, kv))
    assert attn.plan(indptr, kv).items["chunks"].max() > 1
    for workers in (1, 2, 7, 32, 300):
        assert bits(attn.run(q, kv, attn.plan(indptr, kv, workers=workers))) == bits(together)
    with knobs.scope(threads=1):
        assert bits(attn.run(q, kv, attn.plan(indptr, kv))) == bits(together)
    k, v, kv_len, kv_indptr, names = arrays_of(kv)
    for r in range(len(lengths)):
        pages = names[kv_indptr[r] : kv_indptr[r + 1]]
        few = np.array([0, len(pages)], np.int32)
        alone = csr(k, v, few, pages, kv_len[r : r + 1])
        rows = slice(indptr[r], indptr[r + 1])
        state = attn.run(q[rows].copy(), alone, attn.plan([0, qo_lengths[r]], alone))
        assert bits(state) == bits(together, rows)


def test_a_bound_step_has_the_bits_of_a_planned_run(rng):
    """It is cut for what the pages can hold, and runs as if it were cut for the length."""
    attn = tw.Attention(6, 2, 32)
    k, v = rng.standard_normal((2, 1, 9000, 2, 32)).astype(np.float32)
    last = np.zeros(1, np.int32)
    kv = csr(k, v, np.array([0, 1], np.int32), np.zeros(1, np.int32), last)
    q, _ = queries(rng, [1], 6, 32)
    bound = bind(attn, q, kv)
    for length in (3, 500, 1024, 2100, 7000, 9000):
        last[0] = length
        assert bits(bound()) == bits(attn.run(q, kv, attn.plan([0, 1], kv)))


def test_more_queries_than_keys(rng):
    """The first queries of a causal request see nothing: o = 0, lse = −inf."""
    kv = paged(rng, [3], (4, 1, 8))
    q, indptr = queries(rng, [5], 2, 8)
    attn = tw.Attention(2, 1, 8)
    for state in (
        attn.run(q, kv, attn.plan(indptr, kv)),
        reference.attention(q, kv, indptr, tw.Causal()),
    ):
        assert (state.o[:2] == 0).all() and np.isneginf(state.lse[:2]).all()
        first = reference.gather(kv, 0)[1][0, 0]  # the third query sees the first key only
        np.testing.assert_allclose(state.o[2], [first, first], rtol=1e-6)
        assert np.isfinite(state.lse[2:]).all()
