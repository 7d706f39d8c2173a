"""Memory of partial results that the layers of a step share, and the order that it brings."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from tests.attention.cases import bind, paged
from tests.runtime.test_cuda import fake  # noqa: F401 - a fixture

from tilewright.attention import reference
from tilewright.attention.batch import Attention
from tilewright.attention.families import Scratch
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
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


def test_another_layer_s_pages(rng: np.random.Generator):
    """`run_over` is the call over other pages, to the bit; lengths are those of the first table."""
    [(kv, q)] = layers(rng, [3000, 9000], 1)
    plan = ATTN.plan(np.arange(3), kv, q_dtype=np.float32)
    other = Pool(*(3 * np.asarray(x.owner) for x in (kv.pool.k, kv.pool.v)))
    bound, same = ATTN.bind(q, kv, plan=plan), KV(kv.table, other)
    wanted = [ATTN.run(q, x, plan).o.copy() for x in (kv, same)]
    for x, o in ((kv, wanted[0]), (same, wanted[1]), (kv, wanted[0])):
        bound.state.o[:] = np.nan
        bound.run_over(x)
        np.testing.assert_array_equal(bound.state.o, o)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01
