"""The walk of the decode kernel over units and tiles, compiled for the host from its own text."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from tests.attention.cases import spec_of
from tests.attention.test_extents import FirstAndLast, Three

import tilewright as tw
from tilewright.attention import extents, plan, planner, ranges, render
from tilewright.attention.bounds import Interval
from tilewright.attention.families import decode
from tilewright.attention.spec import template
from tilewright.attention.table import MAX_KEYS
from tilewright.codegen import prelude_files
from tilewright.toolchain import compilers, cxx

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
GROUP, KV_HEADS, TILE = 2, 12, ranges.TILE
VARIANTS = {
    "causal": tw.Causal(), "window": tw.SlidingWindow(window=1000),
    "two ranges": FirstAndLast(window=700), "three ranges": Three(window=150),
}  # fmt: skip
SCALARS = {"window": {"window": 1000}, "two ranges": {"window": 700, "first": 4},
           "three ranges": {"window": 150, "first": 4}, "causal": {}}  # fmt: skip


def compiled(variant):
    """A function that writes (request, head, tile) of each step of a CTA, -1 where a unit ends."""
    spec = spec_of(GROUP, 64, "float16", "float16", variant, table_indptr="")
    text = template("decode.cuh")
    walk = text[text.index("// Walks the tiles") : text.index("// Issues the copies")]
    together = ranges.heads_at_once(KV_HEADS)
    numbers = {"G": GROUP, "GANG": together, "TILE": TILE, "MAX_KEYS": MAX_KEYS}
    source = "\n".join(
        (
            prelude_files.prelude("cpu.h"),
            "#define TW_METHOD inline __attribute__((always_inline))",
            "struct At { int32_t qo, qo_head, kv_head, request, q_token, qo_len, kv_len; };",
            spec.table.c_text(),
            *map(template, ("bounds.h", "table.h", "variant.h")),
            ranges.CUT.c_decl,
            decode.params_struct(spec).c_decl,
            render.cpp_variant(spec.traced, 8),
            "namespace attention {",
            *(f"constexpr int {name} = {value};" for name, value in numbers.items()),
            walk,
            "}",
            """
extern "C" __attribute__((visibility("default")))
int steps(const Params* at, int cta, int* out) {
  using namespace attention;
  const Params& p = *at;
  const Variant variant(p);
  const Range range{p.cuts[cta / GANG], p.cuts[cta / GANG + 1]};
  const int head = range.begin.group * GANG + cta % GANG;
  Walk w{range.begin.unit, range.begin.request, head, range.begin.tile, 0, {}, {}};
  if (!has_unit(w, range)) return 0;
  w.keys = tw::pages_of(p, w.request, MAX_KEYS);
  attention::bound(w, p, variant, range);
  int n = 0;
  while (has_unit(w, range)) {
    for (; w.tile < w.end; ++w.tile, ++n) {
      out[3 * n] = w.request, out[3 * n + 1] = w.head, out[3 * n + 2] = w.seen.at(w.tile);
    }
    out[3 * n] = w.request, out[3 * n + 1] = w.head, out[3 * n + 2] = -1;
    ++n;
    next_unit(w, p, variant, range);
  }
  return n;
}""",
        )
    )
    steps = cxx.load(cxx.compile_cpp(source)).steps
    steps.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return decode.params_struct(spec), steps


def visible(variant, values, length, queries):
    """The tiles that the queries at the end of a request can see."""
    positions = {"at.qo": Interval.of(length - queries, length - 1)}
    ops = extents.Numbers(Interval.of(0, length - 1), positions, values)
    found = set()
    for r in extents.ranges(variant.traced.mask, ops):
        found |= set(range(max(int(r.lo), 0) // TILE, min(int(r.hi), length - 1) // TILE + 1))
    return found if length else set()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_visible_tile_is_visited_once(rng, name):
    """By cuts of the lengths as they are, as they were, and of a planner that counts too much."""
    variant, values = VARIANTS[name], SCALARS[name]
    struct, steps = compiled(variant)
    together = ranges.heads_at_once(KV_HEADS)
    shape = plan.Shape("decode", KV_HEADS, GROUP, variant.traced.mask, values, 8, "", True)
    out = np.empty(3 * 200_000, np.int32)
    kept = {f"v_{n}": np.array([x], np.int32) for n, x in values.items()}
    for queries in (None, [1, 3, 0, 2, 1, 1, 1]):
        lengths = np.array([5000, 64, 0, 20_000, 1, 700, 129], np.int32)
        counts = np.array(queries or [1] * 7)
        indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
        for planned in (lengths, lengths // 3, lengths * 2 + 900):
            made = plan.make(indptr, planned.astype(np.int64), shape, 20).cuts
            for cuts in (made, planner.cut(planned, KV_HEADS, 40)):
                fields = dict.fromkeys((f.name for f in struct.fields), 0)
                fields |= {n: x.ctypes.data for n, x in kept.items()}
                fields |= {
                    "kv_len": lengths.ctypes.data, "cuts": cuts.ctypes.data, "pages": 1 << 20,
                    "table_limit": 7, "table_width": 2000, "table_stride": 2000, "page_size": 16,
                    "kv_heads": KV_HEADS, "qo_heads": KV_HEADS * GROUP, "sm_scale": 1.0,
                    "qo_indptr": indptr.ctypes.data if queries else 0,
                }  # fmt: skip
                block = struct.pack(**fields)
                seen = {(r, h): [] for r in range(7) for h in range(KV_HEADS)}
                ended = dict.fromkeys(seen, 0)
                for cta in range((len(cuts) - 1) * together):
                    count = steps(ctypes.addressof(block), cta, out.ctypes.data)
                    for r, h, tile in out[: 3 * count].reshape(-1, 3).tolist():
                        if tile < 0:
                            ended[r, h] += 1
                        else:
                            seen[r, h].append(tile)
                for (r, h), tiles in seen.items():
                    wanted = visible(variant, values, int(lengths[r]), int(counts[r]))
                    assert tiles == sorted(wanted), (r, h)
                    assert ended[r, h] >= 1
