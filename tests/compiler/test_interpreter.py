"""The interpreter of the lower levels: it must see what a kernel would do wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.compiler.cases import (
    FORMATS,
    after_every_pass,
    arguments,
    close,
    executed,
    gather_rows,
    gemm,
    numbers,
    spmm,
)
from tests.compiler.interpreter import execute

import tilewright as tw
from tilewright import dtypes
from tilewright.errors import InternalError
from tilewright.ir.nodes import (
    Alloc,
    Binary,
    Broadcast,
    Buffer,
    Cast,
    Const,
    For,
    If,
    Load,
    Nest,
    Program,
    Ramp,
    ReduceLanes,
    Search,
    Select,
    Seq,
    Store,
    Sync,
    Unary,
    Var,
)
from tilewright.ir.rewrite import transform
from tilewright.reference.evaluate import evaluate

f32, i32, i64 = dtypes.float32, dtypes.int32, dtypes.int64
N = Var("n.size")
X, Y = (Buffer(name, f32, (N,), "global") for name in "XY")
IDS = Buffer("ids", i32, (N,), "global")


def c(value: int, dtype: dtypes.DType = i64) -> Const:
    return Const(value, dtype)


def ran(body, n: int = 8, grid=(), grid_vars=(), **more: np.ndarray) -> dict[str, np.ndarray]:
    program = Program("p", "loops", (), stages=((Nest("n", body, -1, grid, grid_vars),),))
    buffers = {
        "X": np.arange(n, dtype=np.float32),
        "Y": np.full(n, np.nan, np.float32),
        "ids": np.array([0, 2, 2, 5, 7, 9, 9, 12][:n], np.int32),
        **more,
    }
    execute(program, buffers, {"n.size": n})
    return buffers


def load(at, lanes: int = 1) -> Load:
    return Load(X, (at,), f32.vector(lanes))


def test_loops_units_and_guards():
    i, j = Var("i", i64), Var("j", i64)
    at = Binary("+", Binary("*", i, c(4), i64), j, i64)
    guard = If(Binary("<", at, c(7), dtypes.bool_), Store(Y, (at,), load(at)))
    body = For(j, c(0), c(4), guard)
    got = ran(body, grid=(c(2),), grid_vars=(i,))["Y"]
    np.testing.assert_array_equal(got[:7], np.arange(7))
    assert np.isnan(got[7])


@pytest.mark.parametrize("at", [-1, 8])
def test_accesses_out_of_bounds_are_found(at):
    with pytest.raises(InternalError, match="outside"):
        ran(Store(Y, (c(0),), load(c(at))))
    with pytest.raises(InternalError, match="outside"):
        ran(Store(Y, (c(at),), load(c(0))))
    with pytest.raises(InternalError, match="outside"):
        ran(Store(Y, (Ramp(c(at - 2), i64.vector(4)),), load(Ramp(c(0), i64.vector(4)), 4)))


def test_the_arm_not_taken_is_not_read():
    away = Select(Binary(">=", c(-1), c(0), dtypes.bool_), load(c(-1)), Const(3.0, f32), f32)
    assert ran(Store(Y, (c(0),), away))["Y"][0] == 3


def test_a_register_that_nobody_wrote_is_not_a_number():
    r = Buffer("r", f32, (), "register")
    assert np.isnan(ran(Seq((Alloc(r), Store(Y, (c(0),), Load(r, (), f32)))))["Y"][0])
    four = Buffer("r", f32, (c(4),), "register")
    with pytest.raises(InternalError, match="register"):
        ran(Seq((Alloc(four), Store(four, (c(4),), Const(1.0, f32)))))
    with pytest.raises(InternalError, match="not bound"):
        ran(Store(Y, (c(0),), load(Var("nobody", i64))))


def test_vectors():
    lanes = Ramp(c(1), i64.vector(4))
    two = Broadcast(Const(2.0, f32), f32.vector(4))
    body = Store(Y, (lanes,), Binary("*", load(lanes, 4), two, f32.vector(4)))
    np.testing.assert_array_equal(ran(body)["Y"][1:5], [2, 4, 6, 8])
    scattered = Binary("*", lanes, Broadcast(c(1), i64.vector(4)), i64.vector(4))
    body = Store(Y, (scattered,), load(scattered, 4))
    np.testing.assert_array_equal(ran(body)["Y"][1:5], [1, 2, 3, 4])
    for op, value in (("sum", 10), ("max", 4), ("min", 1), ("prod", 24)):
        total = ReduceLanes(op, load(lanes, 4), f32)
        assert ran(Seq((Sync(), Store(Y, (c(0),), total))))["Y"][0] == value


def test_updates_in_memory():
    for op, value in (("sum", 10), ("max", 7), ("min", 3), ("prod", 21)):
        body = Seq((Store(Y, (c(0),), load(c(3))), Store(Y, (c(0),), load(c(7)), op)))
        assert ran(body)["Y"][0] == value


@pytest.mark.parametrize(
    ("key", "found", "last"), [(0, 0, 0), (2, 1, 2), (5, 3, 3), (6, -1, 3), (99, -1, 7)]
)
def test_searches(key, found, last):
    for is_last, wanted in ((False, found), (True, last)):
        where = Search(IDS, c(0, i32), c(8, i32), c(key, i32), is_last, i32)
        assert ran(Store(Y, (c(0),), Cast(where, f32)))["Y"][0] == wanted
    with pytest.raises(InternalError, match="outside"):
        ran(Store(Y, (c(0),), Cast(Search(IDS, c(0, i32), c(9, i32), c(key, i32)), f32)))


def test_arithmetic_is_that_of_the_dtype(rng):
    small, big = Const(1.0, f32), Const(float(2**24), f32)
    assert ran(Store(Y, (c(0),), Binary("+", big, small, f32)))["Y"][0] == 2**24
    for op in ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "floor", "abs", "-"):
        got = ran(Store(Y, (c(0),), Unary(op, load(c(3)), f32)))["Y"][0]
        wanted = {"rsqrt": 3**-0.5, "-": -3.0}.get(op) or getattr(np, op)(np.float32(3))
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert ran(Store(Y, (c(0),), Cast(Cast(Const(-7.9, f32), i32), f32)))["Y"][0] == -7
    for value in rng.normal(size=20):
        bits = Cast(Cast(Const(float(value), f32), dtypes.bfloat16), f32)
        wanted = numbers(dtypes.bfloat16_bits(np.array([value], np.float32)), "bfloat16")[0]
        assert ran(Store(Y, (c(0),), bits))["Y"][0] == wanted
        half = Cast(Cast(Const(float(value), f32), dtypes.float16), f32)
        assert ran(Store(Y, (c(0),), half))["Y"][0] == np.float32(np.float16(np.float32(value)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64"])
def test_integers_are_those_of_the_definition(dtype):
    """Wrapping, division by zero, wide shifts, conversions: as Python's integers say."""

    @tw.program
    def all_of(a=tw.dense("n", dtype), b=tw.dense("n", dtype), x=tw.dense("n", "float64")):
        i = tw.indices("n")
        results = (
            a[i] + b[i], a[i] - b[i], a[i] * b[i], a[i] // b[i], a[i] % b[i], a[i] << b[i],
            a[i] >> b[i], tw.minimum(a[i], b[i]), -a[i], tw.abs(a[i]), x[i].cast(dtype),
            a[i].cast("int16") + x[i].cast("int32"), (i + 2147483647).cast("int64"),
        )  # fmt: skip
        return tuple(tw.out.named(f"y{n}")[i](y) for n, y in enumerate(results))

    kind = dtypes.dtype(dtype)
    some = [0, 1, 2, 7, 8, 33, 64, 100, -1, -7, kind.least, kind.least + 1, kind.most]
    a, b = (
        np.array([kind.wrapped(x) for x in column], kind.numpy)
        for column in zip(*((x, y) for x in some for y in some), strict=True)
    )
    x = np.resize([2.9, -2.9, 1e30, -1e30, 2.0**31, 2.0**63, np.inf, -np.inf, np.nan], a.shape)
    args = {"a": a, "b": b, "x": x}
    evaluated, got = evaluate(all_of.program, args), executed(all_of, all_of.lower(), args)
    rows = zip(a.tolist(), b.tolist(), x.tolist(), range(len(a)), strict=True)
    columns = zip(*(_by_python(kind, *row) for row in rows), strict=True)
    for (name, y), column in zip(evaluated.items(), columns, strict=True):
        wanted = [float(number) for number in column]
        assert y.astype(np.float64).tolist() == wanted, name
        assert got[name].tolist() == wanted, name


def _by_python(kind: dtypes.DType, a: int, b: int, x: float, i: int) -> list[int]:
    """What the programs of the test above compute, by Python's own integers."""

    def integer(x: float, of: dtypes.DType) -> int:
        return 0 if x != x else int(min(max(x, of.least), of.most))

    beyond = not 0 <= b < kind.bits
    left, right = (0, -(a < 0)) if beyond else (a << b, a >> b)
    results = (a + b, a - b, a * b, b and a // b, b and a % b, left, right, min(a, b), -a, abs(a))
    narrow = dtypes.int16.wrapped(a) + integer(x, i32)
    return [
        *(kind.wrapped(y) for y in results),
        integer(x, kind),
        i32.wrapped(narrow),
        i32.wrapped(i + 2147483647),
    ]


def test_a_wrong_pass_does_not_go_unseen(rng):
    """Reading one column too far, and padding, show in the result."""
    args = arguments(spmm.decompose(A=FORMATS["ell"]), rng, "sparse", m=4, n=6)
    program = spmm.decompose(A=FORMATS["ell"]).lower()

    def unguarded(x):
        return x.body if isinstance(x, If) else x.a if isinstance(x, Select) else x

    stages = tuple(
        tuple(replace(n, body=transform(n.body, unguarded)) for n in stage)
        for stage in program.stages
    )
    with pytest.raises(InternalError, match="outside"):
        executed(spmm, replace(program, stages=stages), args)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", [(16, 8, 16), (17, 9, 19), (33, 20, 40)])
def test_tiles(dtype, sizes, rng):
    """A product as tile operations, with rows, columns and depth that do not fill them."""

    def recipe(s):
        s = s.split("i", 16).split("j", 8).split("k", 16)
        s = s.reorder("i_o", "j_o", "k_o", "i_i", "j_i", "k_i").mma("i_i", "j_i", "k_i")
        return s.parallel("i_o")

    m, n, k = sizes
    program = gemm.typed(A=dtype, B=dtype)
    seen = after_every_pass(program, arguments(program, rng, m=m, n=n, k=k), recipe)
    assert "materialize_tiles" in seen


def test_indirect_reads(rng):
    args = arguments(gather_rows, rng)
    after_every_pass(gather_rows, args)
    args["at"] = np.array([99, 0, -(2**31)], np.int32)
    got = executed(gather_rows, gather_rows.lower(), args)["out"]  # it refuses to read outside
    assert not got[0].any() and not got[2].any()
    close(got[1], args["T"][0], "float32")


def test_threads_are_a_number_of_units_on_the_cpu(rng):
    kernel = spmm.schedule(lambda s: s.parallel("i")).build("interp")
    args = arguments(spmm, rng)
    close(kernel(**args), executed(spmm, spmm.lower(), args)["out"], "float32")
    assert isinstance(kernel, tw.Kernel)
