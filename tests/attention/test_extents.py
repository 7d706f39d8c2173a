"""Extents: no key that some row sees is missing, sharp for usual masks, alike in C and NumPy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.cases import ALL_VARIANTS, TYPES, paged, queries, spec_of
from tests.attention.test_flash_cuda import _bits, on_device
from tests.attention.test_variant import condition
from tests.attention.twin import Interval, Line, Numbers, visible_tiles

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import extents, plan, planner, ranges, reference, render
from tilewright.attention.families import decode, portable
from tilewright.attention.spec import alone, compile_cuda, template
from tilewright.attention.table import TableForm
from tilewright.attention.tracing import Traced, Value
from tilewright.attention.variant import traced_of
from tilewright.codegen import prelude_files
from tilewright.ir.nodes import Var
from tilewright.toolchain import compilers, cxx, nvrtc

TILE = 8


def mask(hook):
    """The mask of a hook of `at` alone, which may read scalars named w, c and n."""
    names = ("w", "c", "n")
    members = {name: tw.scalar("int32") for name in names}
    cls = type("Mask", (), {"mask": hook} | members)
    return tw.variant(cls).traced.mask


MASKS = {
    "full": (lambda v, at: at.kv >= at.kv, 1),
    "causal": (lambda v, at: at.kv <= at.qo, 1),
    "window": (lambda v, at: (at.kv <= at.qo) & (at.qo - at.kv < v.w), 1),
    "around": (lambda v, at: ~((at.kv > at.qo + 3) | (at.kv + v.w < at.qo)), 1),
    "first and last": (
        lambda v, at: (at.kv < v.n) | (at.kv <= at.qo) & (at.qo - at.kv < v.w), 2,
    ),
    "three": (
        lambda v, at: (
            (at.kv < v.n) | tw.equal(at.key, 3 * v.w) | (at.kv <= at.qo) & (at.kv > at.qo - v.w)
        ), 3,
    ),
    "four": (
        lambda v, at: (
            (at.kv < 3) | tw.equal(at.kv, 9) | tw.equal(at.kv, 19) | tw.equal(at.kv, at.qo)
        ), 1,
    ),
    "chunks": (lambda v, at: tw.equal(at.kv // v.c, at.qo // v.c) & (at.kv <= at.qo), 1),
    "before chunk": (lambda v, at: at.kv // 16 < at.qo // 16, 1),
    "after chunk": (lambda v, at: at.qo // 16 < at.kv // 16, 1),
    "doubled": (lambda v, at: (2 * at.kv - 3 <= at.qo) & (at.qo * 2 - 3 * at.kv < v.w * 4), 1),
    "request": (lambda v, at: tw.equal(at.request, 5) | (at.kv <= at.qo), 2),
    "select": (lambda v, at: tw.where(at.qo < 40, at.kv < 3, at.kv > at.qo), 2),
    "nothing": (lambda v, at: (at.kv <= at.qo) & (at.qo_head < 0), 1),
    "wraps": (lambda v, at: at.kv * 2**30 + at.kv < at.qo, 1),
}  # fmt: skip
SCALARS = {"w": 7, "c": 20, "n": 5}


def numbers(qo, keys, request=0):
    positions = {
        "at.qo": Interval.of(*qo), "at.request": Interval.of(request),
        "at.qo_head": Interval.of(0, 3), "at.kv_head": Interval.of(0),
        "at.kv_len": Interval.of(keys), "at.qo_len": Interval.of(qo[1] - qo[0] + 1),
    }  # fmt: skip
    return Numbers(Interval.of(0, keys - 1), positions, SCALARS)


def seen_by_one(expr, qo, keys, request=0):
    """Whether any row sees each key: the mask at every score."""
    rows = np.arange(qo[0], qo[1] + 1)[:, None]
    places = {
        "at.qo": rows, "at.kv": np.arange(keys)[None], "at.key": np.arange(keys)[None],
        "at.request": request, "at.qo_head": 0, "at.kv_head": 0,
        "at.kv_len": keys, "at.qo_len": len(rows),
    }  # fmt: skip
    found = reference.evaluate(expr, places, SCALARS)
    return np.broadcast_to(found, (len(rows), keys)).any(0)


def solved(expr, qo, keys, request=0):
    """Whether each key is in some range."""
    found = extents.ranges(expr, numbers(qo, keys, request))
    key = np.arange(keys)
    return np.any([(key >= r.lo) & (key <= r.hi) for r in found], 0)


@pytest.mark.parametrize("name", MASKS)
def test_usual_masks(name):
    """No key is missing; none is too much, but for rows of an item that see different keys."""
    hook, count = MASKS[name]
    expr = mask(hook)
    assert len(extents.ranges(expr, numbers((0, 0), 1))) == count
    for keys in (1, 70, 300):
        for first in (-3, 0, 39, 64, 200):
            for more in (0, 5):
                wanted = seen_by_one(expr, (first, first + more), keys)
                found = solved(expr, (first, first + more), keys)
                assert not (wanted & ~found).any()
                if more == 0 and name not in ("four", "wraps"):
                    np.testing.assert_array_equal(found, wanted, (first, keys))


@given(st.integers(0, 2**32), st.integers(-30, 60), st.integers(0, 9), st.integers(1, 70))
@settings(max_examples=400)
def test_no_key_is_missing(seed, first, more, keys):
    expr = condition(np.random.default_rng(seed), 2)
    wanted = seen_by_one(expr, (first, first + more), keys)
    found = solved(expr, (first, first + more), keys)
    assert not (wanted & ~found).any()


def test_numbers_that_wrap():
    """Near the ends of int32 a comparison of sums says nothing, or is right."""
    rng = np.random.default_rng(3)
    hooks = (
        lambda v, at: at.kv - at.qo < v.w,
        lambda v, at: at.qo + at.kv * v.c < 0,
        lambda v, at: at.qo - at.kv * (v.c * v.c) > v.n,
        lambda v, at: (at.kv + v.w) // v.c <= at.qo // v.c,
    )
    for hook in hooks:
        expr = mask(hook)
        for _ in range(200):
            for name in SCALARS:
                SCALARS[name] = int(rng.choice([0, 1, -1, 7, 2**31 - 1, -(2**31), 2**16, -5]))
            first = int(rng.choice([0, 50, -(2**31), 2**31 - 9, -(2**30)]))
            wanted = seen_by_one(expr, (first, first + 3), 50)
            assert not (wanted & ~solved(expr, (first, first + 3), 50)).any()
    SCALARS.update(w=7, c=20, n=5)


def test_tiles_are_counted_once():
    rng = np.random.default_rng(5)
    for _ in range(300):
        keys = int(rng.integers(0, 90))
        ends = [np.sort(rng.integers(-20, 110, 2)) for _ in range(rng.integers(1, 4))]
        if rng.random() < 0.3:
            ends[0] = ends[0][::-1]
        tiles = {k // TILE for lo, hi in ends for k in range(max(lo, 0), min(hi, keys - 1) + 1)}
        found = [Interval.of(lo, hi) for lo, hi in ends]
        assert visible_tiles(found, Interval.of(0, keys - 1), TILE) == len(tiles)


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
def test_the_planner_counts_what_the_twin_counts(rng):
    """Programs of masks, run in C++, against the same ranges over NumPy arrays."""
    last = rng.integers(-300, 900, 200)
    first, keys = last - rng.integers(0, 300, 200), rng.integers(0, 1000, 200)
    drawn = [condition(rng, 3) for _ in range(60)]
    for expr in [*(mask(hook) for hook, _ in MASKS.values()), *drawn]:
        for scalars in (SCALARS, {}):
            shape = planner.Shape("cpu", 2, 3, expr, scalars, 8, "", 0)
            positions = {
                "at.qo": Interval.of(first, last), "at.qo_head": Interval.of(0, 5),
                "at.kv_head": Interval.of(0, 1), "at.kv_len": Interval.of(keys),
            }  # fmt: skip
            key = Interval.of(0, keys - 1)
            found = extents.ranges(expr, Numbers(key, positions, scalars))
            wanted = visible_tiles(found, key, ranges.TILE)
            np.testing.assert_array_equal(planner.visible_tiles(first, last, keys, shape), wanted)


def test_the_planner_counts_what_is_visible():
    shape = plan.Shape(
        "cpu", 2, 2, traced_of(tw.SlidingWindow()).mask, {"window": 1024}, 8, "request", False
    )
    length = np.array([2**31 - 200, 131_072, 100, 0])
    count = planner.visible_tiles(length - 1, length - 1, length, shape)
    np.testing.assert_array_equal(count <= [17, 17, 2, 0], True)
    np.testing.assert_array_equal(count >= [16, 16, 2, 0], True)
    long = np.array([131_072])
    cuts = plan.make(np.array([0, 1]), long, shape, 1)
    assert cuts.items["chunks"].max() == 2  # of 16 tiles, not of 2048
    shape = plan.Shape("decode", 8, 2, shape.mask, shape.values, 8, "", True)
    cuts = plan.make(np.array([0, 1]), long, shape, 132).cuts
    assert len(cuts) - 1 == 17 - (length[1] % 64 == 0) and cuts["tile"].max() == len(cuts) - 2


def test_the_most_that_is_visible_at_any_length():
    def most(hook, queries, **values):
        return plan.Shape("decode", 2, 2, mask(hook), values, queries, "", True).most_tiles

    window, chunks = MASKS["window"][0], MASKS["chunks"][0]
    assert most(window, 1, w=64) == 2 and most(window, 1, w=65) == 2 and most(window, 1, w=66) == 3
    assert most(window, 4, w=64) == 3 and most(window, 1, w=0) == 1
    assert most(window, 1) == most(lambda v, at: at.kv <= at.qo, 1) == 2**25 - 2
    assert 120 <= most(chunks, 1, c=8192) <= 128


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("positions", [False, True])
def test_the_tiles_of_the_kernels(rng, positions):
    """kernels/variant.h lists the tiles that the ranges of extents.py touch, in order."""
    masks = [(name, mask(hook)) for name, (hook, _) in MASKS.items()]
    masks += [(f"random {n}", condition(rng, 2)) for n in range(30)]
    values = tuple(Value(n, dtypes.int32) for n in SCALARS)
    form = (
        TableForm(qo_base="int32", kv_base="int32", kv_stride="int32") if positions else TableForm()
    )
    fields = "".join(f"const int32_t* v_{n}; " for n in SCALARS)
    text = [
        prelude_files.prelude("cpu.h"), "#define TW_METHOD inline __attribute__((always_inline))",
        "struct At { int32_t qo, qo_head, kv_head, request, q_token, qo_len, kv_len; };",
        form.c_text(), *map(template, ("bounds.h", "table.h", "variant.h")),
        f"struct Params {{ {fields} }};",
    ]  # fmt: skip
    for n, (_, expr) in enumerate(masks):
        traced = Traced("x", Var("s", dtypes.float32), expr, values)
        text.append(render.cpp_variant(traced, 8).replace("Variant", f"Variant{n}"))
    branches = "".join(
        f"if (n == {n}) {{ auto tiles = tw::tiles_seen<{TILE}>(Variant{n}(p), tile, pages);"
        "  for (int i = 0; i < tiles.count(); ++i) out[i] = tiles.at(i); return tiles.count(); }\n"
        for n in range(len(masks))
    )
    text.append(f"""
extern "C" __attribute__((visibility("default")))
int tiles(int n, const Params* at, int64_t a, int64_t b, int length, int base, int stride,
          int* out) {{
  const Params& p = *at;
  const tw::Pages pages{{0, 0, length, base, stride}};
  const tw::Tile tile{{{{a, b}}, {{}}, {{0, 3}}, {{0, 0}}, {{0, 0}}, {{}},
                      tw::bound(b - a + 1), tw::bound(length)}};
  {branches}
  return -1;
}}""")
    tiles = cxx.load(cxx.compile_cpp("\n".join(text))).tiles
    i64 = ctypes.c_int64
    tiles.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        i64,
        i64,
        *(ctypes.c_int,) * 3,
        ctypes.c_void_p,
    ]
    scalars = np.array(list(SCALARS.values()), np.int32)
    params = np.array([scalars.ctypes.data + 4 * n for n in range(len(scalars))])
    out = np.empty(100, np.int32)
    for n, (name, expr) in enumerate(masks):
        for _ in range(30):
            a, length = int(rng.integers(-20, 90)), int(rng.integers(0, 200))
            b = a + int(rng.integers(0, 9))
            base, stride = (
                (int(rng.integers(-30, 60)), int(rng.integers(1, 4))) if positions else (0, 1)
            )
            count = tiles(n, params.ctypes.data, a, b, length, base, stride, out.ctypes.data)
            ops = numbers((a, b), length)
            ops.kv = Line(stride, Interval.of(base), 1, True)
            wanted = set()
            for r in extents.ranges(expr, ops):
                wanted |= {k // TILE for k in range(max(r.lo, 0), min(r.hi, length - 1) + 1)}
            assert out[:count].tolist() == sorted(wanted), (name, a, b, length)


@tw.variant
class FirstAndLast(tw.SlidingWindow):
    first = tw.scalar("int32", 4)

    def mask(self, at):
        return super().mask(at) | (at.kv < self.first) & (at.kv <= at.qo)


@tw.variant
class Three(FirstAndLast):
    def mask(self, at):
        return super().mask(at) | tw.equal(at.kv // 100, at.qo // 200)


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("cls", [FirstAndLast, Three])
def test_cubins_without_spills(cls, arch):
    spec = spec_of(
        4, 128, "bfloat16", "bfloat16", cls, kv_base="int32", kv_stride="int32", qo_base="int32"
    )
    for text in (alone(decode.body(spec, 8, 1)), alone(portable.body(spec))):
        assert compile_cuda(text, arch).resources["stage0"].spill_bytes == 0


LENGTHS = [0, 3, 64, 65, 1000, 2111, 5000, 20_000]


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("cls", [FirstAndLast, Three])
@pytest.mark.parametrize("queries_of_each", [1, 3])
def test_on_the_cpu(rng, cls, queries_of_each):
    kv = paged(rng, LENGTHS, (16, 2, 16))
    q, indptr = queries(rng, [queries_of_each] * len(LENGTHS), 4, 16)
    attn = tw.Attention(4, 2, 16, cls(window=1300))
    found = attn.run(q, kv, attn.plan(indptr, kv))
    wanted = reference.attention(q, kv, indptr, attn.variant)
    np.testing.assert_allclose(found.o, wanted.o, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(found.lse, wanted.lse, rtol=3e-6, atol=3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("cls", [FirstAndLast, Three, tw.SlidingWindow])
@pytest.mark.parametrize("workers", [1, 3, None])
def test_on_a_gpu(rng, kind, cls, workers):
    from tilewright.runtime.cuda import DeviceArray

    kv = paged(rng, LENGTHS, (16, 2, 16), TYPES[kind])
    q, indptr = queries(rng, [1] * len(LENGTHS), 4, 16, TYPES[kind])
    attn, over = tw.Attention(4, 2, 16, cls(window=1300)), on_device(kv)
    out = DeviceArray.from_numpy(np.full(q.shape, np.nan, np.float32))
    there = attn.plan(indptr, over, workers=workers)
    found = attn.run(DeviceArray.from_numpy(_bits(q), kind), over, there, out=out)
    wanted = reference.attention(q, kv, indptr, attn.variant)
    error = 1e-5 if kind == "float32" else 2e-2
    np.testing.assert_allclose(reference.as_float64(found.o), wanted.o, rtol=error, atol=error)
    np.testing.assert_allclose(reference.as_float64(found.lse), wanted.lse, rtol=error, atol=error)


def test_presets_have_one_range():
    for name, variant in ALL_VARIANTS.items():
        count = len(extents.cases(traced_of(variant).mask))
        assert count == (2 if name == "strange" else 1), name
