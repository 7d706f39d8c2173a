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
