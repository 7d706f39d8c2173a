"""Plans: every query once, balanced, frozen; damaged ones are refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import zipfile
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.attention.cases import paged

from tilewright.attention import families, planner, ranges
from tilewright.attention import plan as plans
from tilewright.attention.batch import Attention
from tilewright.attention.families import hopper
from tilewright.attention.plan import Plan, Shape
from tilewright.attention.variant import Causal, Full, SlidingWindow
from tilewright.errors import ArgumentError

batches = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 2000)), max_size=8)


def shape_of(variant, **more):
    made = Shape("cpu", 2, 3, variant.traced.mask, dict(variant.fixed), 32, "request", 0)
    return dataclasses.replace(made, **more)


def make(batch, workers=2, variant=None, **more):
    indptr = np.cumsum([0, *(q for q, _ in batch)])
    lengths = np.array([n for _, n in batch], np.int64)
    return plans.make(indptr, lengths, shape_of(variant or Causal(), **more), workers)


@given(batches, st.integers(1, 200), st.sampled_from(["", "request", "batch"]))
def test_every_query_of_every_head_once(batch, workers, splits):
    plan = make(batch, workers, splits=splits)
    plans.check(plan)
    done = np.zeros((plan.tokens, plan.kv_heads))
    for item in plan.items:
        done[item["qo_begin"] : item["qo_end"], item["kv_head"]] += 1 / item["chunks"]
    np.testing.assert_allclose(done, 1)
    if not splits:
        assert plan.slots == plan.counters == 0


@given(batches, st.integers(1, 9))
def test_save_and_load(batch, workers):
    plan = make(batch, workers)
    again = Plan.load(plan.save())
    assert again == plan and hash(again) == hash(plan) and repr(again) == repr(plan)
    assert not again.items.flags.writeable


def test_it_prints_and_compares(rng):
    kv = paged(rng, [100, 40, 1], (16, 2, 64))
    attn = Attention(6, 2, 64)
    plan = attn.plan([0, 1, 2, 3], kv, workers=2)
    assert str(plan).startswith("Plan(cpu): 3 requests, ")
    assert ", 2 workers, imbalance " in str(plan)
    assert plan == attn.plan([0, 1, 2, 3], kv, workers=2) != attn.plan([0, 2, 2, 3], kv, workers=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.workers = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        plan.items["chunk"] = 1


def test_lengths_that_the_host_knows(rng):
    """The plan of a table with such lengths, which those of the table are not."""
    attn, wanted, other = Attention(6, 2, 64), [9000, 40, 1], [7, 7, 7]
    indptr = np.array([0, 5, 6, 7])
    kv, longer = (paged(rng, lengths, (16, 2, 64)) for lengths in (other, wanted))
    assert attn.plan(indptr, kv, lengths=np.array(wanted)) == attn.plan(indptr, longer)
    assert attn.plan(indptr, kv) != attn.plan(indptr, longer)
    wrong: Any
    for wrong, code in (
        ([9000, 40, 1], "A107"), (np.array([9000, 40]), "A103"), (np.array([1.0, 2, 3]), "A102"),
        (np.array([9000, 40, -1]), "A109"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError) as e:
            attn.plan(indptr, kv, lengths=wrong)
        assert e.value.code == code and e.value.where == "lengths"


def test_work_is_cut_until_it_balances():
    skewed = [(1, 50), (1, 16000), (1, 300), (1, 20)]
    assert make(skewed, 8).imbalance < 1.3
    assert make(skewed, 8, splits="").imbalance > 3


HOPPER = {"qo_tile": 32, "splits": "batch", "order": hopper.order, "few": 8, "group": 4}


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9000)), max_size=8), st.integers(1, 200)
)
@example([(1, 5003), (1, 4200)], 1)
@example([(32, 5000), (1, 5000)], 1)
def test_items_of_few_rows_come_last(batch, workers):
    plan = make(batch, workers, **HOPPER)
    few = np.diff(plan.qo_indptr)[plan.items["request"]] <= 2
    assert (np.diff(few.astype(int)) >= 0).all() and (plan.narrow > 0) == few.any()
    assert plan.narrow <= few.sum() and 2 * plan.narrow <= workers + 1
    assert Plan.load(plan.save()) == plan != dataclasses.replace(plan, narrow=plan.narrow + 1)
    refused_with(plan, narrow=-1)
    assert not make(batch, workers, **HOPPER | {"few": 0}).narrow


def test_workers_by_their_share_and_a_last_round_that_is_cut():
    """A chunk of 2048 queries on 16k beside 64 single tokens on 4k, as 132 workers take them."""
    plan = make([(2048, 16384)] + [(1, 4096)] * 64, 132, kv_heads=8, **HOPPER)
    wide = plan.items[plan.items["request"] == 0]
    items, rest = 64 * 8, 64 * 8 % (132 - plan.narrow)
    assert plan.narrow == 18 and f"132 workers ({plan.narrow} narrow)" in str(plan)
    assert rest <= (wide["chunks"] > 1).sum() / wide["chunks"].max() < rest + 8
    assert (wide["chunk"] == 0).sum() == items
    assert (wide["chunks"][: items - rest - 8] == 1).all()
    alone = make([(2048, 16384)], 132, kv_heads=8, **HOPPER)
    assert alone.slots == alone.narrow == 0


def test_longest_first():
    items = make([(1, 10), (64, 900), (1, 400)], splits="").items
    assert items["request"][0] == 1 and items["request"][-1] == 0


@given(st.integers(1, 80), st.integers(0, 900), st.integers(1, 200))
def test_visible_tiles_are_those_with_a_score(qo_len, kv_len, window):
    first = np.array([kv_len - qo_len], np.int64)
    last, length = first + qo_len - 1, np.array([kv_len], np.int64)
    qo, kv = np.arange(first[0], last[0] + 1)[:, None], np.arange(kv_len)[None]
    for variant, seen in (
        (Full(), np.ones((qo_len, kv_len), bool)),
        (Causal(), kv <= qo),
        (SlidingWindow(window=window), (kv <= qo) & (qo - kv < window)),
    ):
        found = int(planner.visible_tiles(first, last, length, shape_of(variant))[0])
        columns = np.logical_or.reduce(seen, axis=0)
        wanted = sum(columns[t : t + ranges.TILE].any() for t in range(0, kv_len, ranges.TILE))
        assert found == wanted


# ---------------------------------------------------------------------------- damage


def refused(data):
    with pytest.raises(ArgumentError) as e:
        Plan.load(data)
    assert e.value.code in ("A107", "A109")


def refused_with(plan, **changed):
    """A changed plan is refused when it is made, and when it is loaded."""
    with pytest.raises(ArgumentError, match="A109"):
        dataclasses.replace(plan, **changed)
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.init}
    fields |= changed
    refused(Plan(**fields, planned=True).save())


def test_bytes_that_are_no_plan():
    good = make([(3, 700), (1, 9000)]).save()
    for data in (b"", b"PK\x03\x04", good[:-30], good[: len(good) // 2], b"\x80\x04."):
        refused(data)
    file = io.BytesIO()
    np.savez(file, items=np.zeros(3, np.int32))
    refused(file.getvalue())
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    refused(file.getvalue())
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    deep = "-" * 5000
    large = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({10**15},)}}"
    for header in (deep, large, "{", None):
        for name in ("numbers.npy", "items.npy", "imbalance.npy"):
            text = (header or "").encode()
            size = len(text).to_bytes(2, "little")
            data = b"\x93NUMPY\x01\x00" + size + text if header else b"no array"
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for other, stored in (parts | {name: data}).items():
                    archive.writestr(other, stored)
            refused(file.getvalue())


@given(st.data())
def test_damaged_items_are_refused(data):
    """Any one number of any item changed."""
    plan = make([(40, 700), (1, 9000), (1, 30)], workers=4)
    items = plan.items.copy()
    row = data.draw(st.integers(0, len(items) - 1))
    name = data.draw(st.sampled_from([f.name for f in plans.ITEM.fields]))
    items[name][row] += data.draw(st.sampled_from([-(2**30), -1, 1, 2, 33, 2**30]))
    refused_with(plan, items=items)


def test_missing_and_doubled_items_are_refused():
    plan = make([(40, 700), (1, 9000)], workers=4)
    for items in (plan.items[1:], plan.items[:-1], np.append(plan.items, plan.items[:1])):
        refused_with(plan, items=items)
    refused_with(plan, items=plan.items[:0])
    refused_with(plan, slots=plan.slots - 1)
    refused_with(plan, slots=2**31 - 1)  # its work space would take all memory
    refused_with(plan, counters=0)
    refused_with(plan, qo_tile=16)
    refused_with(plan, kv_heads=0)
    wraps = np.array([0, 2**31 - 1, -(2**31), -1, 41], np.int32)
    with pytest.raises(ArgumentError, match="does not rise"):
        dataclasses.replace(plan, qo_indptr=wraps)


@pytest.mark.parametrize(
    "changed",
    [
        {"items": None}, {"items": [1]}, {"items": np.zeros(8, np.int32)}, {"qo_indptr": [0, 1]},
        {"qo_indptr": np.zeros((1, 1), np.int32)}, {"qo_indptr": np.zeros(0, np.int32)},
        {"workers": "3"}, {"workers": 2.0}, {"slots": None}, {"family": 5}, {"imbalance": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_other_types_are_refused(changed):
    with pytest.raises(ArgumentError, match="A109"):
        dataclasses.replace(make([(40, 700)]), **changed)


def test_a_plan_of_another_family_is_refused(rng):
    kv, attn = paged(rng, [100, 40], (16, 2, 64)), Attention(6, 2, 64)
    plan, q = attn.plan([0, 1, 2], kv), np.zeros((2, 6, 64), np.float32)
    none = plan.items[:0]
    cuts = ranges.cut(np.array([100, 40]), 2, 8)
    other = dataclasses.replace(plan, items=none, cuts=cuts, slots=0, counters=0)
    for wrong in (dataclasses.replace(plan, family="zzz"), other):
        with pytest.raises(ArgumentError, match=r"A109.*damaged"):
            attn.run(q, kv, wrong)


def test_a_plan_keeps_what_was_checked():
    plan = make([(40, 700), (1, 9000)], workers=4)
    items = plan.items.copy()
    again = dataclasses.replace(plan, items=items)
    items["request"] = 10**8
    assert again == plan
    for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan and not other.items.flags.writeable


# ---------------------------------------------------------------------------- bad arguments


def test_bad_arguments_of_plan_and_run(rng):
    kv, attn = paged(rng, [100, 40], (16, 2, 64)), Attention(6, 2, 64)
    bad = [("A103", "workers", {"workers": w}) for w in ("3", 2.5, 0, True, 10**12)]
    indptrs = [("A107", [[1], [2, 3]]), ("A103", None), ("A103", "abc"), ("A109", [0, 2, 1])]
    wraps = np.array([0, -(2**63), 3], np.int64)
    bad += [(code, "qo_indptr", {"qo_indptr": x}) for code, x in [*indptrs, ("A109", wraps)]]
    for code, where, changed in bad:
        with pytest.raises(ArgumentError) as e:
            attn.plan(**cast(Any, {"qo_indptr": [0, 1, 2], "kv": kv} | changed))
        assert (e.value.code, e.value.where) == (code, where), str(e.value)
    assert attn.plan([0, 1, 2], kv, workers=np.int64(3)).workers == 3  # pyright: ignore[reportArgumentType]
    q = np.zeros((2, 6, 64), np.float32)
    for plan in (None, 5):
        with pytest.raises(ArgumentError, match="A107"):
            attn.run(q, kv, plan)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("scale", ["x", float("nan"), float("inf"), 10**400, True, [1.0]], ids=str)
def test_bad_scales(scale):
    with pytest.raises(ArgumentError, match="A102"):
        Attention(6, 2, 64, sm_scale=scale)


def test_numbers_of_numpy_are_numbers():
    numbers: list[Any] = [np.int64(6), np.int32(2), np.int64(64), Causal(), np.float32(0.5)]
    attn = Attention(*numbers)
    assert attn == Attention(6, 2, 64, sm_scale=0.5) and attn.scale == 0.5
    with pytest.raises(ArgumentError, match="A103"):
        Attention(True, 1, 64)


@pytest.mark.parametrize("q_dtype", [None, "float16", np.float32, "torch"])
def test_the_family_is_chosen_for_the_dtype_of_the_queries(rng, monkeypatch, q_dtype):
    """A family for 16-bit products must not get a plan that float32 queries then fail with."""
    wanted = {None: "float32", "float16": "float16", np.float32: "float32"}.get(q_dtype, "bfloat16")
    more: list[Any] = []
    if q_dtype == "torch":
        torch = pytest.importorskip("torch")
        q_dtype, more = torch.bfloat16, [torch.zeros(2, 4)]
    kv, chosen, choose = paged(rng, [20], (20, 2, 16)), [], families.choose

    def spy(spec, *rest):
        chosen.append((spec.q.name, spec.kv.name, spec.o.name))
        return choose(spec, *rest)

    monkeypatch.setattr(families, "choose", spy)
    attn = Attention(2, 2, 16)
    attn.plan(np.array([0, 1]), kv, q_dtype=q_dtype)
    assert chosen == [(wanted, "float32", wanted)]
    for wrong in ("int8", "complex64", object(), *more):
        with pytest.raises(ArgumentError, match="A102"):
            attn.plan(np.array([0, 1]), kv, q_dtype=wrong)
        with pytest.raises(ArgumentError, match="A102"):
            attn.resolve(kv, q_dtype=wrong)
    wrongs: list[Any] = ["x", -1, 1.5, True]
    for wrong in wrongs:
        with pytest.raises(ArgumentError, match="A103"):
            attn.resolve(kv, qo_len=wrong)
