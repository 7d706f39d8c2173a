"""Pages that a table names, read by programs: scores of stored keys, and bounds of each page."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.compiler.cases import after_every_pass

import tilewright as tw
from tilewright.errors import ArgumentError
from tilewright.toolchain import compilers, nvrtc

PAGE, HEADS, DIM = 8, 2, 4
TARGETS = ("interp", "cpp") if compilers.has_compiler() else ("interp",)


@tw.program
def scores(K=tw.sparse("r t h d"), Q=tw.dense("r h d")):
    r, t, h, d = tw.indices("r t h d")
    return tw.out[r, h, t](tw.sum(Q[r, h, d] * K[r, t, h, d], over=d))


@tw.program
def bounds(K=tw.sparse("r t h d"), page=tw.dense("p", dtype="int32")):
    r, p, s, h, d = tw.indices(f"r p s:{PAGE} h d")
    key = K[r, page[p] * PAGE + s, h, d]
    low = tw.min(tw.where(tw.stored(key), key, float("inf")), over=s)
    high = tw.max(tw.where(tw.stored(key), key, -float("inf")), over=s)
    return tw.out.named("low")[r, p, h, d](low), tw.out.named("high")[r, p, h, d](high)


@tw.program
def key_sums(K=tw.sparse("r t h d")):
    r, t, h, d = tw.indices("r t h d")
    return tw.out[r, h, d](tw.sum(K[r, t, h, d], over=t))


def batch(rng, kind, lengths=(13, 0, 8, 30, 1), index: type = np.int32):
    """A pool that is NaN where no key is, its table (requests 0 and 2 have a page in common), and
    the keys of each request."""
    pages = [-(-n // PAGE) for n in lengths]
    free = rng.permutation(sum(pages) + 3)
    rows = [list(x) for x in np.split(free[: sum(pages)], np.cumsum(pages)[:-1])]
    rows[2] = rows[0][: pages[2]]
    pool = np.full((len(free), PAGE, HEADS, DIM), np.nan, np.float32)
    for n, row in zip(lengths, rows, strict=True):
        for t in range(n):
            if np.isnan(pool[row[t // PAGE], t % PAGE]).any():
                pool[row[t // PAGE], t % PAGE] = rng.normal(size=(HEADS, DIM))
    keys = [np.array([pool[row[t // PAGE], t % PAGE] for t in range(n)]).reshape(-1, HEADS, DIM)
            for n, row in zip(lengths, rows, strict=True)]  # fmt: skip
    kv_len = np.array(lengths, index)
    if kind == "csr":
        indptr = np.append(0, np.cumsum([len(r) for r in rows])).astype(index)
        spare = [-1] * 3  # behind the last request
        table = tw.Table.csr(kv_len, indptr, np.array([*itertools.chain(*rows), *spare], index))
    else:
        block_table = np.full((len(rows), max(pages) + 1), 2**30, index)
        for r, row in enumerate(rows):
            block_table[r, : len(row)] = row
        table = tw.Table(kv_len, block_table)
    return pool, table, keys


@pytest.mark.parametrize("kind", ["csr", "padded"])
@pytest.mark.parametrize("target", TARGETS)
def test_scores_of_the_stored_keys_of_each_request(kind, target, rng):
    pool, table, keys = batch(rng, kind)
    K, Q = table.tensor(pool), rng.normal(size=(5, HEADS, DIM)).astype(np.float32)
    assert K.format == table.format(PAGE) and K.shape[2:] == (HEADS, DIM)
    kernel = scores.decompose(K=K.format).build(target)
    out = np.full((5, HEADS, K.shape[1]), np.nan, np.float32)
    kernel(K, Q, out=out)
    for r, own in enumerate(keys):
        np.testing.assert_allclose(
            out[r, :, : len(own)], np.einsum("hd,thd->ht", Q[r], own), 1e-4, 1e-5
        )
        assert (out[r, :, len(own) :] == 0).all(), "nothing is stored behind the last key"


@pytest.mark.parametrize("target", TARGETS)
def test_least_and_greatest_keys_of_each_page(target, rng):
    pool, table, keys = batch(rng, "padded")
    K = table.tensor(pool)
    pages = np.arange(K.shape[1] // PAGE, dtype=np.int32)
    low, high = bounds.decompose(K=K.format).build(target)(K, pages)
    for r, own in enumerate(keys):
        for p in pages:
            page = own[p * PAGE : (p + 1) * PAGE]
            np.testing.assert_array_equal(low[r, p], page.min(0, initial=np.inf))
            np.testing.assert_array_equal(high[r, p], page.max(0, initial=-np.inf))


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_follows_what_changes_in_memory(target, rng):
    """Lengths grow and shrink, and numbers of pages that are none, and lengths beyond the pages of
    a request, are clamped: nothing else is read."""
    pool, table, keys = batch(rng, "csr")
    pool[np.isnan(pool)] = 0
    K, kernel = table.tensor(pool), key_sums.decompose(K=table.format(PAGE)).build(target)

    def check():
        np.testing.assert_allclose(kernel(K), [k.sum(0) for k in keys], 1e-4, 1e-5)

    check()
    table.arrays["kv_len"][0], keys[0] = 2, keys[0][:2]
    check()
    table.arrays["kv_len"][1] = 2**31 - 1  # it has no page
    check()
    table.arrays["table_entries"][:] = -5, *[2**31 - 1] * (len(table.arrays["table_entries"]) - 1)
    assert np.isfinite(kernel(K)).all()


def test_every_pass_and_the_threads_of_a_gpu(rng):
    def recipe(s):
        s = s.split("r", 2, into=("r_cta", "r_y")).bind("r_cta", "cta.x").bind("r_y", "thread.y")
        return s.split("d", 2, into=("d_o", "d_x")).bind("d_x", "thread.x")

    pool, table, _ = batch(rng, "padded", (3, 0, 2))
    K = table.tensor(pool)
    definition = scores.decompose(K=K.format)
    after_every_pass(definition, {"K": K, "Q": np.ones((3, HEADS, DIM), np.float32)})
    Q = rng.normal(size=(3, HEADS, DIM)).astype(np.float32)
    pool[np.isnan(pool)] = 0
    after_every_pass(definition, {"K": K, "Q": Q}, recipe, "cuda")
    if nvrtc.available():
        assert definition.schedule(recipe).build("cuda:sm_90a").resources


def test_units_of_a_launch_up_to_the_length_of_each_request(rng):
    """The grid has all positions that a request may have; units behind its last key do nothing."""

    def recipe(s):
        s = s.bind("r", "cta.y").bind("h", "cta.y") if s.target.is_cuda else s
        for n in range(len(s.nests)):
            s = s.on(n).split("t", 8, into=("t_cta", "t_x")).reorder("r", "t_cta", "h")
            s = s.bind("t_cta", "cta.x").bind("t_x", "thread.x") if s.target.is_cuda else s
        return (
            s.everywhere() if s.target.is_cuda else s.everywhere().parallel("r").parallel("t_cta")
        )

    pool, table, keys = batch(rng, "padded")
    K, Q = table.tensor(pool), rng.normal(size=(5, HEADS, DIM)).astype(np.float32)
    definition = scores.decompose(K=K.format).schedule(recipe)
    for target in TARGETS:
        out = definition.build(target)(K, Q)
        for r, own in enumerate(keys):
            wanted = np.einsum("hd,thd->ht", Q[r], own)
            np.testing.assert_allclose(out[r, :, : len(own)], wanted, 1e-4, 1e-5)
            assert (out[r, :, len(own) :] == 0).all()
    pool[np.isnan(pool)] = 0
    after_every_pass(scores.decompose(K=K.format), {"K": K, "Q": Q}, recipe, "cuda")


def test_unpacking_gives_each_request_its_keys(rng):
    pool, table, keys = batch(rng, "csr", index=np.int64)
    K = table.tensor(pool)
    assert K.structure.index_dtype.name == "int64"
    (r, t, h, d), values = K.unpack()
    np.testing.assert_array_equal(
        values, [keys[a][b, c, e] for a, b, c, e in zip(r, t, h, d, strict=True)]
    )
    assert len(values) == sum(k.size for k in keys)


def test_refusals(rng):
    pool, table, _ = batch(rng, "padded")
    wide = tw.Table(np.zeros(2, np.int64), np.zeros((2, 1), np.int32))
    cases = [
        ("A107", lambda: tw.Table.dense(np.zeros(2, np.int32)).tensor(pool)),
        ("A102", lambda: wide.tensor(pool)),
        ("A103", lambda: table.tensor(pool[:0])),
        ("A103", lambda: table.tensor(pool[:, 0, 0, 0])),
        ("A104", lambda: table.tensor(pool[:, ::2])),
    ]
    for code, call in cases:
        with pytest.raises(ArgumentError, match=code):
            call()
