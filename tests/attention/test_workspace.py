"""Workspaces: the planner on a GPU agrees with NumPy, and a graph replays with other lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.attention.cases import TYPES, arrays_of, paged, queries
from tests.attention.test_bodies import imagined  # noqa: F401 - a fixture
from tests.attention.test_decode_cuda import close
from tests.attention.test_flash_cuda import _bits, on_device
from tests.runtime.test_cuda import fake  # noqa: F401 - a fixture

from tilewright.attention import planner, ranges, reference
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.ranges import CUT
from tilewright.attention.spec import alone, compile_cuda
from tilewright.attention.table import Table, TableForm
from tilewright.attention.variant import SlidingWindow
from tilewright.errors import ArgumentError
from tilewright.runtime import cuda
from tilewright.runtime.cuda import DeviceArray
from tilewright.toolchain import nvrtc

FORMS = [TableForm(), TableForm("int64"), TableForm("", "int32"), TableForm("", "int64")]


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_cubin_without_spills(arch, form):
    text = alone(planner.body(form.for_planner(), 4), "plan_cuts")
    used = compile_cuda(text, arch).resources["plan_cuts"]
    assert used.spill_bytes == 0 and 0 < used.registers <= 64


# ---------------------------------------------------------------------------- on host memory


def there(dim: int = 64, requests: int = 2, ordinal: int = 0, **more: Any) -> tuple[Any, KV]:
    """Queries of 8 heads and a cache of 2, bfloat16, on a GPU."""

    def on(array: np.ndarray, dtype: Any = None) -> Any:
        return DeviceArray.from_numpy(array, dtype, ordinal)

    k = on(np.zeros((8, 16, 2, dim), np.uint16), "bfloat16")
    q = on(np.zeros((requests, 8, dim), np.uint16), "bfloat16")
    kv_len, block_table = np.ones(requests, np.int32), np.zeros((requests, 3), np.int32)
    return q, KV(Table(on(kv_len), on(block_table), **more), Pool(k, k))


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_what_a_workspace_is_too_small_for(imagined, monkeypatch):  # noqa: F811
    """Above all another head_dim, whose partial results its memory does not hold."""
    attn = Attention(8, 2, 64)
    room, (q, kv) = attn.reserve(2), there()
    room.plan(kv.table)
    attn.run(q, kv, room)

    def refused(code: str, where: str, call: Any, *args: Any, **more: Any) -> None:
        with pytest.raises(ArgumentError) as e:
            call(*args, **more)
        assert (e.value.code, e.value.where) == (code, where), str(e.value)

    for dim in (32, 128):
        refused("A103", "plan", Attention(8, 2, dim).run, *there(dim), room)
    refused("A103", "plan", attn.run, *there(ordinal=1), room)
    refused(
        "A103", "plan", Attention(4, 2, 64).run, device(q.to_numpy()[:, :4], "bfloat16"), kv, room
    )
    refused("A103", "table", room.plan, there(requests=3)[1].table)
    refused("A105", "table", room.plan, there(ordinal=1)[1].table)
    refused("A107", "table", room.plan, kv)
    rows = device(np.arange(3, dtype=np.int32))
    refused("A101", "qo_indptr", room.plan, kv.table, rows)
    for tokens in (3, -1, 1.5):
        refused("A103", "tokens", room.plan, kv.table, tokens=tokens)
    many = attn.reserve(2, max_tokens=4)
    refused("A101", "qo_indptr", many.plan, kv.table)
    refused("A105", "qo_indptr", many.plan, kv.table, np.arange(3, dtype=np.int32))
    refused("A102", "qo_indptr", many.plan, kv.table, device(np.arange(3)))
    refused("A103", "tokens", many.plan, kv.table, rows, tokens=5)
    bound, plan = attn.bind(q, kv, plan=room), attn.plan([0, 1, 2], kv)
    room.plan(there(requests=1)[1].table)
    refused("A103", "plan", bound)
    monkeypatch.setattr(cuda, "is_capturing", lambda ordinal: True)
    refused("A110", "plan", attn.run, q, kv, plan)
    room.plan(kv.table)
    attn.run(q, kv, room)
    room._status.words[0] = 2  # as the planner leaves it
    refused("A109", "shared", room.plan, kv.table)
    room.plan(kv.table)


# ---------------------------------------------------------------------------- on a GPU


def device(array, dtype=None):
    from tilewright.runtime.cuda import DeviceArray

    return DeviceArray.from_numpy(array, dtype)


def planned(room) -> np.ndarray:
    return room._cuts.to_numpy().view(CUT.numpy)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [1, 8, 12])
def test_plans_of_the_device_agree_exactly(rng, kv_heads):
    attn = Attention(kv_heads, kv_heads, 64)
    for workers in (1, 5, None):
        room = attn.reserve(3000, workers=workers)
        for n in (1, 2, 40, 700, 3000):
            for most in (2, 900, 1 << 20):
                lengths = rng.integers(0, most, n)
                table = Table.dense(device(lengths))
                if most == 900:
                    table = Table.ragged(device(np.append(0, np.cumsum(lengths)).astype(np.int32)))
                room.plan(table)
                cuts, twin = planned(room), ranges.cut(lengths, kv_heads, room.ctas)
                np.testing.assert_array_equal(cuts[: len(twin)], twin)
                assert (cuts["unit"][len(twin) :] == twin["unit"][-1]).all()
                assert (cuts["tile"][len(twin) :] == 0).all()


@pytest.mark.gpu
def test_a_request_counts_as_what_its_window_sees(rng):
    attn = Attention(8, 8, 64, SlidingWindow(window=1000))
    room = attn.reserve(40)
    lengths = rng.integers(0, 100_000, 40)
    room.plan(Table.dense(device(lengths)))
    twin = ranges.cut(np.minimum(lengths, 17 * ranges.TILE), 8, room.ctas)
    np.testing.assert_array_equal(planned(room)[: len(twin)], twin)


@pytest.mark.gpu
def test_a_graph_plans_again_at_each_replay(rng):
    """Lengths from nothing to more than was ever planned; two layers, one planner node."""
    torch = pytest.importorskip("torch")
    lengths = [900, 0, 3000, 17]
    layers = [paged(rng, lengths, (16, 2, 64), TYPES["bfloat16"]) for _ in range(2)]
    for kv in layers:
        for x in arrays_of(kv)[:2]:
            x[...] = rng.standard_normal(x.shape)
    there = [on_device(kv) for kv in layers]
    q = [queries(rng, [1] * 4, 8, 64, TYPES["bfloat16"])[0] for _ in layers]
    on_card = [torch.from_numpy(_bits(x).view(np.int16)).view(torch.bfloat16).cuda() for x in q]
    attn = Attention(8, 2, 64)
    room = attn.reserve(4)
    attn_plan = attn.plan([0, 1, 2, 3, 4], there[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, then the same
            room.plan(there[0].table)
            states = [attn.run(x, kv, room) for x, kv in zip(on_card, there, strict=True)]
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        room.plan(there[0].table)
        states = [attn.run(x, kv, room) for x, kv in zip(on_card, there, strict=True)]
        with pytest.raises(ArgumentError, match="A110"):
            attn.run(on_card[0], there[0], attn_plan)
    for now in ([900, 0, 3000, 17], [1, 0, 1, 1], [0, 0, 0, 0], [64, 0, 2999, 16], [899, 0, 5, 0]):
        for kv, card in zip(layers, there, strict=True):
            arrays_of(kv)[2][:] = now
            arrays_of(card)[2].copy_from(arrays_of(kv)[2])
        graph.replay()
        torch.cuda.synchronize()
        for x, kv, state in zip(q, layers, states, strict=True):
            assert state.o.dtype == torch.bfloat16
            wanted = reference.attention(x, kv, [0, 1, 2, 3, 4], attn.variant)
            close(state, wanted)


@pytest.mark.gpu
def test_query_rows_are_checked_on_the_device(rng):
    kv = paged(rng, [70, 5, 300], (16, 2, 64), TYPES["float16"])
    q, indptr = queries(rng, [2, 0, 4], 8, 64, TYPES["float16"])
    attn, there = Attention(8, 2, 64), on_device(kv)
    room = attn.reserve(3, max_tokens=9)
    room.plan(there.table, device(indptr), tokens=6)
    close(attn.run(device(q), there, room), reference.attention(q, kv, indptr, attn.variant))
    for bad in ([0, 5, 5, 6], [0, 3, 2, 6], [1, 2, 3, 4], [0, 1, 2, 7], [0, -1, 2, 3]):
        room.plan(there.table, device(np.array(bad, np.int32)), tokens=6)
        out = device(np.full(q.shape, 7.0, np.float16))
        attn.run(device(q), there, room, out=out)
        assert (out.to_numpy() == 7.0).all()  # the results of no row are written
        with pytest.raises(ArgumentError, match="qo_indptr of an earlier plan"):
            room.plan(there.table, device(indptr), tokens=6)
    room.plan(there.table, device(indptr), tokens=6)
    close(attn.run(device(q), there, room), reference.attention(q, kv, indptr, attn.variant))


@pytest.mark.gpu
def test_misuse(rng):
    kv = paged(rng, [70, 5, 300], (16, 2, 64), TYPES["float16"])
    there = on_device(kv)
    attn = Attention(8, 2, 64)
    room, roomy = attn.reserve(2), attn.reserve(3)
    assert room.nbytes > 0 and "2 requests" in repr(room)
    wrong: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("A103", room, (there.table,)),  # three requests
        ("A107", roomy, (there,)),
        ("A105", roomy, (kv.table,)),
        ("A101", roomy, (there.table, device(np.zeros(4, np.int32)))),
    ]
    for code, one, args in wrong:
        with pytest.raises(ArgumentError, match=code):
            one.plan(*args)
    with pytest.raises(ArgumentError, match="A103"):  # nothing was planned
        attn.run(device(np.zeros((3, 8, 64), np.float16)), there, room)
