"""Every verb on every loop of a program that merges lists: refused with a code, or right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import matrix
from tests.shipped import lesson

import tilewright as tw
from tilewright.errors import ScheduleError

LESSON = lesson("12_unions.py")
union, intersection = LESSON.either, LESSON.both


@tw.program
def product(A=tw.sparse("m n"), B=tw.sparse("n k")):
    i, j, k = tw.indices("m n k")
    return tw.out[i, k](tw.sum(A[i, j] * B[j, k], over=j))


@tw.program
def entries(A=tw.sparse("m n"), B=tw.sparse("n k")):
    i, j, k = tw.indices("m n k")
    meets = tw.any(tw.stored(A[i, j]) & tw.stored(B[j, k]), over=j)
    return tw.out[i](tw.sum(1, over=k, where=meets))


def case(name: str, rng: np.random.Generator) -> tuple[Any, tuple[Any, ...], np.ndarray]:
    """A program, its arguments and its result in float64."""
    a, b = (matrix("random", 10, 12, rng) for _ in range(2))
    c, x = matrix("random", 12, 9, rng), rng.standard_normal((12, 8)).astype(np.float32)
    A, B, C = map(tw.csr().pack, (a, b, c))
    wide = a.astype(np.float64)
    return {
        "union": (union, (A, B, x), (wide + b) @ x),
        "intersection": (intersection, (A, B, x), (wide * b) @ x),
        "product": (product, (A, C), wide @ c),
        "entries": (entries, (A, C), ((a != 0).astype(int) @ (c != 0) > 0).sum(1)),
    }[name]


def recipes(loops: list[str], tensors: list[str]) -> Iterator[Callable[[Any], Any]]:
    """One verb each, and rows in blocks."""
    for x in loops:
        yield lambda s, x=x: s.split(x, 4)
        yield lambda s, x=x: s.split(x, 4, tail="cut")
        yield lambda s, x=x: s.split(x, 4, into=("u", "v")).parallel("u")
        yield lambda s, x=x: s.split(x, 8, into=("u", "v")).vectorize("v")
        yield lambda s, x=x: s.split(x, 4, into=("u", "v")).rfactor("v")
        yield lambda s, x=x: s.parallel(x)
        yield lambda s, x=x: s.unroll(x, 2)
        for t in tensors:
            yield lambda s, x=x, t=t: s.cache(t, x)
            yield lambda s, x=x, t=t: s.prefetch(t, x, 2)
            yield lambda s, x=x, t=t: s.privatize(t, x, 2)
    for x, y in itertools.permutations(loops, 2):
        yield lambda s, x=x, y=y: s.reorder(x, y)
        yield lambda s, x=x, y=y: s.fuse(x, y)
    for t in tensors:
        yield lambda s, t=t: s.fuse_axes(t)
        yield lambda s, t=t: s.atomic(t)


@pytest.mark.parametrize("name", ["union", "intersection", "product", "entries"])
def test_verbs_are_refused_or_right(name, rng):
    program, args, wanted = case(name, rng)
    start = program.scheduled("cpp")
    accepted = refused = 0
    for recipe in recipes(start.loops, [t.name for t in program.program.tensors]):
        try:
            kernel = program.schedule(recipe).build("cpp")
        except ScheduleError as error:
            assert error.code in ("S101", "S102") and error.hint, str(error)
            refused += 1
            continue
        out = np.full(wanted.shape, -7, np.int32 if name == "entries" else np.float32)
        np.testing.assert_allclose(kernel(*args, out=out), wanted, rtol=2e-5, atol=2e-5)
        accepted += 1
    assert accepted >= 8 and refused >= 20
