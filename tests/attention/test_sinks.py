"""Sinks: a logit of each row in the denominator of its softmax, once, however the row is cut."""

from __future__ import annotations

import numpy as np
import pytest
from tests.attention.cases import TYPES, paged, queries
from tests.attention.test_flash_cuda import _bits, on_device

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import reference
from tilewright.attention.families import decode, portable
from tilewright.attention.spec import Spec, alone, compile_cuda
from tilewright.attention.table import TableForm
from tilewright.attention.variant import traced_of
from tilewright.errors import ProgramError
from tilewright.toolchain import compilers, nvrtc


@tw.variant
class Sinks(tw.SlidingWindow):
    sinks = tw.per_head("float32")

    def sink(self, at):
        return self.sinks[at.qo_head]


SINKS = np.array([-np.inf, 0.0, 5.0, -3.0, 40.0, 100.0], np.float32)
QO, KV = [1, 2, 0, 1, 1, 1], [7, 64, 5, 0, 3000, 20_000]


def by_hand(q, kv, window):
    """o and lse in float64: the sink is one more key, whose value is 0."""
    o, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    token = 0
    for r, (n, m) in enumerate(zip(QO, KV, strict=True)):
        keys, vals = reference.gather(kv, r)
        for position in range(m - n, m):
            seen = slice(max(0, position - window + 1), max(0, position + 1))
            for head in range(q.shape[1]):
                kv_head = head * keys.shape[1] // q.shape[1]
                s = keys[seen, kv_head] @ q[token, head].astype(np.float64) / np.sqrt(q.shape[2])
                s = np.append(s, SINKS[head])
                if s.max() > -np.inf:
                    w = np.exp(s - s.max())
                    o[token, head] = w[:-1] @ vals[seen, kv_head] / w.sum()
                    lse[token, head] = s.max() + np.log(w.sum())
            token += 1
    return o, lse


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("window", [5, 100_000])
def test_on_the_cpu(rng, window):
    """20 000 keys of one query are cut into chunks, whose partial states are merged."""
    kv = paged(rng, KV, (16, 2, 16))
    q, indptr = queries(rng, QO, 6, 16)
    attn = tw.Attention(6, 2, 16, Sinks(window=window))
    plan = attn.plan(indptr, kv)
    assert window < 100 or plan.counters
    found = attn.run(q, kv, plan, sinks=SINKS)
    o, lse = by_hand(q, kv, window)
    np.testing.assert_allclose(found.o, o, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(found.lse, lse, rtol=3e-6, atol=3e-6)
    wanted = reference.attention(q, kv, indptr, attn.variant, sinks=SINKS)
    np.testing.assert_allclose(wanted.o, o, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(wanted.lse, lse, rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("workers", [1, None])
@pytest.mark.parametrize("window", [5, 100_000])
def test_on_a_gpu(rng, kind, workers, window):
    from tilewright.runtime.cuda import DeviceArray

    kv = paged(rng, KV, (16, 2, 16), TYPES[kind])
    q, indptr = queries(rng, QO, 6, 16, TYPES[kind])
    attn, over = tw.Attention(6, 2, 16, Sinks(window=window)), on_device(kv)
    out = DeviceArray.from_numpy(np.full(q.shape, np.nan, np.float32))
    found = attn.run(
        DeviceArray.from_numpy(_bits(q), kind), over, attn.plan(indptr, over, workers=workers),
        out=out, sinks=DeviceArray.from_numpy(SINKS),
    )  # fmt: skip
    o, lse = by_hand(q, kv, window)
    error = 1e-5 if kind == "float32" else 2e-2
    np.testing.assert_allclose(reference.as_float64(found.o), o, rtol=error, atol=error)
    np.testing.assert_allclose(reference.as_float64(found.lse), lse, rtol=error, atol=error)


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_cubins_without_spills(arch):
    kinds = dtypes.bfloat16, dtypes.bfloat16, dtypes.bfloat16
    spec = Spec(8, 128, 128, *kinds, traced_of(Sinks(window=128)), TableForm())
    for text in (alone(decode.body(spec, 8, 1)), alone(portable.body(spec))):
        assert compile_cuda(text, arch).resources["stage0"].spill_bytes == 0


def test_composition():
    class Only:
        sinks = tw.per_head("float32")

        def sink(self, at):
            return self.sinks[at.qo_head]

    only = tw.variant(Only)()
    both = traced_of(tw.Causal() & tw.SlidingWindow(window=9) | only)
    assert both.sink == traced_of(only).sink and both.mask == traced_of(Sinks(window=1)).mask
    assert [v.name for v in both.values] == ["window", "sinks"]
    assert "sink = " in str(both) and "sink" not in str(tw.Causal().traced)
    with pytest.raises(ProgramError, match=r"P101.*both have a sink"):
        _ = only | Sinks(window=3)

    @tw.variant
    class Shifted(Sinks):
        def sink(self, at):
            return super().sink(at) + 1.0

    assert "+ 1" in str(traced_of(Shifted(window=3)).sink)


def test_misuse():
    def refused(code, hook, **values):
        with pytest.raises(ProgramError) as e:
            tw.variant(type("Bad", (), {"sink": hook} | values))
        assert e.value.code == code, str(e.value)

    refused("P104", lambda self, at: at.kv * 1.0)
    refused("P104", lambda self, at: self.x[at.key], x=tw.per_key("float32"))
    refused("P106", lambda self, at: at.qo < 3)
    refused("P101", lambda self, s, at: s)
    refused("P101", lambda self, at: None)
    refused("P101", None, sink=tw.per_head())
