"""FlashInfer's calls against a float64 oracle, and the errors that take the part of its traps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ext.oracle import Batch, as64, attend, close

from tilewright.errors import ArgumentError
from tilewright.ext import compat as fi
from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
SHAPE = (4, 4, 2, 24)  # page_size, qo_heads, kv_heads, head_dim: no multiple of 16
WORKSPACE = torch.empty(16, dtype=torch.uint8)


def raises(code, call, *args, where=None, **kwargs):
    with pytest.raises(ArgumentError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value
    assert where is None or caught.value.where == where


def decode(batch, layout: str = "NHD", **plan: Any):
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, layout)
    plan = {"q_data_type": batch.q.dtype} | plan
    wrapper.plan(*batch.arrays(), *batch.heads(), batch.page_size, **plan)
    return wrapper


def prefill(batch, layout: str = "NHD", **plan: Any):
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, layout)
    plan = {"q_data_type": batch.q.dtype} | plan
    wrapper.plan(batch.qo_indptr, *batch.arrays(), *batch.heads(), batch.page_size, **plan)
    return wrapper


# ---------------------------------------------------------------------------- batches in pages


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode(rng, layout):
    batch = Batch(rng, [9, 0, 1, 33], [1] * 4, SHAPE, layout=layout)
    wrapper = decode(batch, layout)
    k, v = batch.pages.unbind(1)
    for cache in (batch.pages, (k.clone(), v)):
        close(wrapper.run(batch.q, cache, return_lse=True), batch.expected())
    out, lse = torch.full_like(batch.q, np.nan), torch.full(batch.q.shape[:2], np.nan)
    found = wrapper.run_return_lse(batch.q, batch.pages, out=out, lse=lse)
    assert found[0] is out and found[1] is lse
    close((out, lse), batch.expected())
    assert (lse[1] == -math.inf).all() and (out[1] == 0).all()


@pytest.mark.usefixtures("interpreted")
def test_scales_multiply_scores_and_values(rng):
    batch = Batch(rng, [5, 17], [1, 1], SHAPE)
    found = decode(batch, sm_scale=0.3).run(
        batch.q, batch.pages, q_scale=0.5, k_scale=4.0, v_scale=0.25, return_lse=True
    )
    o, lse = batch.expected(sm_scale=0.6)
    close(found, (o * 0.25, lse))


@pytest.mark.usefixtures("interpreted")
def test_several_queries_a_request_are_causal(rng):
    batch = Batch(rng, [9, 12], [3, 3], SHAPE)
    found = decode(batch, q_len_per_req=3).run(batch.q, batch.pages, return_lse=True)
    close(found, batch.expected(causal=True))


@pytest.mark.usefixtures("interpreted")
def test_prefill_options(rng):
    batch = Batch(rng, [21, 3, 8, 0], [5, 3, 0, 2], SHAPE)
    for causal in (False, True):
        wrapper = prefill(batch, causal=causal)
        close(wrapper.run(batch.q, batch.pages, return_lse=True), batch.expected(causal=causal))
    wrapper = prefill(batch, causal=True, window_left=4, logits_soft_cap=1.5)
    options = {"causal": True, "window_left": 4, "soft_cap": 1.5}
    close(wrapper.run(batch.q, batch.pages, return_lse=True), batch.expected(**options))


@pytest.mark.usefixtures("interpreted")
def test_more_queries_than_keys_see_nothing(rng):
    batch = Batch(rng, [3], [5], SHAPE)
    o, lse = prefill(batch, causal=True).run(batch.q, batch.pages, return_lse=True)
    close((o, lse), batch.expected(causal=True))
    assert (lse[:2] == -math.inf).all()


@pytest.mark.usefixtures("interpreted")
def test_sinks_come_with_the_run(rng):
    batch = Batch(rng, [6, 11], [1, 1], SHAPE)
    sinks = torch.tensor(rng.standard_normal(4), dtype=torch.float32)
    found = decode(batch).run(batch.q, batch.pages, sinks=sinks, return_lse=True)
    close(found, batch.expected(sinks=as64(sinks)))


def packed(mask):
    """Each request's bits, little-endian, from a byte of its own on."""
    parts = [np.packbits(m.reshape(-1), bitorder="little") for m in mask]
    return torch.from_numpy(np.concatenate(parts))


@pytest.mark.usefixtures("interpreted")
def test_custom_masks_flat_and_packed(rng):
    batch = Batch(rng, [37, 5, 0], [3, 5, 1], SHAPE)
    masks = [rng.random((m, n)) < 0.5 for m, n in zip(batch.qo_lens, batch.kv_lens, strict=True)]
    flat = torch.from_numpy(np.concatenate([m.reshape(-1) for m in masks]))
    expected = batch.expected(masks=masks)
    kinds: list[dict[str, Any]] = [{"custom_mask": flat}, {"packed_custom_mask": packed(masks)}]
    for mask in kinds:
        wrapper = prefill(batch, causal=True, **mask)  # a mask takes the part of causal
        close(wrapper.run(batch.q, batch.pages, return_lse=True), expected)


@pytest.mark.usefixtures("interpreted")
def test_forward_has_options_of_its_own(rng):
    batch = Batch(rng, [9, 12], [3, 2], SHAPE)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.begin_forward(
        batch.qo_indptr, *batch.arrays(), *batch.heads(), 4, q_data_type="float32"
    )
    found = wrapper.forward_return_lse(batch.q, batch.pages, causal=True, sm_scale=0.5)
    close(found, batch.expected(causal=True, sm_scale=0.5))
    wrapper.end_forward()


@pytest.mark.usefixtures("interpreted")
def test_half_precision_and_a_float32_output(rng):
    batch = Batch(rng, [40, 7], [1, 1], SHAPE, torch.bfloat16)
    found = decode(batch, o_data_type=torch.float32).run(batch.q, batch.pages, return_lse=True)
    assert found[0].dtype == torch.float32
    close(found, batch.expected(), 1e-4)


def test_buffers_of_a_graph_are_filled_and_keep_their_addresses(rng):
    buffers = {
        "paged_kv_indptr_buffer": torch.zeros(3, dtype=torch.int32),
        "paged_kv_indices_buffer": torch.full((64,), -7, dtype=torch.int32),
        "paged_kv_last_page_len_buffer": torch.zeros(2, dtype=torch.int32),
    }
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, use_cuda_graph=True, **buffers)
    tables = []
    for lengths in ([9, 30], [31, 2]):
        batch = Batch(rng, lengths, [1, 1], SHAPE)
        wrapper.plan(*batch.arrays(), *batch.heads(), 4, q_data_type="float32")
        close(wrapper.run(batch.q, batch.pages, return_lse=True), batch.expected())
        assert torch.equal(buffers["paged_kv_indptr_buffer"], batch.indptr)
        tables.append(wrapper._table.params())
    assert tables[0] == tables[1]
    batch = Batch(rng, [1, 2, 3], [1] * 3, SHAPE)
    plan = (*batch.arrays(), *batch.heads(), 4)
    raises("A103", wrapper.plan, *plan, q_data_type="float32", where="indptr")
    raises("A101", fi.BatchDecodeWithPagedKVCacheWrapper, WORKSPACE, use_cuda_graph=True)


@pytest.mark.usefixtures("interpreted")
def test_the_tail_of_a_batch_as_vllm_plans_it(rng):
    """Its kv_indptr does not begin at 0; options of the plan are read back under private names."""
    batch = Batch(rng, [9, 30, 5], [1, 4, 2], SHAPE)
    indptr, indices, last = batch.arrays()
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(
        batch.qo_indptr[1:] - 1, indptr[1:], indices, last[1:], *batch.heads(), 4, causal=True,
        sm_scale=0.25, window_left=6, fixed_split_size=-1, disable_split_kv=False,
    )  # fmt: skip
    assert (wrapper._causal, wrapper._window_left, wrapper._logits_soft_cap) == (True, 6, 0.0)
    assert wrapper._sm_scale == 0.25
    found = wrapper.run(batch.q[1:], batch.pages, k_scale=1.0, v_scale=1.0, return_lse=True)
    expected = batch.expected(causal=True, window_left=6, sm_scale=0.25)
    close(found, [x[1:] for x in expected])
    with pytest.raises(AttributeError):
        _ = wrapper._spelt_wrong


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_caches_without_slots_as_sglang_has_them(rng, layout):
    batch = Batch(rng, [9, 2], [1, 1], (1, 4, 2, 24))
    k, v = (x[:, 0] for x in batch.pages.unbind(1))
    wrapper = decode(batch, layout)
    for cache in ((k, v), torch.stack((k, v), 1)):
        close(wrapper.run(batch.q, cache, return_lse=True), batch.expected())
    new = torch.ones(1, 2, 24)
    where = (torch.tensor([1]), torch.tensor([1]))
    fi.append_paged_kv_cache(
        new, new, *where, (k, v), batch.indices, batch.indptr, batch.last, layout
    )
    assert (k[batch.indices[10]] == 1).all() and (v[batch.indices[10]] == 1).all()


@pytest.mark.usefixtures("interpreted")
@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_random_batches(data):
    """Any lengths, none at all and none for some; pages of any size; options in any combination."""
    draw, small = data.draw, st.integers(0, 9)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    requests = draw(st.integers(0, 4))
    kv, qo = ([draw(small) for _ in range(requests)] for _ in range(2))
    shape = (draw(st.integers(1, 5)), 2 * draw(st.integers(1, 3)), 2, draw(st.integers(1, 9)))
    layout = draw(st.sampled_from(["NHD", "HND"]))
    batch = Batch(rng, kv, qo, shape, layout=layout)
    masks = [rng.random((m, n)) < 0.6 for m, n in zip(qo, kv, strict=True)]
    kind = draw(st.sampled_from(["full", "causal", "flat", "packed"])) if requests else "full"
    window, alibi = draw(st.integers(-1, 4)), draw(st.booleans())
    cap = 0.0 if alibi else draw(st.sampled_from([0.0, 0.7]))
    plan: dict[str, Any] = {"causal": kind != "full", "window_left": window}
    plan |= {"logits_soft_cap": cap, "pos_encoding_mode": "ALIBI" if alibi else "NONE"}
    if kind == "flat":
        plan["custom_mask"] = torch.from_numpy(np.concatenate([m.reshape(-1) for m in masks]))
    elif kind == "packed":
        plan["packed_custom_mask"] = packed(masks)
    wrapper = prefill(batch, layout, **plan)
    meant = {"masks": masks} if kind in ("flat", "packed") else {"causal": kind == "causal"}
    expected = batch.expected(window_left=window, alibi=alibi, soft_cap=cap, **meant)
    close(wrapper.run(batch.q, batch.pages, return_lse=True), expected)


# ---------------------------------------------------------------------------- without pages


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "window_left": 3, "logits_soft_cap": 2.0},
    {"pos_encoding_mode": "ALIBI"},
    {"window_left": 2},
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ragged_and_single(rng, options):
    batch = Batch(rng, [19, 4], [5, 4], SHAPE)
    meant = {"soft_cap" if n == "logits_soft_cap" else n: x for n, x in options.items()}
    meant.pop("pos_encoding_mode", None)
    expected = batch.expected(alibi="pos_encoding_mode" in options, **meant)
    k, v = (torch.tensor(np.concatenate(x)).float() for x in (batch.keys, batch.values))
    for layout in ("NHD", "HND"):
        wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE, layout)
        kv_indptr = torch.tensor([0, 19, 23], dtype=torch.int32)
        heads = (4, 2, 24)
        wrapper.plan(batch.qo_indptr, kv_indptr, *heads, q_data_type="float32", **options)
        rows = (k, v) if layout == "NHD" else (k.transpose(0, 1), v.transpose(0, 1).contiguous())
        close(wrapper.run(batch.q, *rows, return_lse=True), expected)
    found = fi.single_prefill_with_kv_cache(batch.q[:5], k[:19], v[:19], return_lse=True, **options)
    close(found, [x[:5] for x in expected])


@pytest.mark.usefixtures("interpreted")
def test_single_decode_and_values_of_another_width(rng):
    q, k = (torch.tensor(rng.standard_normal(s)).float() for s in ((4, 24), (13, 2, 24)))
    expected = attend(as64(q)[None], as64(k), as64(k))
    found = fi.single_decode_with_kv_cache(q, k, k, return_lse=True)
    assert found[0].shape == (4, 24) and found[1].shape == (4,)
    close(found, [x[0] for x in expected])
    flipped = k.transpose(0, 1)
    close([fi.single_decode_with_kv_cache(q, flipped, flipped, "HND")], [expected[0][0]])


# ---------------------------------------------------------------------------- states, pages


def test_merging_the_states_of_halves_gives_the_state_of_all(rng):
    q = rng.standard_normal((3, 4, 24))
    k, v = rng.standard_normal((2, 20, 2, 24))
    cuts = [attend(q, k[a:b], v[a:b]) for a, b in ((0, 7), (7, 7), (7, 20))]
    states = [tuple(torch.tensor(x).float() for x in s) for s in cuts]
    expected = attend(q, k, v)
    close(fi.merge_state(*states[0], *states[2]), expected)
    stacked = [torch.stack(x, 1) for x in zip(*states, strict=True)]
    close(fi.merge_states(*stacked), expected)
    for mask in (None, torch.tensor([True, False, True])):
        o, lse = (x.clone() for x in states[0])
        fi.merge_state_in_place(o, lse, *states[2], mask)
        keep = np.zeros(3, bool) if mask is None else ~mask.numpy()
        close((o[~keep], lse[~keep]), [x[~keep] for x in expected])
        assert torch.equal(o[keep], states[0][0][keep])
        assert torch.equal(lse[keep], states[0][1][keep])
    raises("A103", fi.merge_states, states[0][0], states[0][1])


@pytest.mark.usefixtures("interpreted")
def test_cascade_of_three_levels_equals_flat(rng):
    shared, middle, own = (Batch(rng, n, [1], SHAPE) for n in ([13], [6], [5]))
    pages = torch.cat([b.pages for b in (shared, middle, own)])
    starts = np.cumsum([0, len(shared.pages), len(middle.pages)])
    # Four rows: all share the first level, two and two the second, each has keys of its own.
    middles = [middle.indices + int(starts[1]), shared.indices[:1]]
    last_of = [middle.last, torch.tensor([4], dtype=torch.int32)]
    owns = [own.indices + int(starts[2])] * 3 + [torch.empty(0, dtype=torch.int32)]
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    levels = (
        [ints(0, 4), ints(0, 2, 4), ints(0, 1, 2, 3, 4)],
        [shared.indptr, ints(0, 2, 3), ints(0, 2, 4, 6, 6)],
        [shared.indices, torch.cat(middles), torch.cat(owns)],
        [shared.last, torch.cat(last_of), ints(1, 1, 1, 0)],
    )
    q = torch.tensor(rng.standard_normal((4, 4, 24))).float()
    wrapper = fi.MultiLevelCascadeAttentionWrapper(3, WORKSPACE)
    wrapper.plan(*levels, 4, 2, 24, 4, causal=True, q_data_type="float32")
    k = [shared.keys[0], middle.keys[0], own.keys[0], shared.keys[0][:4]]
    v = [shared.values[0], middle.values[0], own.values[0], shared.values[0][:4]]
    uses = ([0, 1, 2], [0, 1, 2], [0, 3, 2], [0, 3])
    expected = [
        attend(as64(q)[r : r + 1], *(np.concatenate([x[i] for i in use]) for x in (k, v)))[0]
        for r, use in enumerate(uses)
    ]
    for cache in (pages, tuple(pages.unbind(1))):
        close([wrapper.run(q, cache)], [np.concatenate(expected)])
    raises("A103", wrapper.plan, levels[0][:2], *levels[1:], 4, 2, 24, 4)
    raises("A101", wrapper.plan, *levels, 4, 2, 24, 4, window_left=3, where="window_left")


def append_by_hand(pages, rows, batch, request, position):
    expected = pages.clone()
    for row, r, t in zip(rows, request.tolist(), position.tolist(), strict=True):
        if r >= 0:
            expected[int(batch.indices[int(batch.indptr[r]) + t // 4]), t % 4] = row
    return expected


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append(rng, layout):
    batch = Batch(rng, [9, 4, 17], [1] * 3, SHAPE)
    lengths = fi.get_seq_lens(batch.indptr, batch.last, 4)
    assert lengths.tolist() == [9, 4, 17]
    append_indptr = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    request, position = fi.get_batch_indices_positions(append_indptr, lengths, 10)
    assert request.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, -1, -1]
    assert position[:8].tolist() == [6, 7, 8, 12, 13, 14, 15, 16]
    again = [torch.empty(10, dtype=torch.int32) for _ in range(2)]
    assert fi.get_batch_indices_positions(append_indptr, lengths, 10, *again)[0] is again[0]
    new = torch.tensor(rng.standard_normal((2, 10, 2, 24))).float()
    start = torch.zeros_like(batch.pages)
    cache = start.clone() if layout == "NHD" else start.transpose(2, 3).contiguous()
    tables = (batch.indices, batch.indptr, batch.last)
    fi.append_paged_kv_cache(*new, request, position, cache, *tables, layout)
    found = cache if layout == "NHD" else cache.transpose(2, 3)
    for part in (0, 1):
        expected = append_by_hand(start[:, part], new[part], batch, request, position)
        assert torch.equal(found[:, part], expected)
    nothing = torch.full((10,), -1, dtype=torch.int32)
    before = cache.clone()
    fi.append_paged_kv_cache(*new, nothing, position, cache, *tables, layout)
    assert torch.equal(before, cache)


# ---------------------------------------------------------------------------- misuse


def test_what_is_not_supported_is_refused(rng):
    batch = Batch(rng, [9, 4], [1, 1], SHAPE)
    wrapper = decode(batch)
    run = (batch.q, batch.pages)
    for name, value in (
        ("kv_cache_sf", batch.q), ("skip_softmax_threshold_scale_factor", 1.0), ("spelt_wrong", 1),
        ("window_left", 5),
    ):  # fmt: skip
        raises("A101", wrapper.run, *run, **{name: value})
    raises("A102", wrapper.run, *run, k_scale=torch.ones(1))
    plan = (*batch.arrays(), *batch.heads(), 4)
    for name, value in (
        ("pos_encoding_mode", "ROPE_LLAMA"), ("window_right", 2), ("seq_lens", batch.last),
        ("fixed_split_size", 4), ("is_causal", True),
    ):  # fmt: skip
        raises("A101", wrapper.plan, *plan, where=name, **{name: value})
    raises("A101", wrapper.plan, *plan[:-1])
    raises("A101", wrapper.plan, *plan, "NONE")  # options by name
    both = {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 3.0}
    raises("A101", wrapper.plan, *plan, **both)
    raises("A101", fi.BatchDecodeWithPagedKVCacheWrapper, WORKSPACE, jit_args=["x"])
    raises("A101", fi.BatchDecodeWithPagedKVCacheWrapper, WORKSPACE, backend="trtllm-gen")
    raises("A107", fi.BatchDecodeWithPagedKVCacheWrapper, 128 << 20)


def test_a_run_that_does_not_fit_its_plan_is_refused(rng):
    batch = Batch(rng, [9, 4], [1, 1], SHAPE)
    fresh = fi.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    raises("A101", fresh.run, batch.q, batch.pages)
    raises("A101", fresh.forward, batch.q, batch.pages)
    wrapper = decode(batch)
    raises("A102", wrapper.run, batch.q.double(), batch.pages, where="q")
    other = decode(batch, o_data_type="float64")
    raises("A102", other.run, batch.q, batch.pages, where="out")
    raises("A103", wrapper.run, batch.q[:1], batch.pages, where="q")
    raises("A103", wrapper.run, batch.q[..., :16], batch.pages)
    raises("A103", wrapper.run, batch.q, batch.pages[:, 0], where="k")
    raises("A103", wrapper.run, batch.q, batch.pages.transpose(2, 3))  # HND unsaid
    raises("A108", wrapper.run, batch.q, batch.pages, out=batch.q)


def test_damaged_arrays_are_refused(rng):
    batch = Batch(rng, [9, 4], [1, 1], SHAPE)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)

    def plan(code, where, **changed):
        arrays = {"indptr": batch.indptr, "indices": batch.indices, "last_page_len": batch.last}
        arrays |= changed
        raises(code, wrapper.plan, *arrays.values(), *batch.heads(), 4, where=where)

    plan("A109", "kv_indptr", indptr=batch.indptr.flip(0))
    plan("A102", "kv_indices", indices=batch.indices.float())
    plan("A102", "kv_len", last_page_len=batch.last.float())
    plan("A103", "last_page_len", last_page_len=batch.last[:1])
    other = fi.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    for name, mask in (("custom_mask", torch.ones(5, dtype=torch.bool)),
                       ("packed_custom_mask", torch.ones(9, dtype=torch.bool))):  # fmt: skip
        call = (batch.qo_indptr, *batch.arrays(), *batch.heads(), 4)
        raises("A103", other.plan, *call, **{name: mask})
    for where, page, last in (("kv_indices", 99, 0), ("kv_len", 0, 4)):
        indices = batch.indices.clone()
        indices[0] += page
        wrapper.plan(
            batch.indptr, indices, batch.last + last, *batch.heads(), 4, q_data_type="float32"
        )
        raises("A109", wrapper.run, batch.q, batch.pages, where=where)


@pytest.mark.usefixtures("interpreted")
def test_int64_tables_give_the_same(rng):
    batch = Batch(rng, [9, 4], [1, 1], SHAPE)
    expected = batch.expected()
    batch.indptr, batch.indices, batch.last = (x.long() for x in batch.arrays())
    close(decode(batch).run(batch.q, batch.pages, return_lse=True), expected)
