"""States merge: in any grouping, with an identity, and as one attention over all keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.attention.cases import queries

from tilewright.attention import merge, reference
from tilewright.attention.kv import KV
from tilewright.attention.merge import State
from tilewright.attention.variant import Full
from tilewright.errors import ArgumentError

seeds = st.integers(0, 2**32)


def random_state(rng):
    o = rng.standard_normal((4, 3, 5)).astype(np.float32)
    lse = rng.uniform(-60, 60, (4, 3)).astype(np.float32)
    none = rng.random((4, 3)) < 0.2
    o[none], lse[none] = 0, -np.inf
    return State(o, lse)


def same(a, b):
    np.testing.assert_allclose(a.o, b.o, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a.lse, b.lse, rtol=1e-5, atol=1e-5)


@given(seeds)
def test_associative_and_commutative(seed):
    rng = np.random.default_rng(seed)
    a, b, c = (random_state(rng) for _ in range(3))
    whole = merge.merge([a, b, c])
    same(a.merge(b).merge(c), whole)
    same(a.merge(b.merge(c)), whole)
    same(c.merge(a, b), whole)
    assert whole.o.dtype == whole.lse.dtype == np.float32


@given(seeds)
def test_identity(seed):
    a = random_state(np.random.default_rng(seed))
    nothing = merge.empty(4, 3, 5)
    for merged in (a.merge(nothing), nothing.merge(a), merge.merge([a])):
        np.testing.assert_array_equal(merged.o, a.o)
        np.testing.assert_array_equal(merged.lse, a.lse)
    assert np.isneginf(nothing.merge(nothing).lse).all()


@given(seeds, st.integers(0, 30), st.integers(0, 30))
def test_keys_in_two_parts(seed, n, m):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, n + m, 2, 16))
    k, v = k.astype(np.float32), v.astype(np.float32)
    q, indptr = queries(rng, [3], 4, 16)

    def over(part):
        kv = KV.ragged(k[part], v[part], np.array([0, len(k[part])], np.int32))
        return reference.attention(q, kv, indptr, Full())

    merged, whole = over(slice(0, n)).merge(over(slice(n, None))), over(slice(None))
    np.testing.assert_allclose(merged.o, whole.o, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.lse, whole.lse, rtol=1e-9, atol=1e-9)


def test_torch(rng):
    torch = pytest.importorskip("torch")
    a, b = random_state(rng), random_state(rng)
    merged = merge.merge([State(torch.from_numpy(s.o), torch.from_numpy(s.lse)) for s in (a, b)])
    same(State(merged.o.numpy(), merged.lse.numpy()), a.merge(b))


def test_errors():
    with pytest.raises(ArgumentError) as e:
        merge.merge([])
    assert e.value.code == "A101"
    with pytest.raises(ArgumentError) as e:
        merge.empty(1, 2, 3).merge(merge.empty(1, 2, 4))
    assert e.value.code == "A103"
    no_states: list[Any] = [None, 5, [merge.empty(1, 2, 3)], "xy"]
    for others in no_states:
        with pytest.raises(ArgumentError) as e:
            merge.empty(1, 2, 3).merge(others)
        assert e.value.code == "A107"
    for states in (None, 5, "xy", [None]):
        with pytest.raises(ArgumentError) as e:
            merge.merge(states)  # pyright: ignore[reportArgumentType]
        assert e.value.code == "A107"
