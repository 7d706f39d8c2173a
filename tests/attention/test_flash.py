"""The C++ flash kernel against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.cases import (
    ALL_VARIANTS,
    TYPES,
    SoftcapAlibi,
    arrays_of,
    bind,
    csr,
    paged,
    queries,
    values_of,
)

from tilewright import knobs
from tilewright.attention import reference
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.variant import Causal, SlidingWindow
from tilewright.errors import ArgumentError
from tilewright.runtime import pool
from tilewright.runtime.step import Step
from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


def check(attn, q, kv, indptr, tolerance=3e-6, **values):
    """Run into poisoned memory; compare o and lse with the reference."""
    out = np.full(q.shape, np.nan, np.float32)
    plan = attn.plan(indptr, kv)
    state = attn.run(q, kv, plan, out=out, **values)
    assert state.o is out
    wanted = reference.attention(q, kv, indptr, attn.variant, sm_scale=attn.sm_scale, **values)
    np.testing.assert_allclose(state.o, wanted.o, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(state.lse, wanted.lse, rtol=tolerance, atol=tolerance)
    return state


QO, KV_LENGTHS = [3, 1, 0, 40, 1, 1, 2], [70, 1, 5, 40, 300, 0, 0]


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_every_variant(rng, name):
    variant = ALL_VARIANTS[name]
    attn = Attention(6, 2, 64, variant)
    kv = paged(rng, KV_LENGTHS, (16, 2, 64))
    q, indptr = queries(rng, QO, 6, 64)
    check(attn, q, kv, indptr, **values_of(rng, variant, 6, 2))


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_page_sizes(rng, page_size):
    kv = paged(rng, KV_LENGTHS, (page_size, 2, 64))
    q, indptr = queries(rng, QO, 6, 64)
    check(Attention(6, 2, 64), q, kv, indptr)


@pytest.mark.parametrize("group", [1, 4, 8, 12])
def test_groups(rng, group):
    kv = paged(rng, KV_LENGTHS, (16, 2, 64))
    q, indptr = queries(rng, QO, 2 * group, 64)
    check(Attention(2 * group, 2, 64), q, kv, indptr)


@pytest.mark.parametrize(("head_dim", "group"), [(80, 3), (128, 4), (5, 2), (256, 2)])
def test_head_dims(rng, head_dim, group):
    kv = paged(rng, KV_LENGTHS, (5, 2, head_dim))
    q, indptr = queries(rng, QO, 2 * group, head_dim)
    check(Attention(2 * group, 2, head_dim), q, kv, indptr)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("q_dtype", ["float32", "same"])
def test_narrow_types(rng, dtype, q_dtype):
    kv = paged(rng, KV_LENGTHS, (16, 2, 80), TYPES[dtype])
    q, indptr = queries(rng, QO, 6, 80, TYPES[dtype] if q_dtype == "same" else np.float32)
    check(Attention(6, 2, 80), q, kv, indptr)


@pytest.mark.parametrize("isa", ["avx512", "avx512bf16"])
@pytest.mark.parametrize("head_dim", [16, 72, 128])
def test_products_of_bfloat16(rng, isa, head_dim):
    """Pairs of bfloat16 where the CPU multiplies them, floats elsewhere; NaN in unused slots."""
    if not compilers.runnable(isa):
        pytest.skip(f"this CPU has no {isa}")
    with knobs.scope(isa=isa):
        kv = paged(rng, KV_LENGTHS, (16, 2, head_dim), TYPES["bfloat16"])
        q, indptr = queries(rng, QO, 6, head_dim, TYPES["bfloat16"])
        attn = Attention(6, 2, head_dim)
        state = check(attn, q, kv, indptr)
        if head_dim > 16:  # results in bfloat16; 72 has a part of a vector
            state = attn.run(q, kv, attn.plan(indptr, kv))
            assert state.o.dtype.name == "bfloat16"
    wanted = reference.attention(q, kv, indptr, attn.variant)
    o = state.o.astype(np.float64)
    np.testing.assert_allclose(o, wanted.o, rtol=2**-8, atol=2**-9 * 4)
    error = np.linalg.norm(o - wanted.o) / np.linalg.norm(wanted.o)
    assert error < 4e-3, error
    np.testing.assert_allclose(state.lse, wanted.lse, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_vector_widths(rng, isa):
    if not compilers.runnable(isa):
        pytest.skip(f"this CPU has no {isa}")
    variant = ALL_VARIANTS["strange"]
    with knobs.scope(isa=isa):
        kv = paged(rng, KV_LENGTHS, (16, 2, 36), np.float16)
        q, indptr = queries(rng, QO, 6, 36)
        check(Attention(6, 2, 36, variant), q, kv, indptr, **values_of(rng, variant, 6, 2))


def test_strided_arrays(rng):
    """(pages, heads, slots, dim) seen as pages of slots, K beside V; q from a wider array."""
    both = rng.standard_normal((6, 2, 16, 128)).astype(np.float32)
    table = Table(np.array([57], np.int32), np.array([[5, 0, 3, 1]], np.int32))
    kv = KV(table, Pool(both[..., :64], both[..., 64:], layout="HND"))
    wide = rng.standard_normal((9, 10, 64)).astype(np.float32)
    check(Attention(4, 2, 64), wide[:, 3:7], kv, [0, 9])


def test_ragged_is_paged_with_pages_of_one(rng):
    lengths = [33, 0, 1, 90]
    q, indptr = queries(rng, [2, 1, 1, 30], 6, 64)
    k, v = rng.standard_normal((2, sum(lengths), 2, 64)).astype(np.float32)
    kv_indptr = np.cumsum([0, *lengths]).astype(np.int32)
    attn = Attention(6, 2, 64)
    state = check(attn, q, KV(Table.ragged(kv_indptr), Pool(k, v)), indptr)
    names = np.arange(len(k), dtype=np.int32)
    same = csr(k[:, None], v[:, None], kv_indptr, names, np.array(lengths, np.int32))
    other = attn.run(q, same, attn.plan(indptr, same))
    np.testing.assert_array_equal(state.o, other.o)


def test_sm_scale(rng):
    kv = paged(rng, [50], (16, 2, 64))
    q, indptr = queries(rng, [7], 6, 64)
    check(Attention(6, 2, 64, sm_scale=0.31), q, kv, indptr)


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    k, v = (torch.randn(8, 16, 2, 64).bfloat16() for _ in range(2))
    kv = csr(
        k,
        v,
        torch.tensor([0, 3, 8], dtype=torch.int32),
        torch.arange(8, dtype=torch.int64),
        torch.tensor([36, 80], dtype=torch.int32),
    )
    q = torch.randn(5, 6, 64).bfloat16()
    attn = Attention(6, 2, 64)
    state = attn.run(q, kv, attn.plan([0, 1, 5], kv))
    assert isinstance(state.o, torch.Tensor) and state.o.dtype == torch.bfloat16
    wanted = reference.attention(q, kv, [0, 1, 5], Causal())
    np.testing.assert_allclose(state.o.float().numpy(), wanted.o, rtol=4e-3, atol=1e-3)


def test_large_scores_do_not_overflow(rng):
    kv = paged(rng, [200], (16, 2, 64))
    q, indptr = queries(rng, [5], 6, 64)
    check(Attention(6, 2, 64, sm_scale=40.0), q, kv, indptr, tolerance=3e-4)


def test_nan_in_a_key_reaches_the_queries_that_see_it(rng):
    kv = paged(rng, [30], (16, 2, 64))
    page = int(arrays_of(kv)[4][1])
    arrays_of(kv)[0][page, 4, 0] = np.nan  # the key at position 20 of KV head 0
    q, indptr = queries(rng, [30], 6, 64)
    attn = Attention(6, 2, 64)
    o = attn.run(q, kv, attn.plan(indptr, kv)).o
    assert np.isnan(o[20:, :3]).all()
    assert np.isfinite(o[:20]).all() and np.isfinite(o[:, 3:]).all()


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 200)), min_size=1, max_size=5),
    st.sampled_from([1, 3, 16]),
    st.sampled_from(["causal", "window", "strange"]),
    st.integers(1, 40),
    st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_any_batch(batch, page_size, name, workers, seed):
    """Batches of any lengths and plans for any number of workers give the reference's values."""
    rng = np.random.default_rng(seed)
    variant = ALL_VARIANTS[name]
    attn = Attention(6, 2, 64, variant)
    kv = paged(rng, [n for _, n in batch], (page_size, 2, 64))
    q, indptr = queries(rng, [n for n, _ in batch], 6, 64)
    values = values_of(rng, variant, 6, 2)
    plan = attn.plan(indptr, kv, workers=workers)
    out = np.full(q.shape, np.nan, np.float32)
    state = attn.run(q, kv, plan, out=out, **values)
    wanted = reference.attention(q, kv, indptr, variant, **values)
    np.testing.assert_allclose(state.o, wanted.o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.lse, wanted.lse, rtol=1e-5, atol=1e-5)


def test_splitting_happens_and_is_deterministic(rng):
    kv = paged(rng, [3000, 5], (16, 2, 64))
    q, indptr = queries(rng, [1, 1], 6, 64)
    attn = Attention(6, 2, 64)
    plan = attn.plan(indptr, kv, workers=16)
    assert plan.items["chunks"].max() > 4
    states = [attn.run(q, kv, plan) for _ in range(20)]
    with knobs.scope(threads=1):
        states.append(attn.run(q, kv, plan))
    for s in states[1:]:
        assert s.o.tobytes() == states[0].o.tobytes() and s.lse.tobytes() == states[0].lse.tobytes()
    wanted = reference.attention(q, kv, indptr, attn.variant)
    np.testing.assert_allclose(states[0].o, wanted.o, rtol=3e-6, atol=3e-6)


# ---------------------------------------------------------------------------- recorded steps


@pytest.mark.parametrize("variant", [Causal(), SlidingWindow(window=100)], ids=repr)
def test_bound_decode_with_a_growing_length(rng, variant):
    """One cache of one large page: a replay sees keys that came since, at the same addresses."""
    k = np.full((1, 700, 3, 64), np.nan, np.float32)
    v = k.copy()
    last = np.zeros(1, np.int32)
    kv = csr(k, v, np.array([0, 1], np.int32), np.zeros(1, np.int32), last)
    q, out = np.empty((1, 9, 64), np.float32), np.full((1, 9, 64), np.nan, np.float32)
    bound = bind(Attention(9, 3, 64, variant), q, kv, out=out)
    step = Step([bound.launch])
    for length in [0, 1, 2, 63, 64, 65, 128, 300, 513, 699, 700, 5]:
        k[0, :length], v[0, :length] = rng.standard_normal((2, length, 3, 64))
        q[:] = rng.standard_normal(q.shape)
        last[0] = length
        step()
        wanted = reference.attention(q, kv, [0, 1], variant)
        np.testing.assert_allclose(out, wanted.o, rtol=3e-6, atol=3e-6)
        np.testing.assert_allclose(bound.state.lse, wanted.lse, rtol=3e-6, atol=3e-6)


def test_bound_decode_with_pages_that_come_and_go(rng):
    kv = paged(rng, [40, 16, 90], (16, 2, 64))
    q, indptr = queries(rng, [1, 1, 1], 6, 64)
    bound = bind(Attention(6, 2, 64), q, kv)
    bound()
    k, v, kv_len, kv_indptr, names = arrays_of(kv)
    names[:4] = names[[9, 5, 2, 4]]
    kv_indptr[:], kv_len[:] = [0, 2, 4, 9], [32, 19, 71]
    pages = names[:9]
    for array in (k, v):
        array[pages] = rng.standard_normal(array[pages].shape)
    state = bound()
    wanted = reference.attention(q, kv, indptr, Causal())
    np.testing.assert_allclose(state.o, wanted.o, rtol=3e-6, atol=3e-6)


def test_scalars_are_read_from_memory_at_every_run(rng):
    kv = paged(rng, [100], (16, 2, 64))
    q, indptr = queries(rng, [1], 6, 64)
    cap, slopes = np.array([3.0], np.float32), np.zeros(6, np.float32)
    bound = bind(Attention(6, 2, 64, SoftcapAlibi()), q, kv, soft_cap=cap, slopes=slopes)
    for value in (3.0, 0.5):
        cap[0], slopes[:] = value, rng.uniform(0, 1, 6)
        state = bound()
        wanted = reference.attention(q, kv, indptr, SoftcapAlibi(), soft_cap=cap, slopes=slopes)
        np.testing.assert_allclose(state.o, wanted.o, rtol=3e-6, atol=3e-6)


def test_contents_that_go_wrong_later_are_clamped(rng):
    """After binding, wild numbers in memory give wrong values, never a fault, and the same ones as
    the reference's."""
    kv = paged(rng, [40, 30], (16, 2, 64))
    for pages in arrays_of(kv)[:2]:
        pages[...] = np.nan_to_num(pages)
    q, _ = queries(rng, [1, 1], 6, 64)
    bound = bind(Attention(6, 2, 64), q, kv)
    kv_len, kv_indptr, names = arrays_of(kv)[2:]
    names[:] = [2**31 - 1, -5, 100, -(2**31), 77]
    kv_len[:] = [2**31 - 1, -(2**31)]
    kv_indptr[:] = [-9, 2**30, 3]
    state, wanted = bound(), reference.attention(q, kv, [0, 1, 2], Causal())
    np.testing.assert_allclose(state.o, wanted.o, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(state.lse, wanted.lse, rtol=3e-6, atol=3e-6)


def test_launch_is_plain_numbers(rng):
    kv = paged(rng, [20], (16, 2, 64))
    q, _ = queries(rng, [1], 6, 64)
    bound = bind(Attention(6, 2, 64), q, kv)
    bound.state.o[:] = np.nan
    pool.pool().prepare([bound.launch])()
    assert np.isfinite(bound.state.o).all()


# ---------------------------------------------------------------------------- the door


def refused(code, call, *args, **kwargs):
    with pytest.raises(ArgumentError) as e:
        call(*args, **kwargs)
    assert e.value.code == code, str(e.value)
    assert e.value.where
    return e.value


def test_bad_shapes_of_the_attention():
    refused("A103", Attention, 6, 4, 64)
    refused("A103", Attention, 0, 1, 64)
    refused("A103", Attention, 4, 2, 257)
    refused("A107", Attention, 4, 2, 64, Causal)
    refused("A107", Attention, 4, 2, 64, "causal")


def test_bad_arguments_of_run(rng):
    attn = Attention(6, 2, 64, SoftcapAlibi())
    kv = paged(rng, [20, 4], (16, 2, 64))
    q, indptr = queries(rng, [2, 1], 6, 64)
    plan = attn.plan(indptr, kv)
    slopes = np.ones(6, np.float32)
    out = np.full(q.shape, 7.0, np.float32)

    def run(q=q, kv=kv, plan=plan, out=out, **values):
        return attn.run(q, kv, plan, out=out, **({"slopes": slopes} | values))

    refused("A103", run, q=q[:2])
    refused("A103", run, q=q[:, :3])
    refused("A102", run, q=q.astype(np.float64))
    refused("A104", run, q=np.repeat(q, 2, axis=2)[..., ::2])
    refused("A107", run, q=[1, 2])
    refused("A107", run, plan=indptr)
    refused("A107", attn.plan, indptr, kv, invariant="yes")
    assert attn.plan(indptr, kv, invariant=False) == attn.plan(indptr, kv, invariant=True)
    refused("A107", run, kv=None)
    refused("A103", run, kv=paged(rng, [20, 4], (16, 3, 64)))
    refused("A103", run, kv=paged(rng, [20], (16, 2, 64)))
    refused("A101", run, slope=1.0)
    refused("A101", attn.run, q, kv, plan)
    refused("A102", run, slopes=slopes.astype(np.float64))
    refused("A103", run, slopes=slopes[:2])
    refused("A104", run, slopes=np.ones(12, np.float32)[::2])
    refused("A102", run, soft_cap="warm")
    refused("A102", run, soft_cap=np.ones(1))
    refused("A102", run, out=np.empty(q.shape))
    refused("A103", run, out=np.empty((1, 6, 64), np.float32))
    refused("A108", run, out=q)
    refused("A108", run, out=out, slopes=out[0, 0, :6])
    refused("A108", run, out=kv.pool.arrays[0].reshape(-1)[: out.size].reshape(out.shape))
    refused("A107", attn.plan, indptr, kv, invariant=np.ones(2))
    frozen = out.copy()
    frozen.flags.writeable = False
    refused("A105", run, out=frozen)
    refused("A103", Attention(4, 2, 64).run, q[:, :4], kv, plan)  # items cut for another group
    assert (out == 7.0).all()
    run()
    assert (out != 7.0).any()


def test_bad_arguments_of_plan(rng):
    attn = Attention(6, 2, 64)
    kv = paged(rng, [20, 4], (16, 2, 64))
    refused("A103", attn.plan, [0, 2], kv)
    refused("A103", attn.plan, [0.0, 1.0, 2.0], kv)
    refused("A109", attn.plan, [0, 3, 2], kv)
    refused("A109", attn.plan, [1, 2, 3], kv)
    refused("A103", attn.plan, [0, 1, 2], kv, workers=0)
    assert "no value 'worker'" in refused("A101", attn.plan, [0, 1, 2], kv, worker=4).message
    refused("A101", attn.plan, [0, 1, 2], kv, window=3)
    windowed = Attention(6, 2, 64, SlidingWindow(window=3))
    assert "window" in refused("A101", windowed.plan, [0, 1, 2], kv, windw=3).hint
    refused("A102", windowed.plan, [0, 1, 2], kv, window="wide")
    refused("A102", windowed.plan, [0, 1, 2], kv, window=np.float32(3.0))
    windowed.plan([0, 1, 2], kv, window=np.int64(3))
    plan = windowed.plan([0, 1, 2], kv, window=np.array([3], np.int32))  # read when it runs
    q, _ = queries(rng, [1, 1], 6, 64)
    refused("A101", windowed.bind, q, kv, plan=plan, windw=3)


def test_heads_before_slots_are_recognised():
    k = np.zeros((3, 2, 16, 64), np.float32)  # (pages, kv_heads, page_size, head_dim)
    table = Table(np.array([5], np.int32), np.array([[0, 1, 2]], np.int32))
    attn = Attention(6, 2, 64)
    wrong = refused("A103", attn.plan, [0, 1], KV(table, Pool(k, k)))
    assert 'layout="HND"' in wrong.hint
    attn.plan([0, 1], KV(table, Pool(k, k, layout="HND")))
    three = np.zeros((3, 16, 3, 64), np.float32)
    assert not refused("A103", attn.plan, [0, 1], KV(table, Pool(three, three))).hint


def test_source_is_shown(rng):
    kv = paged(rng, [20], (16, 2, 64))
    q, _ = queries(rng, [1], 6, 64)
    bound = bind(Attention(6, 2, 64), q, kv)
    assert "struct Variant" in bound.source and "stage0" in bound.source
    assert 'extern "C"' in bound.source and "MAX_TOKENS = 32" in bound.source
