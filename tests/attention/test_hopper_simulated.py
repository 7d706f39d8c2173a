"""The Hopper kernel's narrow items on simulated warps, against the oracle, without a GPU: its own
scheduler, loaders, consumers and merges, with boxes that arrive in any order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
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
from tilewright.attention.plan import ITEM
from tilewright.attention.spec import Spec, alone
from tilewright.ir.body import Body
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


@dataclass(frozen=True)
class Prepared:
    """A call of the kernel: its plan and parameters, the body of its launch with the CTAs of that;
    o and lse, poisoned."""

    plan: tw.Plan
    address: int
    body: Body
    ctas: int
    o: np.ndarray
    lse: np.ndarray
    partials: np.ndarray
    counters: np.ndarray
    kept: Any

    def launch(self, seed: int) -> None:
        writes = self.o, self.lse, self.partials, self.counters
        run = simulated.kernel(alone(self.body))
        simulated.launch(run, self.address, self.body.threads, self.ctas, seed, writes)
        assert not self.counters.any()


def prepared(
    case: Case, page_size: int, workers: int, dtype: Any = np.float32, own: slice | None = None
) -> Prepared:
    """A plan for so many SMs, made on the host; of `StepPlans`, if only requests `own` have queries
    and the next one has no keys. `dtype`: of o."""
    attn, table = oracle.attention_of(case), oracle.table_of(case)
    k, v = (x[:, 0] if case.form == "ragged" else x for x in (case.k, case.v))
    kv = tw.KV(table, tw.Pool(k, v))
    traced, kind = attn.variant.traced, dtypes.ALL[case.q.dtype.name]
    out = dtypes.ALL[np.dtype(dtype).name]
    spec = Spec(attn.group, *case.dims, kind, kind, out, traced, table.form)
    known = {n: x for n, x in attn.variant.fixed if np.isscalar(x)}
    shape = plans.Shape("hopper", attn.kv_heads, attn.group, traced.mask, known,
                        hopper.FAMILY.qo_tile(spec), "batch", 0, hopper.order,
                        few=hopper.FAMILY.few(spec))  # fmt: skip
    plan = plans.make(case.qo_indptr, kv.lengths(), shape, workers)
    if own is not None:
        planner = plans.StepPlans(
            dataclasses.replace(shape, few=0), table.requests, 999, workers, 0
        )
        indptr, keys = case.qo_indptr[own.start : own.stop + 1], kv.lengths()[own]
        words, end = planner.work(256, indptr, keys, own.start), table.requests + 1
        assert len(words) == planner.words(256) and (words[:end] == case.qo_indptr).all()
        sizes = {"slots": workers, "counters": workers, "items": words[end:].view(ITEM.numpy)}
        plan = plans.Plan(plan.qo_indptr, plan.kv_heads, plan.qo_tile, workers, "hopper",
                          imbalance=1.0, nodes=plan.nodes, group=plan.group, planned=True,
                          **sizes)  # fmt: skip
    box, (wide, narrow) = hopper.box_keys(spec, page_size), hopper._lists(spec, plan)
    o, lse, numbers, kept = simulated.arguments(case, attn, kv, plan.tokens, dtype)
    floats = max(plan.slots, 1) * hopper.rows_of(spec) * (case.dims[1] + 8)
    partials = np.full(floats, np.nan, np.float32)
    counters = np.zeros(2 + 4 * hopper.tiles_of(spec).groups * plan.counters, np.int32)
    struct = hopper.params_struct(spec)
    padding = {f.name: [0] * f.count for f in struct.fields if f.name == "padding"}
    ctas = min(wide + narrow, workers)
    block = bytes(struct.pack(
        **numbers, **hopper.maps(spec, numbers, plan.tokens), **padding, cycles=0,
        qo_indptr=plan.qo_indptr.ctypes.data, items=plan.items.ctypes.data, item_count=wide,
        counter=counters.ctypes.data, counters=counters.ctypes.data + 8, ctas=ctas,
        narrow_ctas=min(narrow, workers), narrow_count=len(plan.items) - wide,
        partials=partials.ctypes.data, page_shift=page_size.bit_length() - 1,
    ))  # fmt: skip
    room = np.zeros(len(block) + 64, np.uint8)  # the parameters are aligned to 64 bytes
    at = -room.ctypes.data % 64
    room[at : at + len(block)] = np.frombuffer(block, np.uint8)
    body = hopper.body(spec, box, plan.slots > 0, narrow > 0)
    return Prepared(plan, room.ctypes.data + at, body, ctas, o, lse, partials, counters,
                    (kept, kv, table, room))  # fmt: skip


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "tensor_map", tensor_map)


def result(case: Case, *args: Any, seed: int, **more: Any) -> tuple[Any, Any, tw.Plan]:
    """o and lse of the kernel, and its plan."""
    call = prepared(case, *args, **more)
    call.launch(seed)
    return call.o, call.lse, call.plan


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[0][:3])))
def test_narrow_items(rng, monkeypatch, maps, case):
    """Right, and the same bits whatever arrives first; chunks among them."""
    tiles = dataclasses.replace(hopper.TILES[128, 128], segment=32)  # of 40 and 33 tiles
    if case[-1] == 1:
        hopper.body.cache_clear()
        monkeypatch.setitem(hopper.TILES, (128, 128), tiles)
    shape, counts, lengths, page_size, workers = case
    drawn = cascade(rng, shape, counts, [], lengths, page_size)
    first, lse, plan = result(drawn, page_size, workers, seed=0)
    assert plan.narrow
    close(drawn, first, lse, str(plan))
    assert (plan.slots > 0) == (workers > 6 and shape[4] != "window")
    again = result(drawn, page_size, workers, seed=1)[0]
    assert np.array_equal(first.view(np.uint32), again.view(np.uint32))
    hopper.body.cache_clear()


WIDE = [  # shape, queries and keys of each request, page size, SMs, dtype of o
    ((4, 2, 128, BFLOAT16, "causal", "scores", ""), [70, 1, 0, 40], [170, 3, 40, 300], 16, 3,
     BFLOAT16),
    ((3, 1, 128, np.float16, "window", "scores", "per head"), [90, 33], [300, 140], 1, 2,
     np.float32),
    ((2, 1, 64, BFLOAT16, "causal", "softcap", ""), [130, 20], [260, 30], 8, 2, BFLOAT16),
    ((2, 1, 256, np.float16, "causal", "alibi", ""), [70, 40], [150, 40], 64, 2, np.float16),
    ((1, 1, 128, BFLOAT16, "causal", "scores", ""), [150], [1400], 32, 8, BFLOAT16),  # chunks
    ((1, 1, 128, BFLOAT16, "images", "scores", ""), [150, 40], [300, 90], 32, 1, np.float32),
]  # fmt: skip


@pytest.mark.parametrize("case", WIDE, ids=lambda c: "-".join(map(str, c[0][:3])))
def test_wide_items(rng, maps, case):
    """By simulated wgmma; items of some rows are beside them where tiles have 128 keys."""
    shape, counts, lengths, page_size, workers, dtype = case
    drawn = cascade(rng, shape, counts, [], lengths, page_size)
    o, lse, plan = result(drawn, page_size, workers, dtype, seed=0)
    close(drawn, o.astype(np.float64), lse, str(plan))


STEP_PLANS = [  # shape, queries, keys, page size, SMs, dtype of o, which requests have queries
    ((4, 2, 128, BFLOAT16, "causal", "scores", ""), [0, 70, 1, 40, 0, 0], [9, 170, 3, 300, 0, 5],
     16, 3, BFLOAT16, slice(1, 4)),
    ((2, 1, 64, BFLOAT16, "causal", "softcap", ""), [130, 0], [260, 0], 8, 2, BFLOAT16,
     slice(0, 1)),
    ((1, 1, 128, BFLOAT16, "causal", "scores", ""), [0, 0, 150, 0], [3, 0, 2300, 0], 32, 8,
     BFLOAT16, slice(2, 3)),
    ((2, 1, 256, np.float16, "window", "scores", ""), [70, 40, 0], [150, 40, 0], 64, 2, np.float16,
     slice(0, 2)),
]  # fmt: skip


@pytest.mark.parametrize("case", STEP_PLANS, ids=lambda c: "-".join(map(str, c[0][:3])))
def test_items_that_a_step_does_not_need(rng, maps, case):
    """They have no query and no key, in any order: nothing is written for them."""
    shape, counts, lengths, page_size, workers, dtype, own = case
    drawn = cascade(rng, shape, counts, [], lengths, page_size)
    for seed in range(2):
        o, lse, plan = result(drawn, page_size, workers, dtype, own, seed=seed)
        left = plan.items["qo_end"] == 0
        assert left.sum() > 8 and not left[: (~left).sum()].any()
        assert (plan.items["request"][left] == own.stop).all()  # a row without keys
        assert (plan.items["chunks"].max() > 1) == (workers == 8)
        close(drawn, o.astype(np.float64), lse, str(plan))
