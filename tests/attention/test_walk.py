"""The walk of the decode kernel over units and tiles, compiled for the host from its own text."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from tests.attention.cases import spec_of
from tests.attention.oracle import draw_levels
from tests.attention.test_extents import FirstAndLast, Three
from tests.attention.twin import Interval, Numbers

import tilewright as tw
from tilewright.attention import extents, plan, ranges, render
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


def compiled(variant, shared=0):
    """A function that writes (node, first row of q, rows, head, tile) of each step of a CTA, the
    node that has the tile; -1 as the tile where a unit ends, with the node of the unit."""
    spec = spec_of(GROUP, 64, "float16", "float16", variant, table_indptr="", shared=shared)
    together = ranges.head_block(KV_HEADS)
    numbers = {
        "G": GROUP, "HEAD_BLOCK": together, "TILE": TILE, "MAX_KEYS": MAX_KEYS,
        "LEVELS": shared + 1, "ROWS": ranges.ROWS, "TOKENS": ranges.ROWS // GROUP,
        "ALONE": decode.ALONE, "BEHIND": decode.BEHIND, "FRONT": decode.FRONT,
        "KIND": decode.BEHIND,
    }  # fmt: skip
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
            "}",
            "static unsigned __ballot_sync(unsigned, bool x) { return x; }",
            "static int __popc(unsigned x) { return __builtin_popcount(x); }",
            template("shared_items.cuh").replace("#pragma once", ""),
            template("decode_walk.cuh"),
            """
extern "C" __attribute__((visibility("default")))
int steps(const Params* at, int cta, int* out) {
  using namespace attention;
  const Params& p = *at;
  const Variant variant(p);
  const Range range = range_of(p, cta);
  Walk w = start(p, variant, range, cta % HEAD_BLOCK);
  int n = 0;
  auto step = [&](int node, int tile) {
    const int now[5] = {node, w.token, w.rows, w.head, tile};
    for (int i = 0; i < 5; ++i) out[5 * n + i] = now[i];
    ++n;
  };
  while (in_range(w, range)) {
    for (; w.tile < w.end; ++w.tile) step(w.piece, w.seen.at(w.tile));
    if (has_piece(w, range)) {
      next_piece(w, p, variant, range);
      continue;
    }
    step(w.node, -1);
    next_unit(w, p, variant, range, cta % HEAD_BLOCK);
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
    ops = Numbers(Interval.of(0, length - 1), positions, values)
    found = set()
    for r in extents.ranges(variant.traced.mask, ops):
        found |= set(range(max(int(r.lo), 0) // TILE, min(int(r.hi), length - 1) // TILE + 1))
    return found if length else set()


def walked(compiled, lengths, indptr, cuts, kept, **more):
    """The tiles of each (node, first row, rows, head), and how often each ended."""
    struct, steps = compiled
    fields = dict.fromkeys((f.name for f in struct.fields), 0)
    fields |= {n: x.ctypes.data for n, x in kept.items()}
    fields |= {
        "kv_len": lengths.ctypes.data, "cuts": cuts.ctypes.data, "pages": 1 << 20,
        "table_limit": len(lengths), "table_width": 2000, "table_stride": 2000, "page_size": 16,
        "kv_heads": KV_HEADS, "qo_heads": KV_HEADS * GROUP, "sm_scale": 1.0,
        "qo_indptr": 0 if indptr is None else indptr.ctypes.data,
    }  # fmt: skip
    block = struct.pack(**fields | more)
    out = np.empty(5 * 400_000, np.int32)
    seen, ended = {}, {}
    for cta in range((len(cuts) - 1) * ranges.head_block(KV_HEADS)):
        count = steps(ctypes.addressof(block), cta, out.ctypes.data)
        assert count >= 0
        for *unit, tile in out[: 5 * count].reshape(-1, 5).tolist():
            if tile < 0:
                ended[tuple(unit)] = ended.get(tuple(unit), 0) + 1
            else:
                seen.setdefault(tuple(unit), []).append(tile)
    return seen, ended


@pytest.mark.parametrize("name", VARIANTS)
def test_every_visible_tile_is_visited_once(rng, name):
    """By cuts of the lengths as they are, as they were, and of a planner that counts too much."""
    variant, values = VARIANTS[name], SCALARS[name]
    walk = compiled(variant)
    shape = plan.Shape("decode", KV_HEADS, GROUP, variant.traced.mask, values, 8, "", True)
    kept = {f"v_{n}": np.array([x], np.int32) for n, x in values.items()}
    for queries in (None, [1, 3, 0, 2, 1, 1, 1]):
        lengths = np.array([5000, 64, 0, 20_000, 1, 700, 129], np.int32)
        counts = np.array(queries or [1] * 7)
        indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
        for planned in (lengths, lengths // 3, lengths * 2 + 900):
            made = plan.make(indptr, planned.astype(np.int64), shape, 20).cuts
            for cuts in (made, ranges.cut(planned, KV_HEADS, 40)):
                seen, ended = walked(walk, lengths, indptr if queries else None, cuts, kept)
                for r in range(7):
                    wanted = sorted(visible(variant, values, int(lengths[r]), int(counts[r])))
                    for h in range(KV_HEADS):
                        unit = (r, int(indptr[r]), int(counts[r]) * GROUP, h)
                        assert seen.get(unit, []) == wanted, unit
                        assert ended[unit] >= 1


@pytest.mark.parametrize("depth", [1, 3])
def test_units_of_shared_keys_are_walked_once(rng, monkeypatch, depth):
    """Every row of q meets every tile of each of its nodes that no launch in front does once; that
    does all, none and those that the plan chooses."""
    walk, seen_flat = compiled(tw.Causal(), depth), 0
    shape = plan.Shape("decode", KV_HEADS, GROUP, tw.Causal().traced.mask, {}, 8, "", 1)
    for case in range(12):
        monkeypatch.setattr(ranges, "APART_COST", (20, -(1 << 30), 1 << 30)[case % 3])
        requests = int(rng.integers(0, 90)) if case else 0
        counts = rng.integers(0, 9, requests) if rng.random() < 0.5 else np.ones(requests, int)
        shared = draw_levels(rng, requests, depth)
        nodes = requests + sum(len(x) - 1 for x in shared)
        lengths = (rng.integers(0, 900, nodes) * rng.integers(0, 2, nodes)).astype(np.int32)
        table = tw.Table.dense(lengths, shared=shared)
        tree, indptr = table.tree(lengths), np.append(0, np.cumsum(counts)).astype(np.int32)
        for workers in (1, 20, 132):
            made = plan.make(indptr, lengths.astype(np.int64), shape, workers, tree)
            again = plan.Plan.load(made.save())
            assert again == made
            one_each = bool((counts == 1).all())
            seen, ended = walked(
                walk, lengths, None if one_each else indptr, made.cuts, {},
                nodes=made.nodes.ctypes.data, shared_nodes=nodes - requests,
            )  # fmt: skip
            ends = np.zeros((int(indptr[-1]), KV_HEADS), int)
            for (node, token, rows, head), count in ended.items():
                assert rows > 0 and count >= 1 and node >= nodes - requests
                ends[token : token + rows // GROUP, head] += 1
                of_request = (tree["begin"] <= node - nodes + requests) & (
                    node - nodes + requests < tree["end"]
                )
                for at in np.flatnonzero(of_request):
                    tiles = seen.get((int(at), token, rows, head), [])
                    whole = made.nodes["chunks"][at] == 0
                    assert tiles == list(range(-(-int(lengths[at]) // TILE) * whole))
                    seen_flat += whole and at != node
            assert (ends == 1).all()
    assert seen_flat
