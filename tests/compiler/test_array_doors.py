"""Arrays at the door of a kernel: dtypes of outputs, odd strides, how a structure prints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import spmm
from tests.compiler.test_doors import TARGETS, matrix

import tilewright as tw
from tilewright.errors import ArgumentError


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_hint_for_an_output_of_another_dtype(rng, target, sparse):
    """`typed` takes parameters; an output has its dtype from the program."""

    def made(how):
        @tw.program
        def scaled(A=tw.sparse("m n"), x=tw.dense("n")):
            i, j = tw.indices("m n")
            if sparse:
                return how.like(A)[i, j](A[i, j] * x[j])
            return how[i](tw.sum(A[i, j] * x[j], over=j))

        return scaled.build(target)

    A, x = tw.csr().pack(matrix(rng)), rng.uniform(1, 2, 9).astype(np.float32)
    wide: Any = A.with_values(np.zeros(A.nnz), dtype="float64") if sparse else np.zeros(9)
    with pytest.raises(ArgumentError) as caught:
        made(tw.out)(A, x, out=wide)
    assert caught.value.code == "A102" and ".typed(out=" not in caught.value.hint
    assert 'tw.out.typed("float64")' in caught.value.hint
    made(tw.out.typed("float64"))(A, x, out=wide)
    got, wanted = (wide.dense(), A.dense() * x) if sparse else (wide, A.dense() @ x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_an_odd_stride_of_one_column(rng, target):
    A, kernel = tw.csr().pack(matrix(rng)), spmm.build(target)
    x = rng.standard_normal((9, 1)).astype(np.float32)
    odd = np.lib.stride_tricks.as_strided(x, (9, 1), (4, 3))
    out = np.lib.stride_tricks.as_strided(np.full(9, np.nan, np.float32), (9, 1), (4, 7))
    for _ in range(2):
        kernel(A, odd, out=out)
        np.testing.assert_allclose(out, A.dense() @ x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", [tw.csr(), tw.bsr(2), tw.hyb(2, (1, 2))], ids=str)
def test_a_structure_prints_as_one_line(rng, fmt):
    packed = fmt.pack(matrix(rng, 300, 200))
    for text in (str(packed.structure), repr(packed.structure)):
        assert "\n" not in text and len(text) < 120
        assert str(fmt) in text and "300×200" in text and f"{packed.nnz} entries" in text
    for part in packed.structure.parts:
        assert "\n" not in repr(part) and "array" not in repr(part) and len(repr(part)) < 120


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_are_refused_not_lost(rng, target):
    """Of dense arguments, outputs and numbers, by calls and `bind`, also where a call of the same
    layout was allowed before."""
    torch = pytest.importorskip("torch")

    @tw.program
    def scaled(A=tw.sparse("m n"), x=tw.dense("n"), alpha=tw.scalar()):
        i, j = tw.indices("m n")
        return tw.out[i](alpha * tw.sum(A[i, j] * x[j], over=j))

    A, kernel = tw.csr().pack(matrix(rng)), scaled.build(target)
    x, y, two = torch.randn(9), torch.empty(9), torch.tensor(2.0)
    leaf, number = x.clone().requires_grad_(), two.clone().requires_grad_()
    wanted = 2 * A.dense() @ x.numpy()
    for _ in range(2):
        with torch.no_grad():
            for call in (kernel(A, leaf, number), kernel.bind(A, leaf, number)()):
                assert not call.requires_grad
                np.testing.assert_allclose(call.numpy(), wanted, rtol=1e-5, atol=1e-5)
        for name, args, out in (
            ("x", (A, leaf, two), None),
            ("x", (A, leaf * 1.0, two), None),
            ("alpha", (A, x, number), None),
            ("out", (A, x, two), y.clone().requires_grad_()),
        ):
            for call in (kernel, kernel.bind):
                with pytest.raises(ArgumentError, match="A111") as caught:
                    call(*args, out=out)
                assert caught.value.where == f"argument {name}"
                assert "detach()" in str(caught.value) and "no_grad()" in str(caught.value)
        np.testing.assert_allclose(kernel(A, leaf.detach(), two), wanted, rtol=1e-5, atol=1e-5)


def test_operators_and_attention_refuse_gradients(rng):
    torch = pytest.importorskip("torch")
    x, w = torch.randn(3, 16), torch.randn(16, 8)
    A = tw.csr().pack(matrix(rng, 5, 3))
    q, pages = torch.randn(2, 2, 64), torch.randn(2, 4, 2, 64)
    attn, table = tw.Attention(2, 2, 64), tw.Table.dense(torch.tensor([4, 3], dtype=torch.int32))

    def attend(q, k, v):
        kv = tw.KV(table, tw.Pool(k, v))
        return attn.run(q, kv, attn.plan([0, 1, 2], kv)).o

    def values(result):
        packed = result.values if isinstance(result, tw.Packed) else (result,)
        return [torch.as_tensor(v) for v in packed]

    for act, args in (
        (tw.ops.spmm, (A, x)),
        (tw.ops.gemm, (x.half(), w.half())),
        (tw.ops.sddmm, (A, torch.randn(5, 4), torch.randn(3, 4))),
        (attend, (q, pages, pages)),
        (lambda a, b: tw.merge([tw.State(a, b)] * 2).o, (torch.randn(3, 2, 8), torch.randn(3, 2))),
    ):
        wanted, tensors = act(*args), [n for n, a in enumerate(args) if torch.is_tensor(a)]
        for n in tensors:
            recorded = (*args[:n], args[n].clone().requires_grad_(), *args[n + 1 :])
            with pytest.raises(ArgumentError, match="A111"):
                act(*recorded)
            with torch.no_grad():
                again = act(*recorded)
            for a, b in zip(values(again), values(wanted), strict=True):
                torch.testing.assert_close(a, b)
