"""Kernels of the C++ target against the meaning of their programs."""

from __future__ import annotations

import numpy as np
import pytest
from tests.compiler.cases import (
    DENSE,
    FORMATS,
    MATRICES,
    SEARCHED,
    SPARSE,
    arguments,
    attention,
    called,
    close,
    filled,
    flat,
    gemm,
    matrix,
    numbers,
    pack,
    poisoned_output,
    rgcn,
    rmsnorm,
    softmax,
    spmm,
    spmm_t,
    square,
    widened,
)  # fmt: skip
from tests.compiler.legality import accepted, accepted_pairs

import tilewright as tw
from tilewright.reference.evaluate import evaluate
from tilewright.toolchain import compilers, nvrtc

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")

SHAPES = ((5, 6), (1, 1), (7, 3), (0, 4), (4, 0), (3, 8))


def label(x) -> str:
    """The name of a program or of a format."""
    return getattr(x, "name", x)


def check(definition, args, *kernels) -> None:
    wanted = evaluate(definition.program, args)
    for kernel in kernels:
        found = called(kernel, definition, args)
        for t in definition.program.outputs:
            close(found[t.name], wanted[t.name], t.dtype.name, f"{t.name} of {kernel}")


def agree(definition, rng, *targets: str, shapes=SHAPES, d=(1, 3)) -> None:
    """A kernel for each target (cpp), on all kinds of matrices."""
    kernels = [definition.build(target) for target in targets or ("cpp",)]
    for n, (rows, cols) in enumerate(shapes):
        for kind in (MATRICES[n % len(MATRICES)], "random"):
            args = arguments(definition, rng, kind, m=rows, n=cols, d=d[n % len(d)])
            check(definition, args, *kernels)


@pytest.mark.parametrize(("program", "fmt"), accepted(SPARSE), ids=label)
def test_sparse_programs(program, fmt, rng):
    """With a C++ compiler, and without one."""
    agree(program.decompose(A=FORMATS[fmt]), rng, "cpp", "interp")


@pytest.mark.parametrize("program", [*DENSE, attention], ids=lambda p: p.name)
def test_dense_programs_and_temporaries(program, rng):
    agree(program, rng, "cpp", "interp")


@pytest.mark.parametrize(
    ("program", "f", "g"),
    accepted_pairs(SEARCHED, ("csr", "dcsr", "bsr3", "hyb"), ("csr", "csc", "ell", "bsr")),
    ids=label,
)
def test_a_second_operand_is_searched(program, f, g, rng):
    agree(program.decompose(A=FORMATS[f], B=FORMATS[g]), rng, shapes=((4, 4), (6, 6), (0, 0)))


@pytest.mark.parametrize(("program", "fmt"), accepted([square]), ids=label)
def test_square_graphs(program, fmt, rng):
    agree(program.decompose(A=FORMATS[fmt]), rng, shapes=((5, 5), (1, 1), (0, 0)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("fmt", ["csr", "ell", "hyb", "bsr"])
def test_value_types(dtype, fmt, rng):
    for program in (spmm, softmax):
        agree(
            program.decompose(A=FORMATS[fmt]).typed(
                A=dtype, **({"X": dtype} if program is spmm else {})
            ),
            rng,
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_value_types_of_dense_programs(dtype, rng):
    agree(rmsnorm.typed(X=dtype, W=dtype), rng, "cpp", "interp")
    agree(gemm.typed(A=dtype, B=dtype), rng, "cpp", "interp")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", ["csr", "csc", "bsr3"])
def test_missing_coordinates_read_the_fill(dtype, fmt, rng):
    agree(filled.decompose(A=FORMATS[fmt]).typed(A=dtype, X=dtype), rng)


@pytest.mark.parametrize("fmt", ["csr", "coo", "hyb 2", "bsr"])
def test_wide_coordinates(fmt, rng):
    """int64 structures: what a matrix with more than 2³¹ entries has, on a small one."""
    program = spmm.decompose(A=FORMATS[fmt]).typed(index="int64")
    kernel = program.build()
    args = arguments(program, rng)
    args["A"] = widened(args["A"])
    check(program, args, kernel)


@pytest.mark.parametrize("target", ["cpp", "interp"])
@pytest.mark.parametrize("fmt", ["csr", "hyb", "ell", "coo", "hyb 2"])
def test_rows_that_are_not_referenced_may_be_anything(fmt, target, rng):
    program = spmm.decompose(A=FORMATS[fmt])
    kernel = program.build(target)
    args = arguments(program, rng, "sparse", m=9, n=8, d=5)
    wanted = evaluate(program.program, args)["out"]
    used = np.unique(args["A"].unpack()[0][1])
    args["X"][np.setdiff1d(np.arange(8), used)] = np.nan
    close(called(kernel, program, args)["out"], wanted, "float32")


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_strided_and_unaligned_arrays(target, rng):
    """Rows with gaps, columns of a wider array, addresses that are only 4-byte aligned."""
    kernel = spmm.build(target)
    args = arguments(spmm, rng, m=6, n=5, d=3)
    wanted = evaluate(spmm.program, args)["out"]
    frame = np.full((7, 12), np.nan, np.float32)
    for row, column in ((0, 0), (1, 1), (2, 5)):
        x = frame[row : row + 5, column : column + 3]
        x[:] = args["X"]
        y = np.full((6, 9), 7.0, np.float32)
        out = y[:, 3:6]
        out[:] = np.nan
        assert kernel(args["A"], x, out=out) is out
        close(out, wanted, "float32")
        assert (y[:, :3] == 7).all() and (y[:, 6:] == 7).all()
        x[:] = np.nan
    step = np.asfortranarray(args["X"])
    with pytest.raises(tw.TilewrightError, match="A104"):
        kernel(args["A"], step)
    every_other = np.repeat(args["X"], 2, axis=0)[::2]
    close(kernel(args["A"], every_other), wanted, "float32")
    backwards = args["X"][::-1].copy()[::-1]
    close(kernel(args["A"], backwards), wanted, "float32")


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_a_strided_parameter(target, rng):
    @tw.program
    def dot(X=tw.dense("m k", strided=True), y=tw.dense("k", strided=True)):
        i, k = tw.indices("m k")
        return tw.out[i](tw.sum(X[i, k] * y[k], over=k))

    x, y = rng.normal(size=(4, 6)).astype("f"), rng.normal(size=(5, 4)).astype("f")
    close(dot.build(target)(x.T, y[2]), x.T @ y[2], "float32")
    close(dot.build(target)(x[::2, ::3], y.T[1:3, 0]), x[::2, ::3] @ y.T[1:3, 0], "float32")


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_parameters_that_are_updated(target, rng):
    @tw.program
    def append(pages=tw.dense("p d"), slot=tw.dense("t", dtype="int32"), x=tw.dense("t d")):
        t, k = tw.indices("t d")
        return tw.update(pages)[slot[t], k](x[t, k] * 2.0)

    kernel = append.build(target)
    pages, x = rng.normal(size=(6, 3)).astype("f"), rng.normal(size=(2, 3)).astype("f")
    before = pages.copy()
    kernel(pages, np.array([4, 1], np.int32), x)
    before[[4, 1]] = 2 * x
    np.testing.assert_array_equal(pages, before)


@pytest.mark.parametrize("target", ["cpp", "interp"])
@pytest.mark.parametrize("fmt", ["csr", "hyb"])
def test_later_calls_reuse_the_frame(fmt, target, rng):
    """Other arrays of the same layout, other values of the same structure, another matrix."""
    program = rgcn.decompose(A=FORMATS[fmt])
    kernel = program.build(target)
    for n in range(4):
        args = arguments(program, rng, MATRICES[n % 2], m=5, n=6)
        for _ in range(3):
            args["X"] = rng.normal(size=args["X"].shape).astype("f")
            args["A"] = args["A"].with_values(rng.normal(size=args["A"].nnz).astype("f"))
            wanted = evaluate(program.program, args)["out"]
            close(kernel(*args.values()), wanted, "float32")
            close(called(kernel, program, args)["out"], wanted, "float32")


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_arrays_with_gaps_take_their_own_strides(target, rng):
    """A fixed width makes strides constants of the code; an array with gaps, in and out, in any
    order with those without, is right all the same, and nothing between its rows is touched."""
    kernel = spmm.schedule(lambda s: s.specialize("d", 16)).build(target)
    assert kernel.manifest.packed == ("X", "out")
    args = arguments(spmm, rng, d=16)
    wanted = evaluate(spmm.program, args)["out"]
    wide = np.full((len(args["X"]), 40), np.nan, np.float32)
    wide[:, 3:19] = args["X"]
    for x_gaps, out_gaps in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0)):
        room = np.full((len(wanted), 40), -7, np.float32)
        x = wide[:, 3:19] if x_gaps else args["X"]
        out = room[:, 5:21] if out_gaps else room[:, :16].copy()
        for _ in range(2):
            out[:] = np.nan
            kernel(args["A"], x, out=out)
            close(out, wanted, "float32")
        assert (np.delete(room, np.s_[5:21], 1) == -7).all()


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_a_bound_call_sees_new_contents(target, rng):
    kernel = spmm.build(target)
    args = arguments(spmm, rng)
    bound = kernel.bind(**args)
    step = tw.Step([bound, bound])
    for run in (bound, step):
        args["X"][:] = rng.normal(size=args["X"].shape)
        run()
        close(bound.outputs, evaluate(spmm.program, args)["out"], "float32")


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_outputs_are_made_by_the_framework_of_the_arguments(target, rng):
    torch = pytest.importorskip("torch")
    args = arguments(spmm, rng)
    got = spmm.build(target)(args["A"], torch.from_numpy(args["X"]))
    assert isinstance(got, torch.Tensor)
    close(got.numpy(), evaluate(spmm.program, args)["out"], "float32")


def test_bfloat16_through_torch(rng):
    torch = pytest.importorskip("torch")
    program = spmm.typed(A="bfloat16", X="bfloat16")
    args = arguments(program, rng)
    x = torch.from_numpy(args["X"].view(np.int16)).view(torch.bfloat16)
    got = program.build()(args["A"], x)
    assert got.dtype == torch.bfloat16
    close(got.double().numpy(), evaluate(program.program, args)["out"], "bfloat16")


def test_a_matrix_of_another_size_needs_no_other_kernel(rng):
    program = spmm_t.decompose(A=FORMATS["hyb 2"])
    kernel = program.build()
    for m, n in ((40, 3), (3, 40), (17, 19)):
        check(program, arguments(program, rng, "random", m=m, n=n, d=9), kernel)


def test_the_output_of_a_sparse_program_has_the_structure_of_its_input(rng):
    a = pack(FORMATS["hyb"], matrix("random", 6, 7, rng))
    made = softmax.decompose(A=FORMATS["hyb"]).build()(a)
    assert made.structure is a.structure
    t = softmax.program.outputs[0]
    close(
        flat(t, made),
        evaluate(softmax.decompose(A=FORMATS["hyb"]).program, {"A": a})["out"],
        "float32",
    )
    assert (
        numbers(poisoned_output(t, {"A": a}, softmax).values[0], "float32").shape
        == a.values[0].shape
    )


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int64", "float16", "bfloat16", "float64"]
)
def test_every_dtype_compiles_for_gpus(dtype):
    kernel = gemm.typed(A=dtype, B=dtype).build("cuda:sm_80")
    assert all(found.spill_bytes == 0 for found in kernel.resources.values())


@tw.program
def counts(P=tw.dense("m n", "bool"), Q=tw.dense("m n", "bool")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.sum(P[i, j] * Q[i, j] + (-P[i, j]), over=j))


@pytest.mark.parametrize("target", ["interp", "cpp"])
def test_conditions_count_as_numbers(target, rng):
    p, q = rng.random((5, 9)) < 0.5, rng.random((5, 9)) < 0.5
    assert np.array_equal(counts.build(target)(p, q), (p & q).sum(1) - p.sum(1))
