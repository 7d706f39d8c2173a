"""Affine forms and divisibility of index arithmetic, against values computed in Python."""

from __future__ import annotations

import pytest

from tilewright import dtypes
from tilewright.ir.affine import affine, is_multiple
from tilewright.ir.nodes import Const, Var
from tilewright.ir.rewrite import simplify, substitute

I, J, N = Var("i"), Var("j"), Var("n")
NAMES = frozenset("ij")


@pytest.mark.parametrize("e", [I, N, I * 3 + J, 2 * (I - J * 4) + 5, (N + 1) * 7 - I, N * (I + 2)])
@pytest.mark.parametrize("to", [None, dtypes.int64])
def test_a_form_has_the_value_of_its_expression(e, to) -> None:
    form = affine(e, NAMES, to)
    assert form is not None
    for i, j, n in ((0, 0, 0), (3, 5, 7), (11, 2, 13)):
        at = {k: Const(v, dtypes.int32) for k, v in (("i", i), ("j", j), ("n", n))}
        value = simplify(substitute(e, at)).value
        known = {"i": i, "j": j}
        base = simplify(substitute(form.base, at)).value  # type: ignore[attr-defined]
        steps = {k: simplify(substitute(s, at)).value for k, s in form.steps.items()}  # type: ignore[attr-defined]
        assert base + sum(known[k] * s for k, s in steps.items()) == value


@pytest.mark.parametrize("e", [I * J, I // 2, I % 3, N * (I * I)])
def test_other_arithmetic_has_no_form(e) -> None:
    assert affine(e, NAMES) is None
    assert affine(e, NAMES, dtypes.int64) is None


def test_multiples() -> None:
    assert is_multiple(I * 8 + 16, 8)
    assert not is_multiple(I * 8 + 4, 8)
    assert not is_multiple(N, 8)
    assert is_multiple(N * I, 8, lambda v: v.name == "n")
