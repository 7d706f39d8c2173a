"""The Hopper kernel's narrow items on simulated warps, against the oracle, without a GPU: its own
scheduler, loaders, consumers and merges, with boxes that arrive in any order."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention import oracle, simulated
from tests.attention.oracle import Case
from tests.attention.test_cascade import cascade, close

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import plan as plans
from tilewright.attention.families import hopper
from tilewright.attention.spec import Spec, alone
from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
BFLOAT16 = ml_dtypes.bfloat16
CASES = [  # shape (as for `cascade`), queries and keys of each request, page size, SMs
    ((4, 2, 128, BFLOAT16, "causal", "scores", ""), [1, 2, 0, 1, 1], [130, 7, 40, 0, 600], 16, 6),
    ((8, 1, 128, np.float16, "window", "scores", "per head"), [1, 1, 1], [900, 33, 1], 8, 132),
    ((3, 2, 96, BFLOAT16, "full", "alibi", ""), [2, 1, 1, 2], [129, 127, 128, 2], 64, 3),
    ((1, 1, 128, BFLOAT16, "causal", "scores", ""), [8, 5, 1], [2100, 3, 260], 32, 40),
    ((2, 1, 128, np.float16, "causal", "scores", ""), [1, 3], [5003, 4200], 128, 1),  # segments
    ((4, 2, 128, BFLOAT16, "window", "scores", ""), [1, 2, 0, 1], [130, 7, 40, 600], 1, 6),
    ((2, 1, 96, np.float16, "causal", "alibi", ""), [1, 3, 4], [2100, 33, 260], 4, 40),
]


def tensor_map(pointer: int, dtype: Any, shape: Any, strides: Any, box: Any) -> list[int]:
    """What `Map` of warps_hopper.h reads."""
    pad = 4 - len(shape)
    words = [pointer, *shape, *[1] * pad, 1, *strides, *[0] * pad, *box, *[1] * pad]
    return [*words, *[0] * (16 - len(words))]


def result(case: Case, page_size: int, workers: int, seed: int) -> tuple[Any, Any, tw.Plan]:
    """o and lse of the kernel, and its plan, all of whose items are narrow."""
    attn, table = oracle.attention_of(case), oracle.table_of(case)
    kv = tw.KV(table, tw.Pool(case.k, case.v))
    traced, kind = attn.variant.traced, dtypes.ALL[case.q.dtype.name]
    out = dtypes.ALL["float32"]
    spec = Spec(attn.group, *case.dims, kind, kind, out, traced, table.form)
    known = {n: x for n, x in attn.variant.fixed if np.isscalar(x)}
    shape = plans.Shape("hopper", attn.kv_heads, attn.group, traced.mask, known,
                        hopper.FAMILY.qo_tile(spec), "batch", 0, hopper.order,
                        few=hopper.FAMILY.few(spec))  # fmt: skip
    plan = plans.make(case.qo_indptr, kv.lengths(), shape, workers)
    box = hopper.box_keys(spec, page_size)
    wide, narrow = hopper._lists(spec, plan)
    assert wide == 0 and narrow == plan.narrow > 0
    o, lse, numbers, _kept = simulated.arguments(case, attn, kv, plan.tokens)
    partials = np.full(max(plan.slots, 1) * 128 * (case.dims[1] + 8), np.nan, np.float32)
    counters = np.zeros(2 + 8 * plan.counters, np.int32)
    struct = hopper.params_struct(spec)
    padding = {f.name: [0] * f.count for f in struct.fields if f.name == "padding"}
    block = struct.pack(
        **numbers, **hopper.maps(spec, numbers, plan.tokens), **padding, cycles=0,
        qo_indptr=plan.qo_indptr.ctypes.data, items=plan.items.ctypes.data, item_count=wide,
        counter=counters.ctypes.data, counters=counters.ctypes.data + 8, narrow_ctas=narrow,
        narrow_count=len(plan.items), partials=partials.ctypes.data,
        page_shift=page_size.bit_length() - 1, ctas=narrow,
    )  # fmt: skip
    room = np.zeros(len(bytes(block)) + 64, np.uint8)  # the parameters are aligned to 64 bytes
    at = -room.ctypes.data % 64
    room[at : at + len(bytes(block))] = np.frombuffer(bytes(block), np.uint8)
    run = simulated.kernel(alone(hopper.body(spec, box, plan.slots > 0, True)))
    simulated.launch(run, room.ctypes.data + at, hopper.threads(spec, box), narrow, seed,
                     (o, lse, partials, counters))  # fmt: skip
    assert not counters.any()
    return o, lse, plan


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[0][:3])))
def test_narrow_items(rng, monkeypatch, case):
    """Right, and the same bits whatever arrives first; chunks among them."""
    monkeypatch.setattr(hopper, "tensor_map", tensor_map)
    tiles = dataclasses.replace(hopper.TILES[128, 128], segment=32)  # of 40 and 33 tiles
    if case[-1] == 1:
        hopper.body.cache_clear()
        monkeypatch.setitem(hopper.TILES, (128, 128), tiles)
    shape, counts, lengths, page_size, workers = case
    drawn = cascade(rng, shape, counts, [], lengths, page_size)
    first, lse, plan = result(drawn, page_size, workers, 0)
    close(drawn, first, lse, str(plan))
    assert (plan.slots > 0) == (workers > 6 and shape[4] != "window")
    again = result(drawn, page_size, workers, 1)[0]
    assert np.array_equal(first.view(np.uint32), again.view(np.uint32))
    hopper.body.cache_clear()
