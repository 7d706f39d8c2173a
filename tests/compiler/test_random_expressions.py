"""Random expressions of numbers of all dtypes, against NumPy: casts, comparisons, choices.

The oracle computes with arrays of each dtype. What rounds differently by the order of operations or
by fused multiplication is left out, so that results are equal to the bit.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright import dtypes
from tilewright.toolchain import compilers

INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
KINDS = (*INTEGERS, "float32", "float64")
EACH = 8  # outputs of a program
Tree = tuple[Any, ...]


FORMS = ("cast", "cast", "half", "-", "binary", "compared", "where")


def draw(rng: np.random.Generator, kind: str, depth: int, forms: tuple[str, ...]) -> Tree:
    """An expression of dtype `kind`."""
    if depth == 0:
        return "x", kind
    form = str(rng.choice(forms))
    other = str(rng.choice(KINDS))
    if form == "cast":
        return "cast", kind, draw(rng, other, depth - 1, forms)
    if form == "half":  # there and back
        return "half", kind, str(rng.choice([*HALVES])), draw(rng, other, depth - 1, forms)
    if form == "-":
        return "-", kind, draw(rng, kind, depth - 1, forms)
    pair = [draw(rng, kind, depth - 1, forms) for _ in range(2)]
    if form == "binary":
        operators = ["+", "-"] if kind[0] == "f" else ["+", "-", "*", "min", "max", "&", "|", "^"]
        return "binary", kind, str(rng.choice(operators)), *pair
    condition = (
        str(rng.choice([">", "<=", "=="])),
        *(draw(rng, other, depth - 1, forms) for _ in "ab"),
    )
    return (form, kind, condition, *(pair if form == "where" else ()))


OPERATORS: dict[str, tuple[Any, Any]] = {  # in the language, and in NumPy
    "+": (lambda a, b: a + b, np.add), "-": (lambda a, b: a - b, np.subtract),
    "*": (lambda a, b: a * b, np.multiply), "&": (lambda a, b: a & b, np.bitwise_and),
    "|": (lambda a, b: a | b, np.bitwise_or), "^": (lambda a, b: a ^ b, np.bitwise_xor),
    "min": (tw.minimum, np.minimum), "max": (tw.maximum, np.maximum),
    ">": (lambda a, b: a > b, np.greater), "<=": (lambda a, b: a <= b, np.less_equal),
    "==": (tw.equal, np.equal),
}  # fmt: skip


def written(t: Tree, x: dict[str, Any], i: Any) -> Any:
    """The expression in the language."""
    form, kind, *rest = t
    if form == "x":
        return x[kind][i]
    if form == "cast":
        return written(rest[0], x, i).cast(kind)
    if form == "half":
        return written(rest[1], x, i).cast(rest[0]).cast(kind)
    if form == "-":
        return -written(rest[0], x, i)
    if form == "binary":
        return OPERATORS[rest[0]][0](*(written(a, x, i) for a in rest[1:]))
    (op, *sides), *pair = rest
    condition = OPERATORS[op][0](*(written(a, x, i) for a in sides))
    if form == "compared":
        return condition.cast(kind)
    return tw.where(condition, *(written(a, x, i) for a in pair))


def cast(x: np.ndarray, kind: str) -> np.ndarray:
    """To integers the nearest one of the dtype, NaN 0; between integers modulo 2^bits."""
    if kind in INTEGERS and x.dtype.kind == "f":
        to = dtypes.dtype(kind)
        exact = [0 if np.isnan(v) else min(max(v, to.least), to.most) for v in x.tolist()]
        return np.array([int(v) for v in exact], kind)
    return x.astype(kind)


def computed(t: Tree, x: dict[str, np.ndarray]) -> np.ndarray:
    """The expression by NumPy."""
    form, kind, *rest = t
    if form == "x":
        return x[kind]
    if form == "cast":
        return cast(computed(rest[0], x), kind)
    if form == "half":
        single = computed(rest[1], x).astype(np.float32)
        return cast(single.astype(HALVES[rest[0]]).astype(np.float32), kind)
    if form == "-":
        return np.negative(computed(rest[0], x))
    if form == "binary":
        return OPERATORS[rest[0]][1](*(computed(a, x) for a in rest[1:]))
    (op, *sides), *pair = rest
    condition = OPERATORS[op][1](*(computed(a, x) for a in sides))
    if form == "compared":
        return condition.astype(kind)
    return np.where(condition, *(computed(a, x) for a in pair))


def numbers(rng: np.random.Generator, kind: str, count: int) -> np.ndarray:
    """Of all sizes; limits, infinities and NaN among them."""
    if kind in INTEGERS:
        limits = np.iinfo(kind)
        own = rng.integers(limits.min, limits.max, count, dtype=kind, endpoint=True)
        own[: count // 2] = rng.integers(0, 9, count // 2)
        own[:2] = limits.min, limits.max
        return rng.permutation(own)
    own = (2 ** rng.uniform(-8, 70, count) * rng.choice([-1, 1], count)).astype(kind)
    own[: count // 2] = rng.integers(-300, 300, count // 2) / 4
    own[:4] = np.inf, -np.inf, np.nan, -0.0
    return rng.permutation(own)


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("way", ["interp", "cpp", "vectors"])
@pytest.mark.parametrize("seed", range(12))
def test_random_expressions_are_those_of_numpy(seed, way):
    rng = np.random.default_rng([seed, way == "vectors"])
    forms = FORMS[:-1] if way == "vectors" else FORMS  # what is read for some lanes is no vector
    kinds, depths = rng.choice(KINDS, EACH), rng.integers(1, 5, EACH)
    trees = [draw(rng, str(k), int(n), forms) for k, n in zip(kinds, depths, strict=True)]

    @tw.program
    def several(
        a=tw.dense("n", "int8"), b=tw.dense("n", "int16"), c=tw.dense("n", "int32"),
        d=tw.dense("n", "int64"), e=tw.dense("n", "uint8"), f=tw.dense("n", "uint16"),
        g=tw.dense("n", "uint32"), h=tw.dense("n", "uint64"), k=tw.dense("n"),
        m=tw.dense("n", "float64"),
    ):  # fmt: skip
        i = tw.indices("i:n")
        x = dict(zip(KINDS, (a, b, c, d, e, f, g, h, k, m), strict=True))
        outs = [tw.out.named(f"y{n}").typed(t[1]) for n, t in enumerate(trees)]
        return tuple(out[i](written(t, x, i)) for out, t in zip(outs, trees, strict=True))

    x = {kind: numbers(rng, kind, 37) for kind in KINDS}
    with np.errstate(all="ignore"):
        wanted = [computed(t, x) for t in trees]
    if way == "vectors":
        several = several.schedule(lambda s: s.split("i", 8, tail="cut").vectorize("i_i"))
    results = several.build("interp" if way == "interp" else "cpp")(*x.values())
    for t, got, value in zip(trees, results, wanted, strict=True):
        np.testing.assert_array_equal(got, value, err_msg=str(t))
