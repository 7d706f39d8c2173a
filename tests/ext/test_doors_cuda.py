"""The doors on a GPU: half precision against the float64 oracle, and CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.ext.oracle import Batch, as64, attend, close

import tilewright as tw
from tilewright.errors import ArgumentError
from tilewright.ext import compat as fi
from tilewright.ext import torch_ops

pytestmark = pytest.mark.gpu
SHAPE = (16, 8, 2, 128)  # page_size, qo_heads, kv_heads, head_dim


def batch_of(rng, kv, qo, dtype=torch.bfloat16):
    """A batch of host arrays whose q and pages lie on the GPU."""
    batch = Batch(rng, kv, qo, SHAPE, dtype)
    batch.q, batch.pages = batch.q.cuda(), batch.pages.cuda()
    return batch


def workspace():
    return torch.empty(16, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decode_and_prefill(rng, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    batch = batch_of(rng, [300, 0, 17], [1, 1, 1], dtype)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper.plan(*batch.arrays(), *batch.heads(), 16, q_data_type=dtype)
    found = wrapper.run(batch.q, batch.pages, return_lse=True)
    close(found, batch.expected(), tolerance)
    sinks = torch.linspace(-1, 1, 8, device="cuda")
    found = wrapper.run(batch.q, batch.pages, sinks=sinks, return_lse=True)
    close(found, batch.expected(sinks=as64(sinks)), tolerance)
    batch = batch_of(rng, [90, 41], [33, 41], dtype)
    prefill = fi.BatchPrefillWithPagedKVCacheWrapper(workspace())
    for options in ({"causal": True}, {"causal": True, "window_left": 20}):
        prefill.plan(
            batch.qo_indptr, *batch.arrays(), *batch.heads(), 16, q_data_type=dtype, **options
        )
        found = prefill.run(batch.q, batch.pages, return_lse=True)
        close(found, batch.expected(**options), tolerance)


def test_custom_mask_and_alibi(rng):
    batch = batch_of(rng, [50, 9], [7, 9])
    masks = [rng.random((m, n)) < 0.5 for m, n in zip(batch.qo_lens, batch.kv_lens, strict=True)]
    flat = torch.from_numpy(np.concatenate([m.reshape(-1) for m in masks])).cuda()
    prefill = fi.BatchPrefillWithPagedKVCacheWrapper(workspace())
    plan = (batch.qo_indptr, *batch.arrays(), *batch.heads(), 16)
    prefill.plan(*plan, custom_mask=flat, q_data_type="bfloat16")
    found = prefill.run(batch.q, batch.pages, return_lse=True)
    close(found, batch.expected(masks=masks), 2e-2)
    prefill.plan(*plan, causal=True, pos_encoding_mode="ALIBI", q_data_type="bfloat16")
    found = prefill.run(batch.q, batch.pages, return_lse=True)
    close(found, batch.expected(causal=True, alibi=True), 2e-2)


def captured(call):
    """A graph of a call, and what the call returned while it was captured."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


@pytest.mark.parametrize("rows", [1, 3])
def test_a_graph_replays_after_another_plan(rng, rows):
    """FlashInfer's way: plan outside of the graph, capture run, plan again, replay."""
    ints = lambda n: torch.zeros(n, dtype=torch.int32, device="cuda")  # noqa: E731
    paged = ints(4), ints(200), ints(3)
    if rows == 1:
        wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", True, False, *paged)
    else:
        wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", True, ints(4), *paged)
    batches = [batch_of(rng, kv, [rows] * 3) for kv in ([1000, 3, 64], [5, 700, 129])]
    q, pages = batches[0].q.clone(), torch.empty(90, *batches[0].pages.shape[1:], device="cuda")
    pages = pages.to(torch.bfloat16)

    def plan(batch):
        first = [batch.qo_indptr.cuda()] if rows > 1 else []
        options = {"causal": True} if rows > 1 else {}
        arrays = [x.cuda() for x in batch.arrays()]
        wrapper.plan(*first, *arrays, *batch.heads(), 16, q_data_type="bfloat16", **options)
        q.copy_(batch.q)
        pages[: len(batch.pages)].copy_(batch.pages)

    plan(batches[0])
    graph, found = captured(lambda: wrapper.run(q, pages, return_lse=True))
    for batch in (*batches, batches[0]):
        plan(batch)
        graph.replay()
        close(found, batch.expected(causal=rows > 1), 2e-2)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("warm", [False, True])
def test_capture_without_a_graph_wrapper_is_refused(rng, warm):
    batch = batch_of(rng, [40, 3], [1, 1])
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper.plan(*batch.arrays(), *batch.heads(), 16, q_data_type="bfloat16")
    if warm:
        wrapper.run(batch.q, batch.pages)
    torch.cuda.synchronize()
    with pytest.raises(ArgumentError) as caught, torch.cuda.graph(torch.cuda.CUDAGraph()):
        wrapper.run(batch.q, batch.pages)
    assert caught.value.code == "A110"
    torch.cuda.synchronize()


def test_long_requests_in_a_graph_are_refused(rng):
    batch = batch_of(rng, [40, 30], [9, 2])
    ints = lambda n: torch.zeros(n, dtype=torch.int32, device="cuda")  # noqa: E731
    buffers = ints(3), ints(3), ints(9), ints(2)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", True, *buffers)
    with pytest.raises(ArgumentError) as caught:
        wrapper.plan(batch.qo_indptr, *batch.arrays(), *batch.heads(), 16, q_data_type="bfloat16")
    assert caught.value.code == "A110"


def test_cascade_equals_flat(rng):
    shared = batch_of(rng, [320], [1])
    own = [batch_of(rng, [n], [1]) for n in (5, 40, 17)]
    pages = torch.cat([b.pages for b in (shared, *own)])
    starts = np.cumsum([0, *(len(b.pages) for b in (shared, *own))])
    q = torch.cat([b.q for b in own])
    counts = [len(b.indices) for b in own]
    levels = (
        [torch.tensor([0, 3]).int(), torch.arange(4).int()],
        [shared.indptr, torch.tensor(np.cumsum([0, *counts])).int()],
        [shared.indices, torch.cat([b.indices + int(s) for b, s in zip(own, starts[1:])]).int()],  # noqa: B905
        [shared.last, torch.cat([b.last for b in own])],
    )
    wrapper = fi.MultiLevelCascadeAttentionWrapper(2, workspace())
    wrapper.plan(*levels, *own[0].heads(), 16, causal=True, q_data_type="bfloat16")
    expected = [
        attend(as64(b.q), *(np.concatenate([x[0], y[0]]) for x, y in (
            (shared.keys, b.keys), (shared.values, b.values))))[0] for b in own
    ]  # fmt: skip
    close([wrapper.run(q, pages)], [np.concatenate(expected)], 2e-2)


def test_operators_plan_append_and_attend_in_one_graph(rng):
    """A replay sees the lengths, rows and positions that the tensors then hold."""
    batch = batch_of(rng, [400, 3, 21], [1] * 3)
    k, v = batch.pages.unbind(1)
    attn = tw.Attention(*batch.heads())
    operator = torch_ops.operator(attn, attn.reserve(3))
    lengths = torch.tensor(batch.kv_lens, dtype=torch.int32, device="cuda")
    table = [lengths, batch.indptr.cuda(), batch.indices.cuda()]
    new = torch.randn(2, 4, 2, 128, device="cuda", dtype=torch.bfloat16)
    request = torch.tensor([0, 1, 2, -1], device="cuda")

    def step():
        position = torch.cat([lengths - 1, lengths[:1] * 0])
        torch_ops.append(k, v, new[0], new[1], request, position, list(table[1:]))
        planned = operator.plan(table)
        return operator(batch.q, k, v, table, planned)

    graph, found = captured(step)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    keys, values = ([x.copy() for x in y] for y in (batch.keys, batch.values))
    for run, shorter in ((graph.replay, 0), (graph.replay, 2), (compiled, 1)):
        lengths.copy_(torch.tensor([max(n - shorter, 1) for n in batch.kv_lens]))
        new.normal_()
        given = run()
        expected = []
        for r, n in enumerate(lengths.tolist()):
            keys[r][n - 1], values[r][n - 1] = as64(new[0, r]), as64(new[1, r])
            expected.append(attend(as64(batch.q[r : r + 1]), keys[r][:n], values[r][:n]))
        o, lse = (np.concatenate(x) for x in zip(*expected, strict=True))
        close(given if run is compiled else found, (o, lse * np.log(2)), 2e-2)


def test_opcheck(rng):
    batch = batch_of(rng, [40, 3, 21], [1] * 3)
    k, v = (x.contiguous() for x in batch.pages.unbind(1))
    attn = tw.Attention(*batch.heads())
    operator = torch_ops.operator(attn, attn.reserve(3))
    lengths = torch.tensor(batch.kv_lens, dtype=torch.int32, device="cuda")
    table = [lengths, batch.indptr.cuda(), batch.indices.cuda()]
    ops = torch.ops.tilewright
    torch.library.opcheck(ops.plan.default, (table, None, operator.key))
    planned = operator.plan(table)
    torch.library.opcheck(ops.attend.default, (batch.q, k, v, table, planned, [], operator.key))
