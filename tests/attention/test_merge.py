"""States merge: in any grouping, with an identity, and as one attention over all keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.attention.cases import TYPES, queries

from tilewright import dtypes
from tilewright.attention import merge, reference
from tilewright.attention.kv import KV
from tilewright.attention.merge import State
from tilewright.attention.pool import Pool
from tilewright.attention.spec import alone, compile_cuda
from tilewright.attention.table import Table
from tilewright.attention.variant import Full
from tilewright.errors import ArgumentError, TilewrightError
from tilewright.toolchain import nvrtc

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
    nothing = State.empty(4, 3, 5)
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


def test_states_of_different_kinds():
    a = random_state(np.random.default_rng(0))
    assert code([a, State(a.o.astype(np.float64), a.lse)]) == "A102"
    assert code([a, State(a.o, a.lse.astype(np.float64))]) == "A102"
    assert code([State(a.o.astype(np.int32), a.lse)]) == "A102"
    assert code([a, State(a.o[:2], a.lse[:2])]) == "A103"
    assert code([State(a.o, a.lse[..., None])]) == "A103"
    assert code([State(a.o.tolist(), a.lse)]) == "A107"
    assert code([a, State(a.o.tolist(), a.lse.tolist())]) == "A107"
    assert code([State(np.repeat(a.o, 2, 2)[..., ::2], a.lse)]) == "A104"


def test_masked_and_in_place(rng):
    a, b, c = (random_state(rng) for _ in range(3))
    mask = np.array([True, False, True, False])
    wanted = merge.merge([a, b, c])
    merged = merge.merge([a, b, c], mask=mask)
    for x, y, first in ((merged.o, wanted.o, a.o), (merged.lse, wanted.lse, a.lse)):
        np.testing.assert_array_equal(x[mask], y[mask])
        np.testing.assert_allclose(x[~mask], first[~mask], rtol=1e-6)
    rows = [State(s.o.reshape(12, 5), s.lse.reshape(12)) for s in (a, b, c)]  # two dimensions
    flat = merge.merge(rows, mask=np.repeat(mask, 3))
    np.testing.assert_array_equal(flat.o, merged.o.reshape(12, 5))
    frozen = State(np.empty_like(a.o), np.empty_like(a.lse))
    frozen.o.flags.writeable = False
    with pytest.raises(ArgumentError, match="A105"):
        merge.merge([a, b], out=frozen)
    again = merge.merge([a, b, c], out=b)
    assert again is b
    same(b, wanted)
    for wrong, reason in ((mask[:3], "A103"), (mask.astype(np.int32), "A102"), ([True], "A107")):
        with pytest.raises(ArgumentError, match=reason):
            merge.merge([a, c], mask=wrong)
    with pytest.raises(ArgumentError, match="A107"):
        merge.merge([a, c], out=a.o)
    with pytest.raises(ArgumentError, match="A103"):
        merge.merge([a, c], out=State.empty(4, 3, 6))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bits_are_summed_in_float32(rng, name):
    states = [random_state(rng) for _ in range(3)]
    narrow = [State(s.o.astype(TYPES[name]), s.lse) for s in states]
    exact = merge.merge([State(s.o.astype(np.float32), s.lse) for s in narrow])
    merged = merge.merge(narrow)
    assert merged.o.dtype == TYPES[name]
    np.testing.assert_array_equal(merged.o, exact.o.astype(TYPES[name]))
    torch = pytest.importorskip("torch")
    tensors = [
        State(
            torch.from_numpy(s.o.astype(np.float32)).to(getattr(torch, name)),
            torch.from_numpy(s.lse),
        )
        for s in narrow
    ]
    np.testing.assert_allclose(
        merge.merge(tensors).o.float().numpy(), exact.o, rtol=8e-3, atol=1e-5
    )


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("name", TYPES)
def test_cubin_without_spills(arch, name):
    text = alone(merge.body(dtypes.ALL[name], 80), "merge_states")
    used = compile_cuda(text, arch).resources["merge_states"]
    assert used.spill_bytes == 0 and used.registers <= 128


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("count", [1, 2, 8, 9, 20])
def test_on_a_gpu(rng, name, count):
    from tilewright.runtime.cuda import DeviceArray

    def there(s):
        bits = s.o.view(np.uint16) if name == "bfloat16" else s.o
        return State(DeviceArray.from_numpy(bits, name), DeviceArray.from_numpy(s.lse))

    states = []
    for _ in range(count):
        s = random_state(rng)
        s.o[np.isneginf(s.lse)] = np.nan
        states.append(State(s.o.astype(TYPES[name]), s.lse))
    mask = np.array([True, False, True, True])
    for m in (None, mask):
        wanted = merge.merge(states, mask=m)
        on_card = None if m is None else DeviceArray.from_numpy(m)
        for out in (None, 0):
            cards = [there(s) for s in states]
            merged = merge.merge(cards, mask=on_card, out=None if out is None else cards[out])
            o = reference.as_float64(merged.o)
            tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[name]
            np.testing.assert_allclose(
                o, wanted.o.astype(np.float64), rtol=tolerance, atol=tolerance
            )
            np.testing.assert_allclose(merged.lse.to_numpy(), wanted.lse, rtol=1e-5, atol=1e-5)
    empty = State.empty(4, 3, 5, dtype=name, like=cards[0].lse)
    assert np.isneginf(empty.lse.to_numpy()).all()


def test_numpy_with_torch():
    torch = pytest.importorskip("torch")
    a = random_state(np.random.default_rng(0))
    b = State(torch.from_numpy(a.o), torch.from_numpy(a.lse))
    assert code([a, b]) == code([b, a]) == code([State(a.o, b.lse)]) == "A107"
    assert code([b, State(b.o.double(), b.lse)]) == "A102"
    assert code([State(b.o.long(), b.lse)]) == "A102"
    assert code([b, State(b.o.to("meta"), b.lse.to("meta"))]) == "A107"  # it has no memory


def test_weights_beyond_all_numbers_are_no_warning():
    """An lse of inf or NaN, as a kernel may leave where scores were, or too far below another."""
    a, b, c, d = (State(np.full((1, 1, 4), n, np.float32), np.full((1, 1), x, np.float32))
                  for n, x in enumerate((np.inf, 0, 3e38, -3e38)))  # fmt: skip
    assert np.isnan(a.merge(b).o).all() and (d.merge(c).o == 2).all()
    assert "float" in repr(State(1.0, None)) or repr(State(1.0, [2.0])) == "State(o (), lse (1,))"


def test_an_output_between_two_states_is_refused():
    o, lse = np.ones((6, 2, 4), np.float32), np.zeros((6, 2), np.float32)
    states = [State(o[n : n + 3], lse[n : n + 3]) for n in (0, 3)]
    with pytest.raises(ArgumentError, match="A108"):
        merge.merge([states[0]], out=State(o[1:4], np.zeros((3, 2), np.float32)))
    merge.merge(states, out=states[0])


def test_errors():
    with pytest.raises(ArgumentError) as e:
        merge.merge([])
    assert e.value.code == "A101"
    with pytest.raises(ArgumentError) as e:
        State.empty(1, 2, 3).merge(State.empty(1, 2, 4))
    assert e.value.code == "A103"
    no_states: list[Any] = [None, 5, [State.empty(1, 2, 3)], "xy"]
    for others in no_states:
        with pytest.raises(ArgumentError) as e:
            State.empty(1, 2, 3).merge(others)
        assert e.value.code == "A107"
    for states in (None, 5, "xy", [None], State.empty(1, 2, 3)):
        with pytest.raises(ArgumentError) as e:
            merge.merge(states)  # pyright: ignore[reportArgumentType]
        assert e.value.code == "A107"


@pytest.mark.parametrize(
    ("code", "sizes", "more"),
    [
        ("A103", (-1, 2, 3), {}), ("A103", (1, 2.5, 3), {}), ("A103", (1, 2, True), {}),
        ("A102", (1, 2, 3), {"dtype": "int32"}), ("A102", (1, 2, 3), {"dtype": "nope"}),
        ("A107", (1, 2, 3), {"like": 7}),
    ],
)  # fmt: skip
def test_empty_states_are_checked(code, sizes, more):
    with pytest.raises(ArgumentError, match=code):
        State.empty(*sizes, **more)
