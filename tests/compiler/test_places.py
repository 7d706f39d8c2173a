"""Computed coordinates: a read of what is not there gives the fill, wherever it lies, and a
`where` keeps loads from happening."""

from __future__ import annotations

import numpy as np
import pytest
from tests.compiler.cases import FORMATS, after_every_pass, arguments, called, close

import tilewright as tw
from tilewright.errors import ScheduleError
from tilewright.runtime import toolchain
from tilewright.runtime.interpreter import evaluate

needs_cxx = pytest.mark.skipif(not toolchain.has_compiler(), reason="no C++ compiler")


@tw.program
def below(A=tw.sparse("m n"), Z=tw.dense("m n")):
    i, j = tw.indices("m n")
    return tw.out[i, j](A[i + 1, j] * Z[i, j])


@tw.program
def diagonal(A=tw.sparse("m n"), Z=tw.dense("m n")):
    i, j = tw.indices("m n")
    return tw.out[i, j](A[i - 1, j - 1] + A[i, j + 2] * Z[i, j])


@tw.program
def picked(A=tw.sparse("m n", fill=2.5), Z=tw.dense("m n"), at=tw.dense("m", dtype="int32")):
    i, j = tw.indices("m n")
    return tw.out[i, j](A[at[i], j] + A[at[i] - 1, at[i]] * Z[i, j])


@tw.program
def of_the_row_before(A=tw.sparse("m n"), Z=tw.dense("m n")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.where(i > 0, tw.sum(A[i - 1, j] * Z[i - 1, j], over=j), -1.0))


@tw.program
def of_rows_before(Z=tw.dense("m n")):
    i, j = tw.indices("m n")
    most = tw.where(i > 0, tw.max(Z[i - 1, j], over=j), 0.0)
    return tw.out[i](tw.where(i > 1, most + tw.sum(Z[i - 2, j], over=j), most))


SPARSE = (below, diagonal, picked, of_the_row_before)
SEARCHED = ("csr", "dcsr", "ell", "ragged", "bsr", "bsr3", "dbsr")


def given(definition, rng, kind="random", **sizes):
    args = arguments(definition, rng, kind, **sizes)
    if "at" in args:  # far outside, on both sides
        args["at"] = rng.integers(-3, 12, args["at"].shape).astype(np.int32)
        args["at"][:1] = 2**31 - 1
        args["at"][1:2] = -(2**31)
    return args


@pytest.mark.parametrize("fmt", SEARCHED)
@pytest.mark.parametrize("program", SPARSE, ids=lambda p: p.program.name)
def test_missing_coordinates_after_every_pass(program, fmt, rng):
    definition = program.decompose(A=FORMATS[fmt])
    for kind in ("random", "empty"):
        after_every_pass(definition, given(definition, rng, kind))


@needs_cxx
@pytest.mark.parametrize("fmt", SEARCHED)
@pytest.mark.parametrize("program", SPARSE, ids=lambda p: p.program.name)
def test_missing_coordinates_in_cpp(program, fmt, rng):
    definition = program.decompose(A=FORMATS[fmt])
    kernel = definition.build()
    for m, n in ((5, 6), (1, 1), (0, 3), (3, 0), (8, 8)):
        args = given(definition, rng, m=m, n=n)
        wanted = evaluate(definition.program, args)["out"]
        close(called(kernel, definition, args)["out"], wanted, "float32")


def test_a_reduction_keeps_the_condition_it_stands_under(rng):
    """The interpreter refuses to read outside an array, so a row before the first would show."""
    args = arguments(of_rows_before, rng)
    after_every_pass(of_rows_before, args)
    if toolchain.has_compiler():
        wanted = evaluate(of_rows_before.program, args)["out"]
        close(of_rows_before.build()(args["Z"]), wanted, "float32")


@tw.program
def shifted(Z=tw.dense("m n")):
    i, j = tw.indices("m n")
    return tw.out[i, j](tw.where(j > 0, Z[i, j - 1], 0.0))


def test_lanes_that_do_not_all_read_are_no_vector(rng):
    after_every_pass(shifted, arguments(shifted, rng), lambda s: s.split("j", 4).unroll("j_i"))
    recipe = shifted.schedule(lambda s: s.split("j", 4, tail="cut").vectorize("j_i"))
    with pytest.raises(ScheduleError, match="differs from lane to lane") as caught:
        recipe.lower()
    assert caught.value.code == "S102" and caught.value.hint
