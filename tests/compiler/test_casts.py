"""Casts of floats: to integers they saturate and NaN is 0, to other floats they round; on all
targets, in vectors too."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention.cases import paged, queries

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import reference
from tilewright.ir.affine import is_multiple
from tilewright.ir.nodes import Const, Var, binary, cast
from tilewright.toolchain import compilers, nvrtc

FLOATS = {
    "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32,
    "float64": np.float64,
}  # fmt: skip
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
WAYS = [
    "interp",
    *(
        pytest.param(
            way, marks=pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
        )
        for way in ("cpp", "vectors")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def all_casts(source: str) -> Any:
    """A number as each dtype has it; floats of 16 bits as float32."""

    @tw.program
    def casts(x=tw.dense("n", source)):
        i = tw.indices("i:n")
        kinds = {n: n for n in (*INTEGERS, "bool")} | dict.fromkeys(FLOATS, "float32")
        values = {n: x[i].cast(n).cast(kind) for n, kind in kinds.items()}
        return tuple(tw.out.named(f"as_{n}").typed(kinds[n])[i](v) for n, v in values.items())

    return casts


def edges(source: str, rng: np.random.Generator) -> np.ndarray:
    """Numbers around the limits of all integers, infinities, NaN, and random ones of any size."""
    limits = [2.0**bits + d for bits in (7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, -0.5, 0, 0.5)]
    exact = [0.0, 0.5, 0.99, 1.0, 1.5, 127.99, 1e30, 1e300, math.inf, *limits]
    steps = [np.nextafter(2.0**bits, 0) for bits in (31, 32, 63, 64)]
    steps += [float(np.nextafter(np.float32(2.0**bits), 0)) for bits in (31, 32, 63, 64)]
    steps += [1 + 2.0**-bits + d for bits in (8, 11) for d in (-(2.0**-30), 0, 2.0**-30)]  # ties
    some = [*exact, *steps, *(2 ** rng.uniform(-4, 70, 40))]
    with np.errstate(over="ignore"):
        numbers = np.array([*some, *(-x for x in some), math.nan]).astype(FLOATS[source])
    return rng.permutation(numbers)


def as_integer(x: float, to: dtypes.DType) -> int:
    if math.isnan(x):
        return 0
    return to.most if x > to.most else to.least if x < to.least else math.trunc(x)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("way", WAYS)
def test_floats_become_other_numbers(way, source, rng):
    definition = all_casts(source)
    if way == "vectors":
        definition = definition.schedule(lambda s: s.split("i", 16, tail="cut").vectorize("i_i"))
    x = edges(source, rng)
    there: Any = x
    if way == "cuda":
        from tilewright.runtime.cuda import DeviceArray

        there = DeviceArray.from_numpy(x.view(np.uint16) if source == "bfloat16" else x, source)
    results = definition.build("cpp" if way == "vectors" else way)(there)
    found = [y.to_numpy() if way == "cuda" else y for y in results]
    for name, got in zip((*INTEGERS, "bool", *FLOATS), found, strict=True):
        if name in FLOATS:
            with np.errstate(over="ignore"):
                wanted = x.astype(np.float32).astype(FLOATS[name]).astype(np.float32)
        else:
            kind = dtypes.dtype(name)
            own = [as_integer(float(v), kind) if kind.is_int else v != 0 for v in x]
            wanted = np.array(own, kind.numpy)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted, err_msg=f"{source} to {name}")


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("lanes", [1, 4])
def test_kernels_of_gpus_saturate_by_a_function(lanes):
    """PTX makes 2⁶³ of a NaN for 64 bits or from float64, and C++ leaves it all undefined."""
    wide = lambda s: s.split("i", 4, tail="cut").vectorize("i_i") if lanes > 1 else s  # noqa: E731
    for source in FLOATS:
        text = all_casts(source).schedule(wide).build("cuda:sm_80").source
        assert text.count("tw::to_integer<") >= len(INTEGERS)
        assert '#include "integers.cuh"' in text

    @tw.program
    def doubled(x=tw.dense("n")):
        i = tw.indices("n")
        return tw.out[i](x[i] * 2)

    assert "integers.cuh" not in doubled.build("cuda:sm_80").source


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
def test_variants_of_attention_saturate(rng):
    """In the vectors of a CPU's kernel; -2³¹ is a logit that hides a key beside one of 2³¹ - 1."""

    @tw.variant
    class Signs:
        def logits(self, s, at):
            return (s * 1e25).cast("int32") * 1e-8

    kv, (q, indptr) = paged(rng, [70, 5], (16, 2, 32)), queries(rng, [3, 40], 6, 32)
    attn, signs = tw.Attention(6, 2, 32, Signs()), []
    found = attn.run(q, kv, attn.plan(indptr, kv)).o
    for r, (begin, end) in enumerate(itertools.pairwise(indptr)):
        keys, values = (np.repeat(x, 3, axis=1) for x in reference.gather(kv, r))
        scores = np.einsum("qhd,khd->qhk", q[begin:end].astype(np.float64), keys)
        weights = np.where(scores > 0, np.exp(21.47483647), np.exp(-21.47483648))
        weights /= weights.sum(-1, keepdims=True)
        signs.append(np.einsum("qhk,khd->qhd", weights, values))
    np.testing.assert_allclose(found, np.concatenate(signs), rtol=1e-4, atol=1e-5)


def test_a_float_that_becomes_an_integer_is_a_multiple_of_nothing():
    """(x * 4.0).cast("int32") is any integer; addresses are taken to be aligned by this."""
    x = Var("x", dtypes.float32)
    product = binary("*", x, Const(4.0, dtypes.float32))
    assert not is_multiple(cast(product, dtypes.int32), 4, lambda v: False)
    whole = binary("*", Var("i", dtypes.int32), Const(4, dtypes.int32))
    assert is_multiple(cast(whole, dtypes.int64), 4, lambda v: False)


def built(definition: tw.Program, way: str) -> Any:
    if way != "vectors":
        return definition.build(way)
    return definition.schedule(lambda s: s.split("i", 8, tail="cut").vectorize("i_i")).build("cpp")


NUMBERS = WAYS[:-1]  # CPUs: what is passed is NumPy's


@pytest.mark.parametrize("way", NUMBERS)
@pytest.mark.parametrize("source", [*INTEGERS, "float32", "float64"])
def test_comparisons_become_numbers(way, source, rng):
    """True is 1 in each dtype; in a mask of vectors it is -1."""
    kinds = ("float16", "float32", "float64", "int8", "uint8", "int32", "int64")

    @tw.program
    def compared(x=tw.dense("n", source)):
        i = tw.indices("i:n")
        outs = {kind: tw.out.named(f"as_{kind}").typed(kind) for kind in kinds}
        own = [out[i]((x[i] > 3).cast(kind)) for kind, out in outs.items()]
        return (*own, tw.out.named("halves").typed("float32")[i]((x[i] > 3).cast("bfloat16")))

    x = rng.integers(0, 7, 37).astype(source)
    for kind, found in zip((*kinds, "float32"), built(compared, way)(x), strict=True):
        np.testing.assert_array_equal(found, (x > 3).astype(kind), err_msg=kind)


@pytest.mark.parametrize("way", NUMBERS)
@pytest.mark.parametrize("source", INTEGERS)
def test_negation_wraps_around(way, source, rng):
    """In the dtype of the number, also where C++ computes in int."""

    @tw.program
    def negated(x=tw.dense("n", source)):
        i = tw.indices("i:n")
        wide = tw.out.named("wide").typed("int64")[i]((-x[i]).cast("int64"))
        return wide, tw.out.named("sign").typed("int32")[i](tw.where(-x[i] > 0, 1, 0))

    limits = np.iinfo(source)
    x = rng.integers(limits.min, limits.max, 37, dtype=source, endpoint=True)
    x[:3] = limits.min, limits.max, 0
    wide, sign = built(negated, way)(x)
    with np.errstate(over="ignore"):
        wanted = (-x).astype(np.int64)
    np.testing.assert_array_equal(wide, wanted)
    np.testing.assert_array_equal(sign, (-x > 0).astype(np.int32))


@pytest.mark.parametrize("way", NUMBERS[:-1])  # a read that may lie outside is no vector
@pytest.mark.parametrize("index", INTEGERS)
@pytest.mark.parametrize("count", [3, 100, 200, 300, 40_000, 70_000])
def test_coordinates_of_any_dtype(way, index, count, rng):
    """An array may be longer than the largest number of a coordinate's dtype; what lies outside of
    it reads as 0 and is not written."""

    @tw.program
    def gathered(at=tw.dense("n", index), t=tw.dense("m")):
        i = tw.indices("i:n")
        return tw.out[i](t[at[i]] * 1.0)

    @tw.program
    def scattered(at=tw.dense("n", index), y=tw.dense("m")):
        i = tw.indices("n")
        return tw.update(y).add[at[i]](1.0)

    limits = np.iinfo(index)
    at = rng.integers(max(limits.min, -5), min(limits.max, 2 * count), 41, endpoint=True)
    t, at = rng.standard_normal(count).astype(np.float32), at.astype(index)
    inside = (at.astype(np.int64) >= 0) & (at.astype(np.int64) < count)
    wanted = np.where(inside, t[np.where(inside, at, 0).astype(np.int64)], 0)
    np.testing.assert_array_equal(gathered.build(way)(at, t), wanted)
    y, sums = np.zeros(count, np.float32), np.zeros(count, np.float32)
    np.add.at(sums, at[inside].astype(np.int64), 1)
    scattered.build(way)(at, y)
    np.testing.assert_array_equal(y, sums)
