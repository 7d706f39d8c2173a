"""Tables, pools and caches: what they show, and everything that is refused at the door."""

from __future__ import annotations

import numpy as np
import pytest
from tests.attention.cases import TYPES, arrays_of, paged

import tilewright as tw
from tilewright.attention import planner, reference
from tilewright.attention.table import MAX_KEYS, Table
from tilewright.errors import ArgumentError
from tilewright.toolchain import compilers


def i32(*numbers):
    return np.array(numbers, np.int32)


def parts(**changed):
    """Arguments of a good CSR table: 3 requests of 20, 0 and 32 keys."""
    arrays = {"kv_len": i32(20, 0, 32), "kv_indptr": i32(0, 2, 2, 4), "kv_indices": i32(5, 0, 3, 1)}
    return arrays | changed


def pool(pages=6, page_size=16, kv_heads=2, head_dim=8):
    k = np.zeros((pages, page_size, kv_heads, head_dim), np.float32)
    return tw.Pool(k, k.copy())


def cache(**changed):
    return tw.KV(Table.csr(**parts(**changed)), pool())


def refused(code, where, function, *args, **kwargs):
    with pytest.raises(ArgumentError) as e:
        function(*args, **kwargs)
    assert (e.value.code, e.value.where) == (code, where), str(e.value)
    return e.value


def test_a_view_and_no_copy():
    arrays = parts()
    kv = tw.KV(Table.csr(**arrays), pool())
    assert kv.lengths().tolist() == [20, 0, 32] and kv.capacity().tolist() == [32, 0, 32]
    seen = kv.table.requests, kv.pool.page_size, kv.pool.kv_heads, kv.pool.head_dim
    assert seen == (3, 16, 2, 8)
    assert "Table(csr, 3 requests, cpu), Pool(6 pages of 16, 2 heads × 8, float32, cpu)" in repr(kv)
    arrays["kv_len"][0] += 1
    assert kv.lengths()[0] == 21


def test_pages_are_read_in_their_order(rng):
    kv = paged(rng, [40], (16, 2, 8))
    keys, _ = reference.gather(kv, 0)
    k, names = arrays_of(kv)[0], arrays_of(kv)[4]
    assert keys.shape == (40, 2, 8) and not np.isnan(keys).any()
    np.testing.assert_array_equal(keys[16:32], k[names[1]])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_memory_without_keys_is_not_touched(rng, dtype):
    """Signalling NaN where no key is: NumPy warns when one of them is converted."""
    kv = paged(rng, [40, 3], (16, 2, 8), dtype)
    wanted = [reference.gather(kv, r) for r in (0, 1)]
    bits = {4: np.uint32(0x7F800001), 2: np.uint16(0x7C01)}[np.dtype(dtype).itemsize]
    for pages in arrays_of(kv)[:2]:
        empty = np.isnan(pages)
        pages.view(bits.dtype)[empty] = bits
    for r in (0, 1):
        np.testing.assert_array_equal(reference.gather(kv, r), wanted[r])


def test_contents_that_go_wrong_in_place_are_clamped(rng):
    """As kernels do it: a page that does not exist is page 0, no length exceeds the pages."""
    kv = paged(rng, [40, 3], (16, 2, 8))
    k, _, kv_len, indptr, names = arrays_of(kv)
    names[0] = 77
    np.testing.assert_array_equal(reference.gather(kv, 0)[0][:16], k[0])
    kv_len[:] = 99, -5
    assert kv.lengths().tolist() == [48, 0]
    kv_len[:] = 2**31 - 1
    indptr[:] = -7, 2, 10**9
    assert kv.lengths().tolist() == [32, 32] and kv.capacity().tolist() == [32, 32]
    indptr[:] = 3, 1, 0
    assert kv.lengths().tolist() == [0, 0]


# ---------------------------------------------------------------------------- every form, one cache


def forms(rng, lengths, page_size, pages):
    """Tables of every form that has pages, over the same pages; unused entries are rubbish."""
    counts = [-(-n // page_size) for n in lengths]
    names = rng.permutation(pages)[: sum(counts)].astype(np.int32)
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    kv_len = np.array(lengths, np.int32)
    wide = rng.integers(-(2**31), 2**31, (9, max(counts) + 3)).astype(np.int32)
    rows = rng.permutation(9)[: len(lengths)]
    straight = wide[: len(lengths)].copy()
    for r, row in enumerate(rows):
        for table, at in ((wide, row), (straight, r)):
            table[at, : counts[r]] = names[indptr[r] : indptr[r + 1]]
    for kind in (np.int32, np.int64):
        yield Table.csr(kv_len.astype(kind), indptr, names.astype(kind))
        yield Table(kv_len, straight.astype(kind)[:, :-2])  # rows of a wider table
        yield Table(kv_len.astype(kind), wide, rows=rows.astype(kind))
        yield Table(
            kv_len, wide[::-1], rows=8 - rows.astype(kind)
        )  # rows from the last to the first


def test_the_forms_of_a_table_say_the_same(rng):
    lengths, page_size = [40, 0, 7, 16], 8
    k, v = rng.standard_normal((2, 20, page_size, 2, 16)).astype(np.float32)
    q = rng.standard_normal((6, 4, 16)).astype(np.float32)
    attn, indptr = tw.Attention(4, 2, 16), [0, 1, 2, 4, 6]
    states = []
    for table in forms(np.random.default_rng(3), lengths, page_size, 20):
        kv = tw.KV(table, tw.Pool(k, v))
        assert kv.lengths().tolist() == lengths
        states.append(attn.run(q, kv, attn.plan(indptr, table)))
        wanted = reference.attention(q, kv, indptr, attn.variant)
        np.testing.assert_allclose(states[-1].o, wanted.o, rtol=3e-6, atol=3e-6)
        np.testing.assert_array_equal(states[-1].o, states[0].o)
        np.testing.assert_array_equal(states[-1].lse, states[0].lse)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_layouts_of_a_pool_say_the_same(rng, kind):
    k, v = (rng.standard_normal((2, 6, 16, 2, 8))).astype(TYPES[kind])
    table = Table.csr(**parts())
    heads_first = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (k, v)]
    flat = [x.reshape(96, 2, 8) for x in (k, v)]
    slots = np.concatenate([np.arange(16) + 16 * p for p in parts()["kv_indices"]]).astype(np.int32)
    rows = Table.csr(i32(20, 0, 32), i32(0, 32, 32, 64), slots)  # pages of one key
    caches = [
        tw.KV(table, tw.Pool(k, v)),
        tw.KV(table, tw.Pool(*heads_first, layout="HND")),
        tw.KV(table, tw.Pool(np.stack([k, v], 1))),
        tw.KV(table, tw.Pool(np.stack(heads_first, 1), layout="HND")),
        tw.KV(rows, tw.Pool(*flat)),
    ]
    q = rng.standard_normal((3, 4, 8)).astype(TYPES[kind])
    attn = tw.Attention(4, 2, 8)
    states = [attn.run(q, kv, attn.plan([0, 1, 2, 3], kv)) for kv in caches]
    for kv, state in zip(caches, states, strict=True):
        assert state.o.dtype == q.dtype and state.lse.dtype == np.float32
        for x, y in zip(reference.gather(kv, 2), reference.gather(caches[0], 2), strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(state.o, states[0].o)


def test_v_inside_k(rng):
    """Rows of V that are a part of K's, as in latent attention."""
    k = rng.standard_normal((6, 16, 2, 24)).astype(np.float32)
    kv = tw.KV(Table.csr(**parts()), tw.Pool(k, k[..., :16]))
    attn = tw.Attention(4, 2, 24, head_dim_vo=16)
    q = rng.standard_normal((3, 4, 24)).astype(np.float32)
    state = attn.run(q, kv, attn.plan([0, 1, 2, 3], kv))
    wanted = reference.attention(q, kv, [0, 1, 2, 3], attn.variant)
    assert state.o.shape == (3, 4, 16)
    np.testing.assert_allclose(state.o, wanted.o, rtol=3e-6, atol=3e-6)


def test_a_suffix_in_two_parts(rng):
    """Keys of a prefix and of a suffix with positions of their own merge to all of them."""
    k, v = rng.standard_normal((2, 1, 90, 2, 16)).astype(np.float32)
    q = rng.standard_normal((7, 4, 16)).astype(np.float32)
    attn = tw.Attention(4, 2, 16)

    def over(part, **positions):
        kv = tw.KV(
            Table.dense(i32(k[:, part].shape[1]), **positions), tw.Pool(k[:, part], v[:, part])
        )
        return attn.run(q, kv, attn.plan([0, 7], kv))

    whole, base = over(slice(None)), i32(83)
    prefix = over(slice(0, 40), qo_base=base)
    suffix = over(slice(40, None), qo_base=base, kv_base=i32(40), kv_stride=i32(1))
    merged = prefix.merge(suffix)
    np.testing.assert_allclose(merged.o, whole.o, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged.lse, whole.lse, rtol=1e-5, atol=1e-6)
    shards = [
        over(slice(n, None, 3), qo_base=base, kv_base=i32(n), kv_stride=i32(3)) for n in range(3)
    ]
    np.testing.assert_allclose(shards[0].merge(*shards[1:]).o, whole.o, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------- refused


def test_bad_arrays_of_a_pool():
    zeros = np.zeros((6, 16, 2, 8), np.float32)
    for code, where, args in (
        ("A102", "k", (zeros.astype(np.float64), zeros)),
        ("A102", "k", (zeros.astype(np.uint16), zeros)),
        ("A103", "k", (zeros[0, 0], zeros)),
        ("A103", "v", (zeros, zeros[0])),
        ("A103", "v", (zeros, zeros[:5])),
        ("A102", "v", (zeros, zeros.astype(np.float16))),
        ("A104", "v", (zeros, np.zeros((6, 16, 2, 16), np.float32)[..., ::2])),
        ("A103", "k", (zeros[:, :0], zeros[:, :0])),
        ("A107", "k", ([1.0], zeros)),
        ("A103", "k", (zeros,)),
    ):
        refused(code, where, tw.Pool, *args)
    refused("A107", "layout", tw.Pool, zeros, zeros, layout="NDH")
    refused("A103", "k", tw.Pool, zeros[:, 0], zeros[:, 0], layout="HND")


def test_which_size_is_0():
    for axis, name in enumerate(("page_size", "kv_heads", "head_dim"), 1):
        shape = [6, 16, 2, 8]
        shape[axis] = 0
        k = np.zeros(shape, np.float32)
        with pytest.raises(ArgumentError, match=f"A103.*has {name} 0"):
            tw.Pool(k, k)
    with pytest.raises(ArgumentError, match=r"A103.*has kv_heads 0"):
        tw.Pool(np.zeros((4, 0, 8), np.float32), np.zeros((4, 0, 8), np.float32))


def test_bad_integers():
    for code, where, changed in (
        ("A102", "kv_indptr", {"kv_indptr": np.array([0.0, 2, 2, 4])}),
        ("A102", "kv_indices", {"kv_indices": np.zeros(4, np.int16)}),
        ("A103", "kv_indices", {"kv_indices": np.zeros((2, 2), np.int32)}),
        ("A104", "kv_indices", {"kv_indices": np.zeros(8, np.int32)[::2]}),
        ("A103", "kv_indptr", {"kv_indptr": np.zeros(0, np.int32)}),
        ("A103", "kv_len", {"kv_len": i32(1, 1)}),
        ("A107", "kv_len", {"kv_len": [4, 0, 16]}),
        ("A101", "kv_bse", {"kv_bse": i32(0, 0, 0)}),
        ("A101", "kv_base", {"kv_base": i32(0, 0, 0), "qo_base": i32(0, 0, 0)}),
        ("A101", "kv_base", {"kv_base": i32(0, 0, 0), "kv_stride": i32(1, 1, 1)}),
        ("A103", "qo_base", {"qo_base": i32(0, 0)}),
        ("A102", "qo_base", {"qo_base": np.zeros(3, np.int64)}),
    ):
        refused(code, where, Table.csr, **parts(**changed))
    block_table = np.zeros((3, 4), np.int32)
    refused("A103", "block_table", Table, i32(1, 1), block_table)
    assert "rows" in refused("A103", "block_table", Table, i32(1, 1), block_table).hint
    refused("A103", "block_table", Table, i32(1, 1), block_table[0])
    refused("A103", "rows", Table, i32(1, 1), block_table, rows=i32(1))
    refused("A109", "rows", Table, i32(1, 1), block_table, rows=i32(1, 3))
    refused("A104", "block_table", Table, i32(1, 1, 1), block_table[:, ::2])
    refused("A103", "block_table", Table, i32(1, 1, 1), np.zeros((3, 0, 4), np.int32))
    for code, where, shared in (
        ("A107", "shared", 3), ("A107", "shared", i32(0, 2)), ("A107", "shared", "ab"),
        ("A107", "shared_0", [[0, 2]]), ("A103", "shared_0", [np.zeros(0, np.int32)]),
    ):  # fmt: skip
        refused(code, where, Table, i32(1, 1, 1), block_table, shared=shared)


def test_contents_out_of_range():
    wraps = np.array([0, 2**31 - 1, -(2**31), -1, 3], np.int32)  # no difference is negative
    for changed in (
        {"kv_indptr": i32(0, 2, 1, 4)}, {"kv_indptr": i32(1, 2, 2, 4)},
        {"kv_indptr": i32(0, 2, 2, 5)}, {"kv_indptr": wraps, "kv_len": i32(0, 0, 0, 0)},
    ):  # fmt: skip
        refused("A109", "kv_indptr", Table.csr, **parts(**changed))
    refused("A109", "kv_len", Table.csr, **parts(kv_len=i32(-1, 0, 3)))
    refused("A109", "kv_len", Table.csr, **parts(kv_len=np.array([MAX_KEYS + 1, 0, 3])))
    refused("A109", "kv_len", cache, kv_len=i32(20, 1, 32))  # no page
    refused("A109", "kv_len", cache, kv_len=i32(33, 0, 32))
    refused("A109", "kv_indices", cache, kv_indices=i32(5, 0, 6, 1))
    refused("A109", "kv_indices", cache, kv_indices=i32(5, -1, 3, 1))
    refused(
        "A109", "kv_stride", Table.dense, i32(1), qo_base=i32(0), kv_base=i32(0), kv_stride=i32(0)
    )
    ends = Table.dense(i32(3), qo_base=i32(0), kv_base=i32(2**31 - 3), kv_stride=i32(1))
    assert tw.KV(ends, pool()).lengths().tolist() == [3]
    for base, stride in ((2**31 - 2, 1), (0, 2**31 - 1), (2**31 - 1, 2**31 - 1)):
        positions = {"kv_base": i32(base), "kv_stride": i32(stride)}
        beyond = Table.dense(i32(3), qo_base=i32(0), **positions)
        refused("A109", "kv_base", tw.KV, beyond, pool())
    table = np.array([[1, 2, -1], [9, 0, 0]], np.int32)
    refused("A109", "block_table", tw.KV, Table(i32(20, 1), table), pool())
    tw.KV(Table(i32(32, 0), table), pool())


def test_tables_that_do_not_fit_a_pool():
    rows = np.zeros((9, 2, 8), np.float32)
    kv = tw.KV(Table.ragged(i32(0, 4, 9)), tw.Pool(rows, rows.copy()))
    assert kv.lengths().tolist() == [4, 5] and "ragged" in repr(kv) and "9 rows" in repr(kv)
    refused("A109", "kv_indptr", tw.KV, Table.ragged(i32(0, 4, 10)), kv.pool)
    for end in (2**62, 2**63 - 1):  # no list of so many rows is made
        refused("A109", "kv_indptr", tw.KV, Table.ragged(np.array([0, 4, end])), kv.pool)
    refused("A103", "pool", tw.KV, Table.ragged(i32(0, 4, 9)), pool())
    refused("A103", "pool", tw.KV, Table.dense(i32(1, 1, 1)), pool(pages=2))
    refused("A109", "kv_len", tw.KV, Table.dense(i32(17)), pool())
    refused("A107", "table", tw.KV, None, pool())
    refused("A107", "pool", tw.KV, Table.dense(i32(1)), None)
    short = tw.KV(Table.ragged(i32(0, 4, 9), i32(3, 0)), kv.pool)
    assert short.lengths().tolist() == [3, 0]


def test_an_indptr_that_falls_far_gives_no_rows():
    """What has been checked may change in memory; a difference of int64 would wrap around."""
    indptr = np.array([0, 2, 4])
    table = Table.csr(i32(20, 20), indptr, i32(5, 0, 3, 1))
    for wrong in (-1, -(2**63)):
        indptr[2] = wrong
        assert table.ranges()[1].tolist() == [2, 0]


def test_entries_behind_the_last_key_are_not_looked_at():
    """A buffer of a recorded step is longer than what is in use."""
    cache(kv_indices=i32(5, 0, 3, 1, -7, 2**31 - 1))
    cache(kv_len=i32(16, 0, 3), kv_indices=i32(5, -1, 3, 99))
    refused("A109", "kv_indices", cache, kv_indices=i32(5, 0, 3, 6, 0))


def test_a_reservation_is_for_gpus():
    attn = tw.Attention(4, 2, 8)
    refused("A105", "device", attn.reserve, 3, device="cpu")
    refused("A105", "device", attn.reserve, 3, device="cuda:x")
    refused("A103", "max_requests", attn.reserve, 0)
    refused("A103", "max_requests", attn.reserve, 10**6)
    refused("A103", "max_tokens", attn.reserve, 3, max_tokens=2.5)
    refused("A103", "max_tokens", attn.reserve, 3, max_tokens=0)
    refused("A105", "device", attn.reserve, 3, device=None)
    refused("A103", "workers", attn.reserve, 3, workers="x")
    refused("A103", "workers", attn.reserve, 3, workers=10**9)
    refused("A103", "qo_heads", tw.Attention(34, 2, 8).reserve, 3)


class OnlyDLPack:
    """An array that has nothing but the DLPack protocol."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_of_dlpack_alone():
    arrays = (np.array(x, np.int32) for x in ([3, 5], [0, 1, 3], [2, 0, 1]))
    table = tw.Table.csr(*map(OnlyDLPack, arrays))
    assert table.lengths().tolist() == [3, 5]
    with pytest.raises(ArgumentError, match="A109"):
        tw.Table.dense(OnlyDLPack(np.array([-1], np.int32)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_of_each_dtype_without_a_compiler(rng, monkeypatch, dtype):
    """Attention then runs in NumPy, which has no bfloat16; o is written in place all the same."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(compilers, "has_compiler", lambda: False)
    monkeypatch.setattr(compilers, "warn_of_interpreter", lambda: None)
    monkeypatch.setattr(planner, "native", lambda: None)
    q, k, v = (
        torch.from_numpy(rng.standard_normal((5, heads, 16))).to(getattr(torch, dtype))
        for heads in (4, 2, 2)
    )
    kv, rows = tw.KV(tw.Table.ragged(np.array([0, 5])), tw.Pool(k, v)), np.array([0, 5])
    attn, out = tw.Attention(4, 2, 16), torch.full_like(q, torch.nan)
    state = attn.run(q, kv, attn.plan(rows, kv), out=out)
    assert state.o is out
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, wanted.transpose(0, 1).to(out.dtype), rtol=1e-2, atol=1e-2)
