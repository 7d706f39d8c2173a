"""The Hopper family on shapes that break protocols: nothing to see, one key, ends of pages, odd
strides, segments, first tiles of which a half is unseen; and masks that read tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.attention.cases import ALL_VARIANTS, TYPES, arrays_of, csr, paged, queries, values_of
from tests.attention.test_flash_cuda import _bits
from tests.attention.test_hopper_cuda import card, close, ragged, to_card

import tilewright as tw
from tilewright.attention import reference
from tilewright.attention.batch import Attention
from tilewright.attention.families import hopper
from tilewright.attention.kv import KV
from tilewright.attention.merge import State

__all__ = ["card"]


@tw.variant
class Ahead:
    """Keys far behind the query: most rows see none, most items no tile."""

    def mask(self, at):
        return at.kv > at.qo + 150


@tw.variant
class Document(tw.Causal):
    document = tw.per_key()

    def mask(self, at):
        return super().mask(at) & tw.equal(self.document[at.key], self.document[at.qo])


@tw.variant
class Packed:
    """Drafts see all keys before them and their ancestors, by the bits of their row."""

    tree = tw.bit_mask()

    def mask(self, at):
        first = at.kv_len - at.qo_len
        return (at.key < first) | self.tree[at.key - first]


class Strided:
    """float16 in GPU memory under any strides, `at` elements behind the array's start."""

    def __init__(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...], at: int):
        self.array, self.shape, self.at = array, shape, 2 * at
        self.strides = tuple(2 * n for n in strides)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.array.pointer + self.at, False)
        return {
            "shape": self.shape,
            "strides": self.strides,
            "typestr": "<f2",
            "data": data,
            "version": 3,
        }


def there(x: np.ndarray) -> Any:
    from tilewright.runtime.cuda import DeviceArray

    return DeviceArray.from_numpy(_bits(x), x.dtype.name)


def check(attn: Attention, q: np.ndarray, indptr: np.ndarray, kv: KV, wanted: State, **values: Any):
    """The right result, three times the same bits; o is poisoned."""
    out = np.full((*q.shape[:2], kv.pool.v.shape[-1]), np.nan, q.dtype)
    plan = attn.plan(indptr, kv)
    on_card = {name: there(x) for name, x in values.items()}
    first = None
    for _ in range(3):
        o = there(out)
        bound = attn.bind(there(q), kv, o, plan=plan, **on_card)
        assert "prefill_hopper.cuh" in bound.source
        found = reference.as_float64(bound().o)
        first = found if first is None else first
        np.testing.assert_array_equal(found, first)
        close(found, reference.as_float64(bound.state.lse), wanted)


DIMS = [(128, 128), (64, 64), (192, 128), (256, 256), (96, 96)]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("page_size", [0, 1, 16])
def test_nothing_to_see_and_one_key(card, rng, dims, page_size):
    lengths = [(1, 1), (40, 1), (1, 0), (300, 0), (129, 128), (2, 257), (70, 500), (0, 3)]
    shape = (page_size, 2, dims[0])
    for variant in (Ahead(), tw.Causal()):
        attn = Attention(8, 2, dims[0], variant, head_dim_vo=dims[1])
        keys = [n for _, n in lengths]
        if page_size:
            kv = paged(rng, keys, shape, TYPES["bfloat16"])
        else:
            kv = ragged(rng, keys, *shape[1:], TYPES["bfloat16"])
        k, v = kv.pool.arrays
        kv = KV(kv.table, type(kv.pool)(k, np.ascontiguousarray(v[..., : dims[1]])))
        q, indptr = queries(rng, [n for n, _ in lengths], 8, dims[0], TYPES["bfloat16"])
        wanted = reference.attention(q, kv, indptr, attn.variant)
        check(attn, q, indptr, to_card(kv), wanted)


FEW = [  # group, kv_heads, head_dim, dtype, variant, page_size (0: ragged), dtype of o
    (4, 2, 128, "bfloat16", "causal", 16, "bfloat16"),
    (8, 1, 128, "float16", "window", 64, "float16"),
    (1, 3, 96, "float16", "softcap_alibi", 8, "float32"),
    (3, 2, 128, "bfloat16", "full", 0, "bfloat16"),
    (2, 2, 128, "bfloat16", "strange", 256, "float32"),
    (4, 1, 96, "bfloat16", "softcap", 128, "bfloat16"),
    (4, 2, 128, "float16", "alibi", 1, "float16"),
    (4, 2, 96, "bfloat16", "window", 2, "bfloat16"),
    (1, 2, 64, "bfloat16", "causal", 16, "bfloat16"),  # one list: tiles are shorter
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", FEW, ids=lambda c: "-".join(map(str, c)))
def test_few_rows_beside_many(card, rng, case):
    """Requests of up to 8 packed rows have a list of their own; a long one comes in chunks."""
    group, kv_heads, dim, kind, name, page_size, out = case
    lengths = [(200, 700), (1, 0), (1, 1), (1, 127), (2, 129), (1, 3000), (130, 130)]
    lengths += [(1, 20011), (8 // group, 1000), (3, 2), (0, 5), (40, 40), (1, 128)]
    keys = [n for _, n in lengths]
    attn = Attention(group * kv_heads, kv_heads, dim, ALL_VARIANTS[name])
    if page_size:
        kv = paged(rng, keys, (page_size, kv_heads, dim), TYPES[kind])
    else:
        kv = ragged(rng, keys, kv_heads, dim, TYPES[kind])
    q, indptr = queries(rng, [n for n, _ in lengths], group * kv_heads, dim, TYPES[kind])
    values = values_of(rng, attn.variant, group * kv_heads, kv_heads)
    wanted = reference.attention(q, kv, indptr, attn.variant, **values)
    kv, values = to_card(kv), {name: there(x) for name, x in values.items()}
    plan, first = attn.plan(indptr, kv), None
    hosts = dim > 64
    assert (plan.narrow > 0) == hosts and (plan.slots > 0) == (name != "window")
    for _ in range(3):
        o = there(np.full(q.shape, np.nan, TYPES[out]))
        bound = attn.bind(there(q), kv, o, plan=plan, **values)
        assert ("NARROW = 1;" in bound.source) == hosts
        found = reference.as_float64(bound().o)
        first = found if first is None else first
        np.testing.assert_array_equal(found, first)
        close(found, reference.as_float64(bound.state.lse), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 64])
def test_odd_strides_of_pages(card, rng, page_size):
    """A cache whose rows and heads lie apart; lengths end at, before and behind ends of pages."""
    heads, dim = 3, 128
    lengths = [page_size, page_size + 1, 3 * page_size - 1, 128, 129, 127, 700, 1]
    kv = paged(rng, lengths, (page_size, heads, dim), np.float16)
    q, indptr = queries(rng, [1, 2, 1, 128, 129, 127, 300, 1], 6, dim, np.float16)
    attn = Attention(6, heads, dim, tw.Causal())
    wanted = reference.attention(q, kv, indptr, attn.variant)
    arrays = []
    for x in kv.pool.arrays:
        wide = np.full((len(x), page_size + 1, heads + 2, dim + 8), np.nan, np.float16)
        wide[:, 1:, 1:-1, 8:] = x
        strides = [n // 2 for n in wide.strides]
        arrays.append(Strided(there(wide), x.shape, tuple(strides), strides[1] + strides[2] + 8))
    kv_len, table, names = (there(x) for x in arrays_of(kv)[2:])
    k, v = arrays
    check(attn, q, indptr, csr(k, v, table, names, kv_len), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_every_length_of_a_first_tile(card, rng, dims, out):
    """Items whose last queries see any number of keys of their first tile, behind caches too."""
    sizes = [(n, n) for n in range(1, 200, 9)] + [(n, 3 * n + 40) for n in range(2, 160, 13)]
    group = 4 if out == "bfloat16" else 3
    attn = Attention(group, 1, dims[0], tw.SlidingWindow(window=90), head_dim_vo=dims[1])
    kv = ragged(rng, [n for _, n in sizes], 1, dims[0], TYPES["bfloat16"])
    k, v = kv.pool.arrays
    kv = KV(kv.table, type(kv.pool)(k, np.ascontiguousarray(v[..., : dims[1]])))
    q, indptr = queries(rng, [n for n, _ in sizes], group, dims[0], TYPES["bfloat16"])
    wanted = reference.attention(q, kv, indptr, attn.variant)
    o = there(np.full((*q.shape[:2], dims[1]), np.nan, TYPES[out]))
    kv = to_card(kv)
    bound = attn.bind(there(q), kv, o, plan=attn.plan(indptr, kv))
    assert "prefill_hopper.cuh" in bound.source
    for _ in range(2):
        close(reference.as_float64(bound().o), reference.as_float64(bound.state.lse), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("kind", ["sorted", "mixed", "narrow", "tree"])
def test_masks_that_read_tensors(card, rng, kind, page_size):
    """Documents one after the other, in disorder, and of fewer keys than requests have; trees."""
    keys = [900, 1, 513, 130, 0, 400]
    tokens = [124, 1, 100, 97, 2, 128] if kind == "tree" else [900, 1, 500, 130, 2, 64]
    kv = (
        paged(rng, keys, (page_size, 2, 128), np.float16)
        if page_size
        else ragged(rng, keys, 2, 128, np.float16)
    )
    q, indptr = queries(rng, tokens, 8, 128, np.float16)
    values: dict[str, Any]
    if kind == "tree":
        values = {"tree": rng.integers(0, 2**32, (len(q), 4), np.uint32)}
    else:
        document = rng.integers(0, 6, (len(keys), 200 if kind == "narrow" else max(keys)))
        values = {"document": (document if kind == "mixed" else np.sort(document, 1)).astype("i4")}
    attn = Attention(8, 2, 128, Packed() if kind == "tree" else Document())
    wanted = reference.attention(q, kv, indptr, attn.variant, **values)
    check(attn, q, indptr, to_card(kv), wanted, **values)


@pytest.mark.gpu
def test_segments_whose_first_sees_nothing(card, rng):
    """Keys of more than a segment's tiles, of which a window leaves the last; and all of them."""
    keys = hopper.TILES[128, 128].segment * hopper.TILES[128, 128].keys + 300
    kv = ragged(rng, [keys, 9], 1, 128, np.float16)
    q, indptr = queries(rng, [40, 40], 1, 128, np.float16)
    for variant in (tw.SlidingWindow(window=200), tw.Full()):
        attn = Attention(1, 1, 128, variant)
        wanted = reference.attention(q, kv, indptr, attn.variant)
        check(attn, q, indptr, to_card(kv), wanted)
