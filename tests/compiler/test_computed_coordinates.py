"""Computed coordinates: a read of what is not there gives the fill, wherever it lies, and a
`where` keeps loads from happening."""

from __future__ import annotations

import numpy as np
import pytest
from tests.compiler.cases import FORMATS, after_every_pass, arguments, called, close

import tilewright as tw
from tilewright.errors import ScheduleError
from tilewright.reference.evaluate import evaluate
from tilewright.toolchain import compilers

needs_cxx = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


@tw.program
def below(A=tw.sparse("m n"), Z=tw.dense("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i, j](A[i + 1, j] * Z[i, j])


@tw.program
def diagonal(A=tw.sparse("m n"), Z=tw.dense("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i, j](A[i - 1, j - 1] + A[i, j + 2] * Z[i, j])


@tw.program
def picked(A=tw.sparse("m n", fill=2.5), Z=tw.dense("m n"), at=tw.dense("m", dtype="int32")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i, j](A[at[i], j] + A[at[i] - 1, at[i]] * Z[i, j])


@tw.program
def of_the_row_before(A=tw.sparse("m n"), Z=tw.dense("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i](tw.where(i > 0, tw.sum(A[i - 1, j] * Z[i - 1, j], over=j), -1.0))


@tw.program
def of_rows_before(Z=tw.dense("m n")):
    i, j = tw.indices("i:m j:n")
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
    if compilers.has_compiler():
        wanted = evaluate(of_rows_before.program, args)["out"]
        close(of_rows_before.build()(args["Z"]), wanted, "float32")


@tw.program
def shifted(Z=tw.dense("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i, j](tw.where(j > 0, Z[i, j - 1], 0.0))


def test_lanes_that_do_not_all_read_are_no_vector(rng):
    after_every_pass(shifted, arguments(shifted, rng), lambda s: s.split("j", 4).unroll("j_i"))
    recipe = shifted.schedule(lambda s: s.split("j", 4, tail="cut").vectorize("j_i"))
    with pytest.raises(ScheduleError, match="differs from lane to lane") as caught:
        recipe.lower()
    assert caught.value.code == "S102" and caught.value.hint


# ---------------------------------------------------------------------------- outside of arrays


@tw.program
def moved(x=tw.dense("n"), at=tw.dense("t", "int32"), far=tw.dense("t", "int64")):
    i, t = tw.indices("i:n t:t")
    near = tw.out.named("near")[i](x[i + 1] - x[i - 1])
    by_table = tw.out.named("by_table")[t](x[at[t]] + x[far[t]] * 2.0)
    return near, by_table, tw.out.named("fixed")[i](x[i] + x[100])


@tw.program
def scattered(Y=tw.dense("m d"), at=tw.dense("t", "int32"), X=tw.dense("t d")):
    t, k = tw.indices("t:t k:d")
    return tw.update(Y)[at[t], k](X[t, k])


@pytest.mark.parametrize("target", ["interp", pytest.param("cpp", marks=needs_cxx)])
def test_outside_of_an_array_there_is_nothing(rng, target):
    """A read gives 0, a store does nothing, whatever stands in a table of places."""
    whole = np.full(30, np.nan, np.float32)  # what lies around x must not be read
    x = whole[10:17]
    x[:] = rng.standard_normal(7)
    places = np.array([0, 6, 7, -1, 2**31 - 1, -(2**31)])
    at, far = places.astype(np.int32), np.array([2**62, -1, 0, 6, 7, -(2**63)])
    near, by_table, fixed = moved.build(target)(x, at, far)
    padded = np.concatenate([[0], x, [0]])
    np.testing.assert_allclose(near, padded[2:] - padded[:-2], rtol=1e-6)

    def read(p):
        return np.where((p >= 0) & (p < 7), x[np.clip(p, 0, 6)], 0)

    np.testing.assert_allclose(by_table, read(places) + 2 * read(far), rtol=1e-6)
    np.testing.assert_array_equal(fixed, x)

    around = rng.standard_normal((20, 3)).astype(np.float32)
    wanted, values = around.copy(), rng.standard_normal((6, 3)).astype(np.float32)
    wanted[[10, 16]] = values[:2]
    scattered.build(target)(around[10:17], at, values)
    np.testing.assert_array_equal(around, wanted)


def test_a_range_that_is_known_is_not_asked_about():
    @tw.program
    def halves(x=tw.dense("n"), w=tw.dense("b 8")):
        b, e = tw.indices("b:b e:8")
        return tw.out[b, e](x[b * 8 + e] * w[b, e])

    open_ended = str(halves.lower())
    known = str(halves.schedule(lambda s: s.specialize("b", 4).specialize("n", 32)).lower())
    assert "where(" in open_ended and "where(" not in known


@needs_cxx
def test_coordinates_that_wrap_around_are_outside(rng):
    """A narrow type, an unsigned one, a sum beyond its type: their ranges are not trusted."""

    @tw.program
    def wrapped(x=tw.dense("n"), at=tw.dense("m", "uint64"), w=tw.dense("m")):
        i = tw.indices("i:m")
        narrow = tw.out.named("narrow")[i](x[i.cast("int8")] * w[i])
        below = tw.out.named("below")[i](x[at[i]] * w[i])
        beyond = tw.out.named("beyond")[i](x[i + 2147483647] * w[i])
        return narrow, below, beyond

    whole = np.full(900, np.nan, np.float32)
    x, w = whole[400:410], np.ones(300, np.float32)
    x[:] = rng.standard_normal(10)
    at = np.full(300, 2**64 - 2, np.uint64)
    at[:3] = 0, 9, 10
    for size in (0, 300):
        made = wrapped.schedule(lambda s, n=size: s.specialize("m", n) if n else s).build("cpp")
        narrow, below, beyond = made(x, at, w)
        places = np.arange(300).astype(np.int8)
        inside = (places >= 0) & (places < 10)
        np.testing.assert_array_equal(narrow, np.where(inside, x[np.clip(places, 0, 9)], 0))
        np.testing.assert_array_equal(below, [x[0], x[9], *[0] * 298])
        assert not beyond.any()


@pytest.mark.parametrize("target", ["interp", pytest.param("cpp", marks=needs_cxx)])
def test_a_scalar_may_be_called_like_a_loop(rng, target):
    @tw.program
    def scaled(A=tw.sparse("m n"), X=tw.dense("n d"), j_p=tw.scalar("int32")):
        i, j, k = tw.indices("i:m j:n k:d")
        return tw.out[i, k](tw.sum(A[i, j] * X[j, k] * X[j_p, k], over=j))

    M = np.where(rng.random((6, 5)) < 0.5, rng.standard_normal((6, 5)), 0).astype(np.float32)
    X = rng.standard_normal((5, 3)).astype(np.float32)
    got = scaled.build(target)(tw.csr().pack(M), X, 2)
    np.testing.assert_allclose(got, (M @ X) * X[2], rtol=1e-5, atol=1e-5)
