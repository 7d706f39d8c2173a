"""Variants that read tensors by request, row of q, key and bit: by hand, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.attention.cases import TYPES, paged, queries, tile_class
from tests.attention.test_flash_cuda import _bits, on_device
from tests.attention.twin import Interval

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import reference
from tilewright.attention.families import decode, portable
from tilewright.attention.spec import Spec, alone, compile_cuda
from tilewright.attention.table import TableForm
from tilewright.attention.variant import traced_of
from tilewright.errors import ArgumentError, ProgramError
from tilewright.toolchain import compilers, nvrtc

needs_compiler = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


@tw.variant
class Documents:
    document = tw.per_key()

    def mask(self, at):
        return (at.kv <= at.qo) & tw.equal(self.document[at.key], self.document[at.qo])


@tw.variant
class PrefixLM:
    prefix = tw.per_request()

    def mask(self, at):
        return (at.kv <= at.qo) | (at.kv < self.prefix[at.request])


@tw.variant
class Images:
    """Keys of an image see each other in both directions."""

    begin = tw.per_token()
    end = tw.per_token()

    def mask(self, at):
        return (at.kv <= at.qo) | (at.kv >= self.begin[at.q_token]) & (at.kv < self.end[at.q_token])


@tw.variant
class Tree:
    """Drafts see all keys before them and their ancestors, by the bits of their row."""

    tree = tw.bit_mask()
    bias = tw.per_token("float32")

    def mask(self, at):
        first = at.kv_len - at.qo_len
        return (at.key < first) | self.tree[at.key - first]

    def logits(self, s, at):
        return s + self.bias[at.q_token]


QO, KV = [5, 1, 3, 1], [70, 9, 3, 200]
VARIANTS = {"documents": Documents(), "prefix": PrefixLM(), "images": Images(), "tree": Tree()}


def drawn(rng, name) -> tuple[dict[str, Any], Any]:
    """Values of a variant, and a function of (request, row of q, query, key) that says what is
    seen: positions are counted by hand."""
    tokens = sum(QO)
    if name == "documents":
        document = np.sort(rng.integers(0, 4, (len(KV), max(KV))), 1).astype(np.int32)
        values = {"document": document}
        return values, lambda r, t, qo, kv: kv <= qo and document[r, kv] == document[r, qo]
    if name == "prefix":
        prefix = np.array([68, 0, 2, -1], np.int32)
        return {"prefix": prefix}, lambda r, t, qo, kv: kv <= qo or kv < prefix[r]
    if name == "images":
        begin = rng.integers(0, 200, tokens).astype(np.int32)
        end = (begin + rng.integers(0, 9, tokens)).astype(np.int32)
        values = {"begin": begin, "end": end}
        return values, lambda r, t, qo, kv: kv <= qo or begin[t] <= kv < end[t]
    parents = rng.random((tokens, 32)) < 0.5
    words = (parents * 2 ** np.arange(32)).sum(1).astype(np.uint32)
    values = {"tree": words[:, None], "bias": np.ones(tokens, np.float32)}
    return values, lambda r, t, qo, kv: kv < KV[r] - QO[r] or parents[t, kv - (KV[r] - QO[r])]


def by_hand(q, kv, sees):
    """o and lse in float64."""
    o, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    token = 0
    for r, (n, m) in enumerate(zip(QO, KV, strict=True)):
        keys, vals = reference.gather(kv, r)
        for i in range(n):
            seen = [k for k in range(m) if sees(r, token, m - n + i, k)]
            for head in range(q.shape[1] if seen else 0):
                kv_head = head * keys.shape[1] // q.shape[1]
                s = keys[seen, kv_head] @ q[token, head].astype(np.float64) / np.sqrt(q.shape[2])
                w = np.exp(s - s.max())
                o[token, head] = w @ vals[seen, kv_head] / w.sum()
                lse[token, head] = s.max() + np.log(w.sum())
            token += 1
    return o, lse


@needs_compiler
@pytest.mark.parametrize("name", VARIANTS)
def test_on_the_cpu(rng, name):
    kv = paged(rng, KV, (16, 2, 32))
    q, indptr = queries(rng, QO, 6, 32)
    values, sees = drawn(rng, name)
    attn = tw.Attention(6, 2, 32, VARIANTS[name])
    state = attn.run(q, kv, attn.plan(indptr, kv), **values)
    wanted = reference.attention(q, kv, indptr, VARIANTS[name], **values)
    o, lse = by_hand(q, kv, sees)
    lse += name == "tree"  # its bias of 1
    for found, error in ((wanted, 1e-12), (state, 3e-6)):
        np.testing.assert_allclose(found.o, o, rtol=error, atol=error)
        np.testing.assert_allclose(found.lse, lse, rtol=error, atol=error)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_gpu(rng, name, kind):
    from tilewright.runtime.cuda import DeviceArray

    kv = paged(rng, KV, (16, 2, 32), TYPES[kind])
    q, indptr = queries(rng, QO, 6, 32, TYPES[kind])
    values, sees = drawn(rng, name)
    attn = tw.Attention(6, 2, 32, VARIANTS[name])
    there = {n: DeviceArray.from_numpy(x.view(np.int32) if x.dtype == np.uint32 else x)
             for n, x in values.items()}  # fmt: skip
    out = DeviceArray.from_numpy(np.full(q.shape, np.nan, np.float32))
    over = on_device(kv)
    state = attn.run(
        DeviceArray.from_numpy(_bits(q), kind), over, attn.plan(indptr, over), out=out, **there
    )
    o, lse = by_hand(q, kv, sees)
    error = 1e-5 if kind == "float32" else 2e-2
    np.testing.assert_allclose(reference.as_float64(state.o), o, rtol=error, atol=error)
    np.testing.assert_allclose(
        reference.as_float64(state.lse), lse + (name == "tree"), rtol=error, atol=error
    )


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("name", VARIANTS)
def test_cubins_without_spills(name):
    kinds = dtypes.bfloat16, dtypes.bfloat16, dtypes.bfloat16
    spec = Spec(4, 128, 128, *kinds, traced_of(VARIANTS[name]), TableForm())
    kernels = (alone(decode.body(spec, 8, 1)), "sm_90a"), (alone(portable.body(spec)), "sm_80")
    for text, arch in kernels:
        assert compile_cuda(text, arch).resources["stage0"].spill_bytes == 0


def test_tiles_of_what_is_loaded_are_partial():
    tile = {"at.qo": Interval.of(90, 99), "at.kv": Interval.of(0, 63)}
    for name, kind in {"documents": 1, "prefix": 2, "images": 2, "tree": 1}.items():
        found = tile_class(traced_of(VARIANTS[name]).mask, tile, {})
        assert int(found) == kind, name
    tile["at.kv"] = Interval.of(128, 191)
    for name, kind in {"documents": 0, "prefix": 1, "images": 1, "tree": 1}.items():
        found = tile_class(traced_of(VARIANTS[name]).mask, tile, {})
        assert int(found) == kind, name


def test_outside_an_array_is_zero(rng):
    """Documents of fewer keys than a request has: those behind are of document 0."""
    kv = paged(rng, [40], (8, 1, 8))
    q, indptr = queries(rng, [1], 1, 8)
    wanted = reference.attention(q, kv, indptr, tw.Causal())
    attn = tw.Attention(1, 1, 8, Documents())
    for width in (5, 0):
        values: dict[str, Any] = {"document": np.zeros((1, width), np.int32)}
        found = reference.attention(q, kv, indptr, Documents(), **values)
        np.testing.assert_allclose(found.o, wanted.o)
        if compilers.has_compiler():
            found = attn.run(q, kv, attn.plan(indptr, kv), **values)
            np.testing.assert_allclose(found.o, wanted.o, rtol=1e-5, atol=1e-6)


def test_arrays_of_a_wrong_form(rng):
    kv = paged(rng, [9, 4], (8, 2, 8))
    q, indptr = queries(rng, [2, 1], 2, 8)

    def refused(code, variant, **values):
        attn = tw.Attention(2, 2, 8, variant)
        with pytest.raises(ArgumentError) as e:
            attn.run(q, kv, attn.plan(indptr, kv), **values)
        assert e.value.code == code and e.value.where in values, str(e.value)

    i32, f32 = np.int32, np.float32
    refused("A103", PrefixLM(), prefix=np.zeros(3, i32))
    refused("A103", PrefixLM(), prefix=np.zeros((2, 1), i32))
    refused("A102", PrefixLM(), prefix=np.zeros(2, f32))
    refused("A107", PrefixLM(), prefix=[1, 2])
    refused("A103", Documents(), document=np.zeros(9, i32))
    refused("A103", Documents(), document=np.zeros((3, 9), i32))
    refused("A104", Documents(), document=np.zeros((2, 18), i32)[:, ::2])
    bias = np.zeros(3, f32)
    refused("A103", Tree(), tree=np.zeros((2, 1), np.uint32), bias=bias)
    refused("A103", Tree(), tree=np.zeros(3, np.uint32), bias=bias)
    refused("A102", Tree(), tree=np.zeros((3, 1), np.int64), bias=bias)
    refused("A103", Tree(), tree=np.zeros((3, 1), i32), bias=np.zeros(2, f32))


def test_reads_of_a_wrong_form():
    def refused(code, declared, index):
        with pytest.raises(ProgramError) as e:
            tw.variant(
                type("Bad", (), {"x": declared, "mask": lambda self, at: self.x[index(at)] > 0})
            )
        assert e.value.code == code, str(e.value)

    refused("P101", tw.per_request(), lambda at: at.qo)
    refused("P101", tw.per_token(), lambda at: at.request)
    refused("P101", tw.per_token(), lambda at: at.q_token + 1)
    refused("P101", tw.per_head(), lambda at: at.request)
    refused("P106", tw.per_key(), lambda at: (at.request, at.key))
    refused("P106", tw.per_key(), lambda at: 1.5)
    refused("P106", tw.bit_mask(), lambda at: at.kv < at.qo)
