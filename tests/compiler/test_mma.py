"""Tile operations end to end: on the interpreter after every pass, in C++, as cubins, on a GPU."""

from __future__ import annotations

import importlib.metadata
import subprocess
from functools import cache

import numpy as np
import pytest
from tests.compiler.bsr_spmm import bsr_spmm, bsr_spmm_kernel, bsr_spmm_program
from tests.compiler.bsr_spmm import recipe as bsr_recipe
from tests.compiler.cases import (
    after_every_pass,
    called,
    filled_padding,
    matrix,
    numbers,
    pack,
    stored,
)  # fmt: skip
from tests.compiler.memory import poisoned

import tilewright as tw
from tilewright import dtypes
from tilewright.errors import ArgumentError, ScheduleError
from tilewright.ir.nodes import For, Load, Mma, Store
from tilewright.ir.rewrite import walk
from tilewright.ops import gemm
from tilewright.ops.gemm import gemm_kernel, gemm_program
from tilewright.ops.gemm import recipe as gemm_recipe
from tilewright.runtime.launch import CudaLauncher
from tilewright.toolchain import nvrtc

HALVES = ("float16", "bfloat16")
SIZES = [  # m, n, k
    (16, 8, 16), (17, 9, 33), (1, 1, 1), (33, 40, 16), (15, 7, 2), (3, 5, 0), (0, 4, 4),
]  # fmt: skip
LARGER = [(64, 128, 48), (130, 71, 100), (31, 257, 65), (70, 136, 200)]
ARCHS = ("sm_80", "sm_90a", "sm_100a")


def half(rng, shape, dtype):
    """Random values in an array with NaN around every row: a tile that reads too far shows it."""
    kind = dtypes.dtype(dtype)
    m, n = shape
    around = poisoned((m + 3, n + 24), kind)
    inside = around[1 : m + 1, 8 : n + 8]
    inside[:] = stored(rng.uniform(-1, 1, shape), kind)
    return inside


def product(a, b, dtype):
    return numbers(a, dtype) @ numbers(b, dtype)


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def everywhere(program, recipe, args):
    """The one output of a scheduled program: right after every pass, returned from C++."""
    assert "materialize_tiles" in after_every_pass(program, args, recipe)
    (got,) = called(program.schedule(recipe).build(), program, args).values()
    return got


def operations(definition, target="cpp"):
    """The tile operations of a lowered program."""
    program = definition.lower(target)
    return [x for stage in program.stages for n in stage for x in walk(n.body)
            if isinstance(x, Mma)]  # fmt: skip


# ---------------------------------------------------------------------------- GEMM


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gemm_after_every_pass(size, dtype, rng):
    m, n, k = size
    target = str(rng.choice(["cpp", "cuda:sm_80"]))
    args = {"A": half(rng, (m, k), dtype), "B": half(rng, (k, n), dtype)}
    program = gemm_program.typed(A=dtype, B=dtype)
    seen = after_every_pass(program, args, gemm_recipe, target)
    assert "materialize_tiles" in seen[1:3]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES + LARGER, ids=str)
def test_gemm_in_cpp(size, dtype, rng):
    m, n, k = size
    a, b = half(rng, (m, k), dtype), half(rng, (k, n), dtype)
    around = poisoned((m + 2, n + 24), dtypes.float32)
    out = around[1 : m + 1, 8 : n + 8]
    assert gemm(a, b, out=out, dtype=dtype) is out
    close(out, product(a, b, dtype))
    out[:] = np.nan
    assert np.isnan(around).all()  # nothing beside the output was written


def test_gemm_keeps_nan_and_infinity_to_their_rows_and_columns(rng):
    a, b = half(rng, (20, 40), "float16"), half(rng, (40, 20), "float16")
    a[3, 5], b[7, 11] = np.nan, np.inf
    got, wanted = gemm(a, b), product(a, b, "float16")
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    close(got[4:, :11], wanted[4:, :11])


@tw.program
def transposed(A=tw.dense("k m"), B=tw.dense("n k")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out.typed("float32")[i, j](tw.sum(B[j, k] * A[k, i], over=k))


@pytest.mark.parametrize("m, n, k", [(16, 8, 16), (17, 9, 33)])
def test_transposed_operands_are_strides(m, n, k, rng):
    program = transposed.typed(A="float16", B="float16")
    args = {"A": half(rng, (k, m), "float16"), "B": half(rng, (n, k), "float16")}
    close(everywhere(program, gemm_recipe, args), product(args["B"], args["A"], "float16").T)
    first = next(x for x in operations(program.schedule(gemm_recipe)) if isinstance(x, Mma))
    assert (first.a.buffer.name, first.b.buffer.name) == ("A", "B")
    assert (str(first.a.row_stride), str(first.a.col_stride)) == ("1", "A.stride0")
    assert (str(first.b.row_stride), str(first.b.col_stride)) == ("1", "B.stride0")


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_narrow_outputs_are_rounded_once(to, rng):
    @tw.program
    def narrow(A=tw.dense("m k"), B=tw.dense("k n")):
        i, j, k = tw.indices("i:m j:n k:k")
        return tw.out.typed(to)[i, j](tw.sum(A[i, k] * B[k, j], over=k))

    program = narrow.typed(A="float16", B="float16")
    args = {"A": half(rng, (19, 37), "float16"), "B": half(rng, (37, 11), "float16")}
    wanted = product(args["A"], args["B"], "float16")
    bits = 11 if to == "float16" else 8
    got = everywhere(program, gemm_recipe, args)
    np.testing.assert_allclose(got, wanted, rtol=1.01 * 2**-bits, atol=1e-5)


def test_one_step_of_depth_needs_no_loop(rng):
    def recipe(s):
        s = s.specialize("k", 16).split("i", 16).split("j", 8)
        return s.reorder("i_o", "j_o", "i_i", "j_i", "k").mma("i_i", "j_i", "k")

    program = gemm_program.typed(A="float16", B="float16")
    args = {"A": half(rng, (21, 16), "float16"), "B": half(rng, (16, 13), "float16")}
    close(everywhere(program, recipe, args), product(args["A"], args["B"], "float16"))


def test_rows_left_over_may_go_without_tiles(rng):
    def recipe(s):
        s = s.split("i", 16, tail="cut").split("j", 8).split("k", 16)
        s = s.reorder("j_o", "i_o", "k_o", "i_i", "j_i", "k_i")
        return s.mma("i_i", "j_i", "k_i")

    program = gemm_program.typed(A="float16", B="float16")
    args = {"A": half(rng, (21, 19), "float16"), "B": half(rng, (19, 13), "float16")}
    close(everywhere(program, recipe, args), product(args["A"], args["B"], "float16"))


# ---------------------------------------------------------------------------- BSR SpMM


def blocks(fmt, kind, shape, dtype, rng):
    """A packed matrix with NaN in its padding; some rows of blocks are empty."""
    dense = matrix(kind, shape[0], shape[1], rng)
    block = fmt.levels[0].block
    dense[block : 2 * block] = 0
    return pack(fmt, dense, dtype)


def dense_of(a, dtype):
    out = np.zeros(a.shape)
    coords, values = a.unpack()
    out[tuple(np.asarray(c) for c in coords)] = numbers(np.asarray(values), dtype)
    return out


@pytest.mark.parametrize("block, dtype", [(16, "float16"), (32, "bfloat16"), (48, "float16")])
@pytest.mark.parametrize("kind", ["random", "one row", "empty"])
def test_bsr_spmm_after_every_pass(kind, block, dtype, rng):
    fmt = tw.bsr(block)
    high = (2 * block if kind != "random" else 24) + 2
    shape = int(rng.integers(1, high)), int(rng.integers(1, high))
    args = {
        "A": blocks(fmt, kind, shape, dtype, rng),
        "X": half(rng, (shape[1], int(rng.choice([1, 9, 34]))), dtype),
    }
    program = bsr_spmm_program.typed(A=dtype, X=dtype).decompose(A=fmt)
    target = str(rng.choice(["cpp", "cuda:sm_80"]))
    seen = after_every_pass(program, args, bsr_recipe(), target)
    assert "materialize_tiles" in seen[1:3]


@pytest.mark.parametrize(
    "block, dtype", [(16, "float16"), (16, "bfloat16"), (32, "bfloat16"), (64, "float16")]
)
@pytest.mark.parametrize("m, n, d", [(96, 64, 32), (1, 1, 1), (100, 130, 45), (64, 130, 29)])
@pytest.mark.parametrize("kind", ["sparse", "one row", "empty"])
def test_bsr_spmm_in_cpp(kind, m, n, d, block, dtype, rng):
    a = blocks(tw.bsr(block), kind, (m, n), dtype, rng)
    x = half(rng, (n, d), dtype)
    out = poisoned((m, d), dtypes.float32)
    assert bsr_spmm(a, x, out=out) is out
    close(out, dense_of(a, dtype) @ numbers(x, dtype))


def test_wide_coordinates(rng):
    a = tw.bsr(16).pack(matrix("sparse", 40, 50, rng), dtype="float16")
    x = half(rng, (50, 20), "float16")
    program = bsr_spmm_program.typed(A="float16", X="float16", index="int64").decompose(
        A=tw.bsr(16)
    )
    first = next(x for x in operations(program.schedule(bsr_recipe())) if isinstance(x, Mma))
    assert first.a.offset.dtype.name == "int64"
    close(bsr_spmm(a, x), dense_of(a, "float16") @ numbers(x, "float16"))


def test_sums_that_meet_a_tile_again_are_added_in_memory(rng):
    """Y = Aᵀ X on the rows of A: the reduced rows come first, and say where a tile of Y lies."""

    @tw.program
    def spmm_t(A=tw.sparse("m n"), X=tw.dense("m d")):
        i, j, k = tw.indices("i:m j:n k:d")
        return tw.out.typed("float32")[j, k](tw.sum(A[i, j] * X[i, k], over=i))

    def recipe(s):
        assert [n.name for n in s.nests] == ["out.init", "out"]
        s = s.on(1).split("k", 8).reorder("i_o", "j_o", "k_o", "j_i", "k_i", "i_i")
        return s.mma("j_i", "k_i", "i_i")

    program = spmm_t.typed(A="float16", X="float16").decompose(A=tw.bsr(16))
    a, x = blocks(tw.bsr(16), "random", (40, 21), "float16", rng), half(rng, (40, 11), "float16")
    got = everywhere(program, recipe, {"A": a, "X": x})
    close(got, dense_of(a, "float16").T @ numbers(x, "float16"))
    last = program.schedule(recipe).lower().stages[-1][0]
    (loop,) = (x for x in walk(last.body) if isinstance(x, For) and x.name == "j_i")
    (store,) = (x for x in walk(loop) if isinstance(x, Store))
    assert loop.kind == "fragment" and store.buffer in {x.buffer for x in walk(store.value)
                                                        if isinstance(x, Load)}  # fmt: skip


def test_a_block_may_be_the_output(rng):
    """SDDMM: the tile that is written is the dense inside of a stored block."""

    @tw.program
    def sddmm(A=tw.sparse("m n"), P=tw.dense("m d"), Q=tw.dense("n d")):
        i, j, k = tw.indices("i:m j:n k:d")
        return tw.out.like(A).typed("float32")[i, j](tw.sum(P[i, k] * Q[j, k], over=k))

    def recipe(s):
        s = s.on(*(n for n, nest in enumerate(s.nests) if nest.name == "out"))
        s = s.split("j_i", 8, into=("j_u", "j_v")).split("k", 16)
        s = s.reorder("i_o", "j_o", "k_o", "j_u", "i_i", "j_v", "k_i")
        return s.mma("i_i", "j_v", "k_i")

    program = sddmm.typed(A="float16", P="float16", Q="float16").decompose(A=tw.bsr(16))
    a = blocks(tw.bsr(16), "sparse", (37, 20), "float16", rng)
    args = {"A": a, "P": half(rng, (37, 19), "float16"), "Q": half(rng, (20, 19), "float16")}
    (i, j), _ = a.unpack()
    close(everywhere(program, recipe, args), product(args["P"], args["Q"].T, "float16")[i, j])


# ---------------------------------------------------------------------------- refusals


def tiled(s, k="k_i"):
    s = s.split("i", 16).split("j", 8).split("k", 16)
    return s.reorder("i_o", "j_o", "k_o", "i_i", "j_i", k).mma("i_i", "j_i", k)


def wrong_extents(s):
    s = s.split("i", 16).split("j", 4).split("k", 16)
    return s.reorder("i_o", "j_o", "k_o", "i_i", "j_i", "k_i").mma("i_i", "j_i", "k_i")


def not_innermost(s):
    return s.split("i", 16).split("j", 8).split("k", 16).mma("i_i", "j_i", "k_i")


def sums_over_rows(s):
    s = s.split("i", 16).split("j", 8).split("k", 16)
    s = s.split("k_i", 16, into=("k_a", "k_b")).reorder(
        "i_o", "j_o", "k_o", "k_a", "k_b", "j_i", "i_i"
    )
    return s.mma("k_b", "j_i", "i_i")


def split_afterwards(s):
    return tiled(s).split("k_i", 8)


def cut_depth(s):
    return tiled(s).split("k_o", 2, tail="cut")


def open_slots(s):
    s = s.split("i", 16).split("j", 8).split("k", 16)
    return s.reorder("i_o", "k_o", "j_o", "i_i", "j_i", "k_i").mma("i_i", "j_i", "k_i")


def depth_in_threads(s):
    s = s.split("i", 16).split("j", 8).split("k", 64).split("k_i", 16, into=("k_y", "k_x"))
    s = s.reorder("i_o", "j_o", "k_o", "k_y", "i_i", "j_i", "k_x").bind("k_y", "thread.y")
    return s.mma("i_i", "j_i", "k_x")


def columns_in_lanes(s):
    s = s.split("i", 16).split("j", 256).split("j_i", 8, into=("j_x", "j_v")).split("k", 16)
    s = s.reorder("i_o", "j_o", "j_x", "k_o", "i_i", "j_v", "k_i").bind("j_x", "thread.x")
    return s.mma("i_i", "j_v", "k_i")


@pytest.mark.parametrize(
    "recipe, says",
    [
        (wrong_extents, "16 × 8 × 16"),
        (not_innermost, "innermost"),
        (sums_over_rows, "over"),
        (split_afterwards, "no longer"),
        (cut_depth, "another loop"),
        (open_slots, "run-time extent"),
        (depth_in_threads, "k_y"),
        (columns_in_lanes, "thread.x"),
    ],
)
def test_schedules_refused(recipe, says):
    program = gemm_program.typed(A="float16", B="float16").schedule(recipe)
    with pytest.raises(ScheduleError, match=says) as e:
        program.lower("cuda:sm_80")
    assert e.value.code == "S102"
    assert e.value.hint


@pytest.mark.parametrize(
    "types",
    [{}, {"A": "float16"}, {"A": "float16", "B": "bfloat16"}, {"A": "float64", "B": "float64"}],
    ids=str,
)
def test_dtypes_refused(types):
    with pytest.raises(ScheduleError, match="float16 or bfloat16") as e:
        gemm_program.typed(**types).schedule(gemm_recipe).lower()
    assert e.value.code == "S102"
    assert "typed" in e.value.hint


@tw.program
def gathered(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out.typed("float32")[i, k](tw.sum(A[i, j] * X[j, k], over=j))


@tw.program
def wrapped(A=tw.dense("m k"), B=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out.typed("float32")[i, j](tw.sum(A[i, k % 3] * B[k, j], over=k))


@tw.program
def joined(A=tw.dense("m k"), B=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out.typed("float32")[i, j](tw.sum(A[i, k] * B[k, i + j], over=k))


@tw.program
def computed(A=tw.dense("m k"), B=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out.typed("float32")[i, j](tw.sum(A[i, k] * tw.exp(B[k, j]), over=k))


def ell_tiles(s):
    s = s.split("i", 16).split("k", 8).reorder("i_o", "k_o", "i_i", "k_i", "j")
    return s.mma("i_i", "k_i", "j")


def test_gathers_are_refused():
    program = gathered.typed(A="float16", X="float16").decompose(A=tw.ell(16)).schedule(ell_tiles)
    with pytest.raises(ScheduleError) as e:
        program.lower()
    assert e.value.code == "S102"
    assert "affine" in e.value.hint
    assert "bsr" in e.value.hint


@pytest.mark.parametrize("program", [wrapped, joined, computed], ids=lambda p: p.name)
def test_other_accesses_are_refused(program):
    with pytest.raises(ScheduleError, match="no tile") as e:
        program.typed(A="float16", B="float16").schedule(tiled).lower()
    assert e.value.code == "S102"
    assert "affine" in e.value.hint


def test_gemm_refuses_what_it_cannot_multiply(rng):
    x = rng.random((20, 20), np.float32)
    with pytest.raises(ArgumentError, match="A102"):
        gemm(x, x)


# ---------------------------------------------------------------------------- CUDA


@cache
def nvdisasm() -> str:
    for f in importlib.metadata.files("nvidia-cuda-nvdisasm") or ():
        if f.name == "nvdisasm":
            return str(f.locate())
    return ""


BSR = {  # block, dtype, width
    "bsr 16": (16, "bfloat16", 0),
    "bsr 32": (32, "float16", 128),
    "bsr 64": (64, "float16", 40),
}


def kernel_of(name, target):
    if name == "gemm float16":
        return gemm_kernel(target, "float16")
    if name == "gemm bfloat16":
        return gemm_kernel(target, "bfloat16")
    if name == "gemm fixed":
        return gemm_kernel(target, "float16", 96, 200)
    block, dtype, width = BSR[name]
    return bsr_spmm_kernel(target, tw.bsr(block), dtype, width)


NAMES = ("gemm float16", "gemm bfloat16", "gemm fixed", *BSR)


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_cubins_use_tensor_cores_and_spill_nothing(name, arch, tmp_path):
    kernel = kernel_of(name, f"cuda:{arch}")
    assert kernel.manifest.stages[0].threads[0] % 32 == 0
    for found in kernel.resources.values():
        assert found.spill_bytes == 0
        assert found.registers <= 168
    try:
        tool = nvdisasm()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvdisasm is not installed")
    launcher = kernel.launcher
    assert isinstance(launcher, CudaLauncher)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(launcher.image(()))
    text = subprocess.run(
        [tool, "-c", str(path)], capture_output=True, encoding="utf-8", check=True
    ).stdout
    bf16 = "tw::bfloat16_bits" in kernel.source
    assert ("HMMA.16816.F32.BF16" if bf16 else "HMMA.16816.F32 ") in text
    assert bf16 or "BF16" not in text
    if arch == "sm_80":  # what arrays at odd addresses take
        assert launcher.image(("TW_UNALIGNED",))[:4] == b"\x7fELF"


def on_gpu(array, dtype):
    from tilewright.runtime.cuda import DeviceArray

    return DeviceArray.from_numpy(np.ascontiguousarray(array), dtype)


def blank(shape):
    return on_gpu(poisoned(shape, dtypes.float32), "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES + LARGER, ids=str)
def test_gemm_on_a_gpu(size, dtype, rng):
    m, n, k = size
    a, b = half(rng, (m, k), dtype), half(rng, (k, n), dtype)
    out = gemm(on_gpu(a, dtype), on_gpu(b, dtype), out=blank((m, n)))
    close(out.to_numpy(), product(a, b, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("left", [0, 8, 1])
def test_gemm_on_a_gpu_among_nan(left, dtype, rng):
    """Rows of a larger array: aligned to words of two elements, or not at all."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)

    def inside(values):
        m, n = values.shape
        around = torch.full((m + 2, 96 + left % 2), float("nan"), device="cuda").to(values.dtype)
        around[1 : m + 1, left : left + n] = values
        return around, around[1 : m + 1, left : left + n]

    m, n, k = 50, 75, 43
    a = torch.from_numpy(rng.uniform(-1, 1, (m, k))).to(kind).cuda()
    b = torch.from_numpy(rng.uniform(-1, 1, (k, n))).to(kind).cuda()
    around, out = inside(torch.full((m, n), float("nan"), device="cuda"))
    gemm(inside(a)[1], inside(b)[1], out=out)
    close(out.cpu().numpy(), (a.double() @ b.double()).cpu().numpy())
    out.fill_(float("nan"))
    assert bool(torch.isnan(around).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("m, n, d", [(96, 64, 32), (1, 1, 1), (100, 77, 45), (300, 260, 256)])
@pytest.mark.parametrize("kind", ["sparse", "one row", "empty"])
def test_bsr_spmm_on_a_gpu(kind, m, n, d, block, dtype, rng):
    a = filled_padding(blocks(tw.bsr(block), kind, (m, n), dtype, rng))
    x = half(rng, (n, d), dtype)
    out = bsr_spmm(a.to("cuda"), on_gpu(x, dtype), out=blank((m, d)))
    close(out.to_numpy(), dense_of(a, dtype) @ numbers(x, dtype))
