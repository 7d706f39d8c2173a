"""Memory of partial results that the layers of a step share, and the order that it brings."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from tests.attention.cases import bind, paged
from tests.runtime.test_cuda import fake  # noqa: F401 - a fixture

from tilewright.attention import plan as plans
from tilewright.attention import reference
from tilewright.attention.batch import Attention
from tilewright.attention.families import Scratch, hopper, portable
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.workspace import Workspace
from tilewright.errors import ArgumentError
from tilewright.runtime.cuda import DeviceArray
from tilewright.runtime.step import Node, Step, dependencies

ATTN = Attention(8, 2, 64)


def layers(rng: np.random.Generator, lengths: list[int], count: int) -> list[tuple[KV, np.ndarray]]:
    """Caches and queries of layers; the keys are long enough to be divided."""
    shape = (len(lengths), 8, 64)
    return [
        (paged(rng, lengths, (16, 2, 64)), rng.normal(0, 1, shape).astype(np.float32))
        for _ in range(count)
    ]


def test_layers_of_several_steps_share_it(rng: np.random.Generator):
    """A small step, a larger one and the small one again, each several times: as with memory of
    its own, to the bit, and by the oracle. What is in it before does not matter."""
    scratch, bounds, wanted = Scratch(), [], []
    for lengths in ([3000], [9000, 40, 7000, 5000]):
        made, plan = layers(rng, lengths, 3), None
        for kv, q in made:
            plan = plan or ATTN.plan(np.arange(len(lengths) + 1), kv, q_dtype=np.float32)
            assert plan.slots > 0, "no work is divided"
            bounds.append(ATTN.bind(q, kv, plan=plan, scratch=scratch))
            wanted.append(ATTN.run(q, kv, plan).o)
            exact = reference.attention(q, kv, plan.qo_indptr, ATTN.variant, sm_scale=ATTN.scale)
            np.testing.assert_allclose(wanted[-1], exact.o, atol=1e-5)
    small, large = Step(bounds[:3]), Step(bounds[3:])
    addresses = [b._prepared.keep[1].ctypes.data for b in bounds]
    assert len(set(addresses[:3])) == len(set(addresses[3:])) == 1
    for step, part in ((small, slice(3)), (large, slice(3, 6)), (small, slice(3))):
        for bound in bounds:
            _, partials, counters, *_ = bound._prepared.keep
            assert not counters.any()
            partials[:] = np.nan
            bound.state.o[:] = np.nan
        step()
        for bound, o in zip(bounds[part], wanted[part], strict=True):
            np.testing.assert_array_equal(bound.state.o, o)


def test_calls_that_share_it_are_ordered(rng: np.random.Generator):
    """In a graph, where nothing else orders them."""
    (kv, q), (other, r) = layers(rng, [3000], 2)

    def edges(a: Scratch, b: Scratch) -> tuple[tuple[int, int], ...]:
        bounds = bind(ATTN, q, kv, scratch=a), bind(ATTN, r, other, scratch=b)
        return dependencies([Node("attention", b.launch, *b.boxes) for b in bounds])

    one = Scratch()
    assert edges(one, one) == ((0, 1),)
    assert edges(Scratch(), Scratch()) == ()


def test_it_grows_and_never_shrinks():
    scratch, like = Scratch(), np.empty(1, np.float32)
    first = scratch.grown(like, 100, 3)
    assert scratch.grown(like, 7, 3) is first is scratch.grown(like, 100, 1)
    more = scratch.grown(like, 50, 9)
    assert [len(a) for a in more] == [100, 9] and not more[1].any()
    assert [len(a) for a in first] == [100, 3]
    assert scratch.arrays is more


def test_scratch_beside_a_workspace_is_refused(rng: np.random.Generator):
    """It would be ignored: a workspace has its own."""
    ((kv, q),) = layers(rng, [3000], 1)
    with pytest.raises(ArgumentError, match=r"A101.*a workspace has memory of its own") as caught:
        ATTN.bind(q, kv, plan=Workspace.__new__(Workspace), scratch=Scratch())
    assert caught.value.where == "scratch"


def test_scratch_of_another_device_is_refused(fake: ctypes.CDLL):  # noqa: F811
    scratch, on_gpu = Scratch(), [DeviceArray((4,), "float32", n) for n in (0, 1)]
    arrays = scratch.grown(on_gpu[0], 100, 3)
    for like in (np.empty(1, np.float32), on_gpu[1]):
        with pytest.raises(ArgumentError, match=r"A105.*cuda:0"):
            scratch.grown(like, 10, 3)
    assert scratch.grown(on_gpu[0], 10, 3) is arrays
    del scratch, on_gpu, arrays, like
    gc.collect()


def test_a_step_is_planned_again_and_again(rng: np.random.Generator):
    """Of one bound call: batches of other requests, queries and keys, some from the middle of the
    table, as many as fit. Each as planned and run alone, to the bit; no other row is written."""
    table, pool = np.zeros((30, 8), np.int32), rng.normal(0, 1, (2, 200, 16, 2, 64)).astype("f4")
    lengths = np.zeros(30, np.int32)
    kv = KV(Table(lengths, table), Pool(*pool))
    rows, planner = 64, ATTN.step_plans(kv, 128)
    q = rng.normal(0, 1, (rows, 8, 64)).astype(np.float32)
    words, out = np.zeros(planner.words(rows), np.int32), np.zeros_like(q)
    bound = ATTN.bind(q, kv, out, plan=planner.plan(rows, rows, words))
    for counts, first in (([40, 7], 3), ([1], 0), ([64], 28), ([3] * 8, 5), ([9, 1, 30, 2], 11)):
        keys = np.array([n + int(rng.integers(0, 60)) for n in counts])
        lengths[:], table[:] = rng.integers(0, 9, 30), rng.permutation(200)[:8]
        lengths[first + len(counts)], out[:] = 0, np.nan
        for i, n in enumerate(keys):
            lengths[first + i], table[first + i] = n, rng.permutation(200)[:8]
        indptr = np.cumsum([0, *counts])
        assert planner.left(rows, indptr) >= 0
        words[:] = planner.work(rows, indptr, keys, first)
        bound()
        own = slice(first, first + len(counts))
        alone = KV(Table(lengths[own], table[own]), kv.pool)
        wanted = ATTN.run(q[: indptr[-1]], alone, ATTN.plan(indptr, alone, lengths=0 * keys)).o
        np.testing.assert_array_equal(out[: indptr[-1]], wanted)
        assert np.isnan(out[indptr[-1] :]).all()
    many = np.arange(15)  # requests of one query
    assert planner.left(rows, many) < 0 <= planner.left(128, many)
    assert planner.left(128, np.arange(31)) >= 0  # as many as the table has
    for indptr, first in ((many, 5), (np.array([0, 9]), 29)):  # too many; no row behind them
        with pytest.raises(ArgumentError, match=r"A103.*no room for"):
            planner.work(rows, indptr, np.diff(indptr), first)
    with pytest.raises(ArgumentError, match=r"A103.*rows"):
        ATTN.step_plans(kv, 0)


class Words:
    """Memory of a GPU of which a plan has parts."""

    shape = (1 << 30,)

    def rows(self, begin: int, end: int) -> Words:
        return self


@pytest.mark.parametrize("seed", range(30))
def test_chunks_of_a_step_fit_its_partial_results(seed: int):
    """Each query of each KV head once, and slots and counters that the plan has."""
    rng = np.random.default_rng(seed)
    family = (hopper.FAMILY, portable.TILES, portable.FAMILY)[seed % 3]
    kv_heads, workers = int(rng.choice([1, 2, 8])), int(rng.choice([1, 16, 132]))
    splits = family.splits if seed % 2 else ""
    order = hopper.order if family is hopper.FAMILY else None
    mask = ATTN.variant.traced.mask
    shape = plans.Shape(family.name, kv_heads, 4, mask, {}, 32, splits, 0, order)
    requests, rows = int(rng.integers(2, 40)), int(rng.integers(1, 9)) * 64
    planner = plans.StepPlans(shape, requests, 512 + 64, workers, 0)
    count = int(rng.integers(1, min(requests, rows + 1)))
    counts = np.diff([0, *np.sort(rng.integers(0, rows - count + 1, count))]) + 1
    indptr = np.concatenate([[0], np.cumsum(counts)])
    while planner.left(rows, indptr) < 0:
        rows += 64
    keys = counts + rng.integers(0, rng.choice([1, 300, 30_000]), count)
    plan = planner.plan(rows, rows, Words())
    items = planner.work(rows, indptr, keys, 0)[requests + 1 :].view(plans.ITEM.numpy)
    seen = np.zeros((indptr[-1], kv_heads))
    for item in items:
        seen[item["qo_begin"] : item["qo_end"], item["kv_head"]] += 1 / item["chunks"]
    np.testing.assert_allclose(seen, 1)
    cut = items[items["chunks"] > 1]
    assert (cut["slot"] + cut["chunks"]).max(initial=0) <= plan.slots
    assert cut["counter"].max(initial=-1) < max(plan.counters, 1)
    assert (items["request"] < requests).all() and (items["chunk"] < items["chunks"]).all()
