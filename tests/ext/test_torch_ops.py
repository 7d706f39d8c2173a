"""The operators of torch.library: right, and sound for torch.compile and opcheck."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.ext.oracle import Batch, as64, close

import tilewright as tw
from tilewright.errors import ArgumentError
from tilewright.ext import torch_ops
from tilewright.ext.variants import Sinks
from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
SHAPE = (4, 4, 2, 24)
OPS = torch.ops.tilewright


def inputs(rng, kv=(9, 1, 14), qo=(1, 1, 1)):
    """A batch, its pages and its table."""
    batch = Batch(rng, list(kv), list(qo), SHAPE)
    k, v = (x.contiguous() for x in batch.pages.unbind(1))
    lengths = torch.tensor(batch.kv_lens, dtype=torch.int32)
    return batch, (k, v), (lengths, batch.indptr, batch.indices)


def natural(expected):
    return expected[0], expected[1] * np.log(2)


def test_attention_is_right_and_passes_opcheck(rng):
    batch, pages, table = inputs(rng, qo=(3, 1, 5))
    operator = torch_ops.operator(tw.Attention(4, 2, 24))
    assert operator is torch_ops.operator(tw.Attention(4, 2, 24))
    found = operator(batch.q, *pages, table, batch.qo_indptr)
    close(found, natural(batch.expected(causal=True)))
    arguments = (batch.q, *pages, list(table), batch.qo_indptr, [], operator.key)
    torch.library.opcheck(OPS.attend.default, arguments)


@pytest.mark.usefixtures("interpreted")
def test_values_of_the_variant_come_by_name(rng):
    batch, pages, table = inputs(rng)
    operator = torch_ops.operator(tw.Attention(4, 2, 24, tw.Causal() | Sinks()))
    sinks = torch.tensor(rng.standard_normal(4)).float()
    found = operator(batch.q, *pages, table, sinks=sinks)
    close(found, natural(batch.expected(sinks=as64(sinks))))
    for values in ({}, {"slopes": sinks}):
        with pytest.raises(ArgumentError, match="A101"):
            operator(batch.q, *pages, table, **values)


def test_append_and_merge_pass_opcheck(rng):
    _, (k, v), table = inputs(rng)
    new = torch.tensor(rng.standard_normal((2, 3, 2, 24))).float()
    request, position = torch.tensor([0, -1, 2]), torch.tensor([8, 0, 3])
    arguments = (k, v, *new, request, position, list(table[1:]))
    torch.library.opcheck(OPS.append.default, arguments)
    halves = [(torch.randn(3, 4, 24), torch.randn(3, 4)) for _ in range(2)]
    arguments = ([o for o, _ in halves], [lse for _, lse in halves])
    torch.library.opcheck(OPS.merge.default, arguments)


def test_append_by_block_table(rng):
    k = torch.zeros(5, 4, 2, 24)
    v, new = k.clone(), torch.tensor(rng.standard_normal((2, 3, 2, 24))).float()
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    request, position = torch.tensor([1, 0, -1]), torch.tensor([6, 2, 9])
    torch_ops.append(k, v, *new, request, position, [table])
    assert torch.equal(k[4, 2], new[0, 0]) and torch.equal(v[3, 2], new[1, 1])
    assert k.count_nonzero() == v.count_nonzero() == 96

    def raises(code, *arguments):
        with pytest.raises(ArgumentError) as caught:
            torch_ops.append(k, v, *arguments)
        assert caught.value.code == code

    raises("A109", *new, request.clamp(min=0), position + 6, [table])
    raises("A109", *new, request + 1, position, [table])
    raises("A109", *new, request, position - 3, [table])
    before = k.clone()
    torch_ops.append(k, v, *new, request * 0 - 1, position, [table])
    torch_ops.append(k, v, *new[:, :0], request[:0], position[:0], [table])
    assert torch.equal(k, before)
    raises("A103", *new[:, :2], request, position, [table])
    raises("A103", *new, request, position.float(), [table])
    raises("A103", *new.half(), request, position, [table])
    raises("A103", new[0], new[1, :2], request, position, [table])
    for tables in ([], [table, table], [table[0]], [table[0]] * 3):
        raises("A103", *new, request, position, tables)
    for wrong in (v[:3], v[:, :3]):
        with pytest.raises(ArgumentError, match="A103"):
            torch_ops.append(k, wrong, *new, request, position, [table])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_layer_compiles_whole(rng, backend):
    batch, (k, v), table = inputs(rng)
    operator = torch_ops.operator(tw.Attention(4, 2, 24))
    position = table[0] - 1
    rows = torch.arange(3)
    new = [
        torch.stack([torch.tensor(x[-1]).float() for x in y]) for y in (batch.keys, batch.values)
    ]

    def layer(q, k, v, key, value):
        torch_ops.append(k, v, key * 2, value, rows, position, list(table[1:]))
        state = operator(q * 1.0, k, v, table)
        return torch_ops.merge([state[0]] * 2, [state[1]] * 2)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for r in range(3):
        batch.keys[r][-1] *= 2
    expected = natural(batch.expected())
    found = compiled(batch.q, k, v, *new)
    close(found, (expected[0], expected[1] + np.log(2)))  # a state merged with itself


def test_misuse_has_coded_errors(rng):
    batch, pages, table = inputs(rng)
    with pytest.raises(ArgumentError, match="A107"):
        torch_ops.operator("causal")
    sums = tw.variant(type("Sums", (), {"softmax": False}))()
    with pytest.raises(ArgumentError, match=r"A107.*no lse"):
        torch_ops.operator(tw.Attention(4, 2, 24, sums))
    with pytest.raises(ArgumentError, match="A101"):
        torch_ops.operator(tw.Attention(4, 2, 24)).plan(table)
    with pytest.raises(ArgumentError, match="A103"):
        torch_ops.operator(tw.Attention(4, 2, 32))(batch.q, *pages, table)
    for tensors in ((), (*table, table[0])):
        with pytest.raises(ArgumentError, match="A103"):
            torch_ops.operator(tw.Attention(4, 2, 24))(batch.q, *pages, tensors)
    with pytest.raises(ArgumentError, match="A103"):
        torch_ops.merge([batch.q] * 2, [batch.q[..., 0]])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_are_refused_not_lost(rng, backend):
    """A graph that torch compiles would not ask again, so its trace is refused."""
    batch, (k, v), table = inputs(rng)
    operator = torch_ops.operator(tw.Attention(4, 2, 24))
    o, lse = operator(batch.q, k, v, table)
    new, at = torch.zeros(3, 2, 24), torch.zeros(3, dtype=torch.int32)

    def append(key):
        torch_ops.append(k, v, key, new, at, at, list(table[1:]))

    for act, x in (
        (lambda q: operator(q, k, v, table)[0], batch.q),
        (lambda o: torch_ops.merge([o, o], [lse, lse])[0], o),
        (append, new),
    ):
        recorded, compiled = x.clone().requires_grad_(), torch.compile(act, backend=backend)
        before = k.clone()
        with pytest.raises(ArgumentError, match="A111"):
            act(recorded)
        with pytest.raises(RuntimeError, match="A111"):
            torch.compile(act, fullgraph=True, backend=backend)(recorded)
        torch.testing.assert_close(k, before, rtol=0, atol=0, equal_nan=True)
        with torch.no_grad():
            compiled(recorded)
