"""Hooks of rows and attention without a softmax: against definitions written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.attention import oracle, simulated
from tests.attention.cases import TYPES, paged, queries, spec_of
from tests.attention.test_cascade import cascade
from tests.attention.test_flash_cuda import _bits, on_device

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import families, reference
from tilewright.attention import plan as plans
from tilewright.attention.families import decode, portable
from tilewright.attention.plan import ITEMS
from tilewright.attention.spec import Spec, alone, compile_cuda, params_struct
from tilewright.attention.tracing import SAME_ROW
from tilewright.attention.variant import traced_of
from tilewright.errors import ArgumentError, ProgramError
from tilewright.toolchain import compilers, nvrtc

needs_compiler = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
DIM = 32
COUNTS, LENGTHS = [1, 3, 0, 40, 1], [70, 64, 5, 300, 0]


@tw.variant
class Rotary(tw.Causal):
    """Queries and keys are rotated by their positions, in halves, as in Llama."""

    freqs = tw.per_channel()

    def rotated(self, row, at, position):
        angle = position * self.freqs[at.dim % (DIM // 2)]
        other = row[(at.dim + DIM // 2) % DIM] * tw.where(at.dim < DIM // 2, -1.0, 1.0)
        return row[at.dim] * tw.cos(angle) + other * tw.sin(angle)

    def query(self, q, at):
        return self.rotated(q, at, at.qo)

    def key(self, k, at):
        return self.rotated(k, at, at.kv)


@tw.variant
class Normed(tw.Causal):
    """Rows times a factor of the row and a weight of the channel."""

    factor, key_factor = tw.per_token("float32"), tw.per_key("float32")
    weight = tw.per_channel()

    def query(self, q, at):
        return q[at.dim] * self.factor[at.q_token] * self.weight[at.dim]

    def key(self, k, at):
        return k[at.dim] * self.key_factor[at.key] * self.weight[at.dim]


@tw.variant
class Gated(tw.Causal):
    gate = tw.per_head()

    def output(self, o, at):
        return o[at.dim] * tw.sigmoid(self.gate[at.qo_head]) + 1.0


@tw.variant
class Sigmoid(tw.Causal):
    softmax = False
    shift = tw.scalar("float32", -2.0)

    def logits(self, s, at):
        return tw.sigmoid(s + self.shift)


@tw.variant
class Turned(tw.Causal):
    """Neighbouring elements of a query swapped, and an offset that falls with its position."""

    def query(self, q, at):
        return q[at.dim ^ 1] + 1.0 / (at.qo + 2)


FREQS = (10_000.0 ** (-np.arange(DIM // 2) / (DIM // 2))).astype(np.float32)
GATES = np.array([-1.0, 0.0, 2.0, 5.0, 0.5, -3.0], np.float32)


def rotated(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows (n, heads, DIM) turned as complex numbers of their two halves."""
    low, high = rows[..., : DIM // 2], rows[..., DIM // 2 :]
    turns = np.exp(1j * positions[:, None, None] * FREQS.astype(np.float64))
    turned = (low + 1j * high) * turns
    return np.concatenate([turned.real, turned.imag], -1)


def by_hand(
    q: np.ndarray, kv: tw.KV, change: Any = None, weights: Any = None, output: Any = None
) -> np.ndarray:
    """o in float64 of causal attention. `change(q, keys, request, first)`: of the rows; `weights`:
    of scores, where there is no softmax; `output`: of a row of o and its head."""
    o, token = np.zeros(q.shape), 0
    for request, (n, m) in enumerate(zip(COUNTS, LENGTHS, strict=True)):
        keys, vals = reference.gather(kv, request)
        mine = q[token : token + n].astype(np.float64)
        if change:
            mine, keys = change(mine, keys, request, token)
        for i in range(n):
            seen = slice(0, max(m - n + i + 1, 0))
            for head in range(q.shape[1]):
                kv_head = head * keys.shape[1] // q.shape[1]
                s = keys[seen, kv_head] @ mine[i, head] / np.sqrt(q.shape[2])
                w = np.exp(s - s.max(initial=-np.inf)) if weights is None else weights(s)
                row = w @ vals[seen, kv_head]
                row = row / w.sum() if weights is None and len(s) else row
                o[token + i, head] = output(row, head) if output else row
        token += n
    return o


def cases(rng: np.random.Generator, kind: str = "float32") -> Any:
    """Each variant with its values, and o by hand."""
    kv = paged(rng, LENGTHS, (16, 2, DIM), TYPES[kind])
    q, indptr = queries(rng, COUNTS, 6, DIM, TYPES[kind])
    first = np.array(LENGTHS) - np.array(COUNTS)
    factor = rng.uniform(0.5, 2, len(q)).astype(np.float32)
    key_factor = rng.uniform(0.5, 2, (len(LENGTHS), max(LENGTHS))).astype(np.float32)
    weight = rng.uniform(-1, 1, DIM).astype(np.float32)

    def turn(q: Any, keys: Any, request: int, token: int) -> Any:
        at = first[request] + np.arange(len(q))
        return rotated(q, at), rotated(keys, np.arange(len(keys)))

    def norm(q: Any, keys: Any, request: int, token: int) -> Any:
        own = key_factor[request, : len(keys), None, None]
        return q * factor[token : token + len(q), None, None] * weight, keys * own * weight

    values = {"factor": factor, "key_factor": key_factor, "weight": weight}
    gate = 1 / (1 + np.exp(-GATES.astype(np.float64)))
    yield kv, q, indptr, Rotary(), {"freqs": FREQS}, by_hand(q, kv, turn)
    yield kv, q, indptr, Normed(), values, by_hand(q, kv, norm)
    gated = by_hand(q, kv, output=lambda row, head: row * gate[head] + 1)
    yield kv, q, indptr, Gated(), {"gate": GATES}, gated
    sums = by_hand(q, kv, weights=lambda s: 1 / (1 + np.exp(2 - s)))
    yield kv, q, indptr, Sigmoid(), {}, sums


@needs_compiler
@pytest.mark.parametrize("number", range(4))
def test_on_the_cpu(rng, number):
    kv, q, indptr, variant, values, wanted = list(cases(rng))[number]
    attn = tw.Attention(6, 2, DIM, variant)
    found = attn.run(q, kv, attn.plan(indptr, kv), **values)
    np.testing.assert_allclose(found.o, wanted, rtol=4e-5, atol=4e-5)  # angles are of float32
    exact = reference.attention(q, kv, indptr, variant, **values)
    np.testing.assert_allclose(exact.o, wanted, rtol=1e-12, atol=1e-12)
    assert (found.lse is None) == (exact.lse is None) == (variant.traced.softmax is False)


@needs_compiler
def test_without_a_compiler_it_is_the_reference(rng, monkeypatch):
    kv, q, indptr, variant, _, wanted = list(cases(rng))[3]
    attn = tw.Attention(6, 2, DIM, variant)
    monkeypatch.setattr(compilers, "has_compiler", lambda: False)
    monkeypatch.setattr(compilers, "warn_of_interpreter", lambda: None)
    found = attn.run(q, kv, attn.plan(indptr, kv))
    assert found.lse is None
    np.testing.assert_allclose(found.o, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "family"), [("float32", "portable"), ("bfloat16", "portable"), ("bfloat16", "tiles")]
)
@pytest.mark.parametrize("number", range(4))
def test_on_a_gpu(rng, monkeypatch, number, kind, family):
    """NaN is where no key is, and in a page that nobody has."""
    from tilewright.runtime.cuda import DeviceArray

    kv, q, indptr, variant, values, wanted = list(cases(rng, kind))[number]
    there, attn = on_device(kv), tw.Attention(6, 2, DIM, variant)
    if (kind, family) == ("bfloat16", "portable"):
        monkeypatch.setattr(families, "FAMILIES", (portable.FAMILY,))
    out = DeviceArray.from_numpy(np.full(q.shape, np.nan, np.float32))
    plan = attn.plan(indptr, there, q_dtype=kind)
    assert plan.family == family
    arrays: dict[str, Any] = {n: DeviceArray.from_numpy(x) for n, x in values.items()}
    found = attn.run(DeviceArray.from_numpy(_bits(q), kind), there, plan, out=out, **arrays)
    error = 6e-5 if family == "portable" else 3e-2  # rows and weights are rounded to 8 bits
    np.testing.assert_allclose(found.o.to_numpy(), wanted, rtol=error, atol=error)
    assert (found.lse is None) == (variant.traced.softmax is False)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [DIM, 256])
def test_decode_steps_in_a_workspace(rng, dim):
    """Rows of queries and outputs in the decode kernel, planned on the GPU: one request is cut."""
    from tilewright.runtime.cuda import DeviceArray

    lengths = [9000, 0, 65, 1]
    kv = paged(rng, lengths, (16, 2, dim), TYPES["bfloat16"])
    q, indptr = queries(rng, [1] * 4, 6, dim, TYPES["bfloat16"])
    there, attn = on_device(kv), tw.Attention(6, 2, dim, Turned() | Gated())
    room = attn.reserve(4, kv=there)
    room.plan(there.table)
    values: dict[str, Any] = {"gate": DeviceArray.from_numpy(GATES)}
    out = DeviceArray.from_numpy(np.full(q.shape, np.nan, np.float32))
    found = attn.run(DeviceArray.from_numpy(_bits(q), "bfloat16"), there, room, out=out, **values)
    room.check()
    turn = q.astype(np.float64).reshape(4, 6, -1, 2)[..., ::-1].reshape(q.shape)
    turn = turn + 1.0 / (np.array(lengths)[:, None, None] + 1)
    turn = turn.astype(TYPES["bfloat16"])  # the operand of tensor cores
    plain = reference.attention(turn, kv, indptr, tw.Causal())
    wanted = plain.o / (1 + np.exp(-GATES.astype(np.float64)))[:, None] + 1
    np.testing.assert_allclose(found.o.to_numpy(), wanted, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(found.lse.to_numpy(), plain.lse, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------- the portable kernel


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_cubins_without_spills(arch):
    for variant, dim, kind in (
        (Rotary(), 128, "bfloat16"),
        (Normed(), 80, "float16"),
        (Gated() | Sigmoid(), 256, "bfloat16"),
    ):
        for tiles in (False, True):
            text = alone(portable.body(spec_of(4, dim, kind, kind, variant), tiles))
            assert compile_cuda(text, arch).resources["stage0"].spill_bytes == 0
    for variant, dim, blocks in ((Turned() | Gated(), 128, 1), (Turned() | Gated(), 256, 2)):
        text = alone(decode.body(spec_of(4, dim, "bfloat16", "bfloat16", variant), 2, blocks))
        assert compile_cuda(text, arch).resources["stage0"].spill_bytes <= 64 * (arch == "sm_80")


def portable_result(case: oracle.Case, seed: int) -> None:
    """The kernel of CUDA cores on simulated warps: what the oracle says."""
    attn, table = oracle.attention_of(case), oracle.table_of(case)
    k, v = (x[:, 0] if case.form == "ragged" else x for x in (case.k, case.v))
    kv, traced = tw.KV(table, tw.Pool(k, v)), attn.variant.traced
    q, cache = (dtypes.ALL[x.dtype.name] for x in (case.q, case.k))
    spec = Spec(attn.group, *case.dims, q, cache, dtypes.float32, traced, table.form,
                attn.scale > 0)  # fmt: skip
    known = {n: x for n, x in attn.variant.fixed if np.isscalar(x)}
    shape = plans.Shape("portable", attn.kv_heads, attn.group, traced.mask, known,
                        portable.FAMILY.qo_tile(spec), "", 0, None)  # fmt: skip
    lengths = kv.lengths()
    plan = plans.make(case.qo_indptr, lengths, shape, 7, table.tree(lengths))
    o, lse, numbers, _kept = simulated.arguments(case, attn, kv, plan.tokens)
    numbers |= {} if case.softmax else {"lse": 0}
    work = {"qo_indptr": plan.qo_indptr.ctypes.data, "items": plan.items.ctypes.data}
    block = params_struct(spec, ITEMS).pack(**numbers, **work)
    run = simulated.kernel(alone(portable.body(spec), "stage0", "TW_UNALIGNED"))
    simulated.launch(run, block, portable.THREADS, len(plan.items), seed, (o, lse))
    oracle.compare(case, o, lse if case.softmax else None, 4e-6)


@needs_compiler
@pytest.mark.parametrize("rows", [name for name in oracle.ROWS if name])
@pytest.mark.parametrize("softmax", [True, False])
def test_on_simulated_warps(rng, rows, softmax):
    """The text of the CUDA kernel, its threads run one after the other, against the oracle."""
    dim = 40 if softmax else 33  # loads of 16 bytes, and of one element
    shape = (3, 2, dim, np.float16, "window", "scores" if softmax else "softcap", "")
    case = cascade(rng, shape, [3, 1, 0, 9], [], [70, 40, 5, 130], 7)
    values = oracle.draw_row_values(rng, oracle.ROWS[rows][2], case.heads, (4, 13, 90))
    case = replace(case, rows=rows, softmax=softmax, values=case.values | values)
    portable_result(case, 5)


# ---------------------------------------------------------------------------- families and states


def test_families_say_what_they_do_not_host():
    spec = spec_of(4, 128, "bfloat16", "bfloat16", Rotary() | Sigmoid())
    reasons = {f.name: f.reason(spec, 4, None) for f in families.FAMILIES}
    assert not reasons["portable"] and not reasons["cpu"]
    text = "a hook of query rows and a hook of key rows and no softmax"
    assert reasons["hopper"] == f"the variant has {text}" and not reasons["tiles"]
    narrow = spec_of(4, 128, "float16", "float16", Sigmoid() | Gated())
    assert families.by_name("tiles").reason(narrow, 4, None) == "the variant has no softmax"
    assert reasons["decode"] == "the variant has a hook of key rows and no softmax"
    ends = spec_of(4, 128, "bfloat16", "bfloat16", Gated() | Turned())
    assert not families.by_name("decode").reason(ends, 4, None)
    ends = replace(ends, table=replace(ends.table, shared=1))
    assert "query rows" in families.by_name("decode").reason(ends, 4, None)
    shared = replace(spec_of(4, 128, "float32", "float32", Normed()),
                     table=replace(spec.table, shared=1))  # fmt: skip
    assert "at.request" in families.by_name("cpu").reason(shared, 4, None)
    turned = replace(shared, traced=Rotary().traced)
    assert not families.by_name("cpu").reason(turned, 4, None)


def test_a_workspace_refuses_them():
    with pytest.raises(ArgumentError, match=r"A103.*hook of key rows"):
        tw.Attention(8, 2, 64, Rotary()).reserve(4)
    with pytest.raises(ArgumentError, match=r"A103.*no softmax"):
        tw.Attention(8, 2, 64, Sigmoid()).reserve(4)
    with pytest.raises(ArgumentError, match=r"A103.*hook of query rows"):
        tw.Attention(8, 2, 64, Turned()).reserve(4, shared=1)


@needs_compiler
def test_states_without_a_softmax_add_and_do_not_merge(rng):
    kv, q, indptr, variant, _, _ = list(cases(rng))[3]
    attn = tw.Attention(6, 2, DIM, variant)
    state = attn.run(q, kv, attn.plan(indptr, kv))
    assert "lse None" in repr(state)
    with pytest.raises(ArgumentError, match=r"A107.*no lse(?s:.*)a\.o \+ b\.o"):
        tw.merge((state, state))
    with pytest.raises(ArgumentError, match="A107"):
        tw.State.empty(1, 6, DIM).merge(state)


# ---------------------------------------------------------------------------- tracing


def refused(code: str, text: str = "", **members: Any) -> None:
    with pytest.raises(ProgramError, match=text) as e:
        tw.variant(type("Bad", (), members))
    assert e.value.code == code, str(e.value)


def test_misuse():
    refused("P101", "is not def query", query=lambda self, at: 1.0)
    refused("P101", "is not def key", key=lambda self, k: k[0])
    refused("P101", "is not def output", output=lambda self, o, s, at: o[at.dim])
    refused("P101", "returns nothing", output=lambda self, o, at: None)
    refused("P101", "cannot be traced", query=lambda self, q, at: q * 2.0)
    refused("P106", "no int32", query=lambda self, q, at: q[0.5])
    refused("P106", "no int32", query=lambda self, q, at: q[at.dim * 1.5])
    refused("P106", "no int32", query=lambda self, q, at: q[at.dim < 3])
    refused("P106", "query", query=lambda self, q, at: at.dim < 3)
    refused("P104", "key of Bad reads at.qo", key=lambda self, k, at: k[at.dim] * at.qo)
    refused("P104", "reads at.qo_head", key=lambda self, k, at: k[at.qo_head])
    refused("P104", "reads at.q_token", key=lambda self, k, at: k[at.dim] * self.x[at.q_token],
            x=tw.per_token())  # fmt: skip
    for name in ("query", "output"):
        refused("P104", "reads at.kv", **{name: lambda self, row, at: row[at.dim] * at.kv})
        refused("P104", "reads at.key", x=tw.per_key(),
                **{name: lambda self, row, at: row[at.dim] * self.x[at.key]})  # fmt: skip
    score: list[Any] = []

    def keep(self, s, at):
        score.append(s)
        return s

    refused("P104", "reads s", logits=keep, query=lambda self, q, at: q[at.dim] * score[-1])
    refused("P104", "reads at.dim", logits=lambda self, s, at: s * at.dim)
    refused("P104", "reads at.dim", mask=lambda self, at: at.dim < 3)
    refused("P104", "x", logits=lambda self, s, at: s * self.x[3], x=tw.per_channel())
    refused("P106", "no int32", query=lambda self, q, at: self.x[0.5], x=tw.per_channel())
    refused("P106", "softmax of variant Bad is 'no'", softmax="no")
    refused("P106", "softmax", softmax=0)
    refused("P101", "no softmax", softmax=False, sink=lambda self, at: 1.0)
    for name in ("query", "key", "output", "softmax", "row"):
        refused("P101", "is named", **{name: tw.scalar()})
    refused("P101", "did you mean query", querys=lambda self, q, at: q[at.dim])


def test_composition(rng):
    @tw.variant
    class Turned:
        def query(self, q, at):
            return q[at.dim ^ 1] + at.qo

    @tw.variant
    class Twice:
        def query(self, q, at):
            return q[at.dim] * 2.0 + q[at.dim + 1]

        def output(self, o, at):
            return -o[at.dim]

    rows = rng.standard_normal((3, 4))
    qo = np.arange(3)[:, None]
    both = traced_of(tw.Causal() & Turned() & Twice())
    first = rows[:, [1, 0, 3, 2]] + qo
    then = first * 2 + np.concatenate([first[:, 1:], qo], 1)  # the row is 0 outside, the hook adds
    found = reference._changed(both.query, rows, {"at.qo": qo}, {})
    np.testing.assert_allclose(found, then)
    assert both.key == SAME_ROW != both.output and both.mask == tw.Causal().traced.mask
    assert traced_of(tw.Full() | Twice()).output == Twice.traced.output

    class Negated(Twice):
        def output(self, o, at):
            return super().output(o, at) + super().key(o, at)

    assert str(tw.variant(Negated).traced.output) == "-row[at.dim] + row[at.dim]"


def test_composition_of_softmax():
    @tw.variant
    class On:
        softmax = True

    @tw.variant
    class Sunk:
        def sink(self, at):
            return 1.0

    composed = traced_of(tw.Causal() & tw.SlidingWindow(window=3) | Sigmoid())
    assert composed.softmax is False and [v.name for v in composed.values] == ["window", "shift"]
    assert traced_of(On() | tw.Softcap()).softmax is True
    for a, b in ((On(), Sigmoid()), (Sigmoid(), On()), (Sunk(), Sigmoid()), (Sigmoid(), Sunk())):
        with pytest.raises(ProgramError, match=r"P101.*no softmax"):
            _ = a & b
    assert "softmax = False" in str(Sigmoid.traced) and "output = " in str(Gated.traced)
