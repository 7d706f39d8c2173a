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
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.variant import Full
from tilewright.errors import ArgumentError, TilewrightError

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
        table = Table.ragged(np.array([0, len(k[part])], np.int32))
        kv = KV(table, Pool(k[part], v[part]))
        return reference.attention(q, kv, indptr, Full())

    merged, whole = over(slice(0, n)).merge(over(slice(n, None))), over(slice(None))
    np.testing.assert_allclose(merged.o, whole.o, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.lse, whole.lse, rtol=1e-9, atol=1e-9)


def test_torch(rng):
    torch = pytest.importorskip("torch")
    a, b = random_state(rng), random_state(rng)
    merged = merge.merge([State(torch.from_numpy(s.o), torch.from_numpy(s.lse)) for s in (a, b)])
    same(State(merged.o.numpy(), merged.lse.numpy()), a.merge(b))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@given(seeds)
def test_o_is_not_read_where_there_are_no_keys(library, seed):
    """A kernel may leave anything in o where lse is −inf."""
    rng = np.random.default_rng(seed)
    a, b, c = (random_state(rng) for _ in range(3))
    wanted, dirty = merge.merge([a, b, c]), []
    for s in (a, b, c):
        none = np.isneginf(s.lse)
        o = s.o.copy()
        o[none] = rng.choice([np.nan, np.inf, -np.inf, 3e38], o[none].shape)
        dirty.append(State(o, s.lse))
    if library == "torch":
        torch = pytest.importorskip("torch")
        dirty = [State(torch.from_numpy(s.o), torch.from_numpy(s.lse)) for s in dirty]
    found = merge.merge(dirty)
    np.testing.assert_allclose(np.asarray(found.o), wanted.o, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(found.lse), wanted.lse, rtol=1e-5)


def code(states):
    with pytest.raises(TilewrightError) as e:
        merge.merge(states)
    return e.value.code


def test_states_of_different_kinds(monkeypatch):
    a = random_state(np.random.default_rng(0))
    assert code([a, State(a.o.astype(np.float64), a.lse)]) == "A102"
    assert code([a, State(a.o, a.lse.astype(np.float64))]) == "A102"
    assert code([State(a.o.astype(np.int32), a.lse)]) == "A102"
    assert code([a, State(a.o[:2], a.lse[:2])]) == "A103"
    assert code([State(a.o, a.lse[..., None])]) == "A103"
    assert code([State(a.o.tolist(), a.lse)]) == "A107"
    assert code([a, State(a.o.tolist(), a.lse.tolist())]) == "A107"
    monkeypatch.setattr(merge, "find_spec", lambda name: None)
    assert code([State(a.o.tolist(), a.lse.tolist())]) == "E101"


def test_numpy_with_torch():
    torch = pytest.importorskip("torch")
    a = random_state(np.random.default_rng(0))
    b = State(torch.from_numpy(a.o), torch.from_numpy(a.lse))
    assert code([a, b]) == code([b, a]) == code([State(a.o, b.lse)]) == "A107"
    assert code([b, State(b.o.double(), b.lse)]) == "A102"
    assert code([State(b.o.long(), b.lse)]) == "A102"
    assert code([b, State(b.o.to("meta"), b.lse.to("meta"))]) == "A105"


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
