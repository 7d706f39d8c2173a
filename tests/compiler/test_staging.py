"""`cache` and `privatize`: values get a second home, and results stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
from tests.compiler.bsr_spmm import bsr_spmm_program
from tests.compiler.cases import (
    FORMATS,
    after_every_pass,
    arguments,
    called,
    close,
    filled_padding,
    gemm,
    matrix,
    pack,
    row_pairs,
    sddmm,
    spmm,
    spmm_t,
    stored,
    widened,
)
from tests.compiler.test_mma import HALVES, blank, half, on_gpu, product

import tilewright as tw
from tilewright.errors import ScheduleError
from tilewright.ops.gemm import gemm_program
from tilewright.reference.evaluate import evaluate
from tilewright.sparse.pack import Packed
from tilewright.toolchain import compilers, nvrtc

needs_cxx = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
SIZES = ((5, 6, 3), (9, 8, 17), (1, 1, 4), (0, 3, 8), (3, 0, 1), (40, 8, 40))


def gathered(s):
    """Rows of X that eight entries of A meet, as a tile in shared memory."""
    s = s.split("k", 32).split("j", 8)
    s = s.reorder("i", "k_o", "j_o", "k_i", "j_i")
    s = s.bind("k_i", "thread.x").bind("i", "cta.x").cache("X", "j_o", "shared")
    return s


def tiled_gemm(s):
    """A CTA keeps a tile of A and one of B in shared memory; a thread 4 × 4 elements of C."""
    s = s.split("i", 32, into=("i_o", "i_r")).split("i_r", 4, into=("i_y", "i_u"))
    s = s.split("j", 16, into=("j_o", "j_r")).split("j_r", 4, into=("j_x", "j_u"))
    s = s.split("k", 8).reorder("i_o", "j_o", "k_o", "i_y", "j_x", "k_i", "i_u", "j_u")
    s = s.bind("i_o", "cta.x").bind("j_o", "cta.y").bind("i_y", "thread.y").bind("j_x", "thread.x")
    return s.cache("A", "k_o", "shared").cache("B", "k_o", "shared")


def mma_gemm(s, warps=4):
    """Tile operations that read both operands from shared memory."""
    s = s.split("i", 32, into=("i_o", "i_r")).split("i_r", 16, into=("i_u", "i_v"))
    s = s.split("j", 32 * warps, into=("j_o", "j_r")).split("j_r", 32, into=("j_y", "j_w"))
    s = s.split("j_w", 8, into=("j_u", "j_v"))
    s = s.split("k", 32, into=("k_o", "k_r")).split("k_r", 16, into=("k_u", "k_v"))
    s = s.reorder("i_o", "j_o", "k_o", "j_y", "k_u", "i_u", "j_u", "i_v", "j_v", "k_v")
    s = s.unroll("i_u").unroll("j_u").mma("i_v", "j_v", "k_v")
    s = s.bind("i_o", "cta.x").bind("j_o", "cta.y").bind("j_y", "thread.y")
    return s.cache("A", "k_o", "shared").cache("B", "k_o", "shared")


def cached_bsr(s):
    """The rows of X that a block meets, once for all warps and tiles that need them."""
    s = s.split("i_i", 16, into=("i_u", "i_v")).split("j_i", 16, into=("j_u", "j_v"))
    s = s.split("k", 64, into=("k_o", "k_r")).split("k_r", 32, into=("k_y", "k_w"))
    s = s.split("k_w", 8, into=("k_u", "k_v"))
    s = s.reorder("i_o", "k_o", "j_o", "k_y", "j_u", "i_u", "k_u", "i_v", "k_v", "j_v")
    s = s.unroll("i_u").unroll("k_u").mma("i_v", "k_v", "j_v")
    s = s.bind("i_o", "cta.x").bind("k_o", "cta.y").bind("k_y", "thread.y")
    return s.cache("X", "j_o", "shared").cache("A", "j_o", "shared")


CASES = {
    "gathered, csr": (spmm, "csr", gathered),
    "gathered, ell": (spmm, "ell", gathered),
    "gathered, hyb": (spmm, "hyb", gathered),
    "tiled gemm": (gemm, None, tiled_gemm),
    "values in registers": (
        spmm, "csr", lambda s: s.split("j", 4).cache("A", "j_o").parallel("i"),
    ),
    "a row in registers": (
        spmm_t, "csr", lambda s: s.split("k", 4).reorder("i", "k_o", "j", "k_i").cache("X", "k_o"),
    ),
    "a vector in registers": (
        gemm, None,
        lambda s: s.split("j", 4, tail="cut").split("k", 4).reorder("k_o", "k_i", "j_i")
        .vectorize("j_i").cache("A", "k_o"),
    ),
    "sampled": (
        sddmm, "csr", lambda s: s.split("k", 4).reorder("k_o", "k_i").cache("P", "k_o"),
    ),
    "copies": (spmm, "coo", lambda s: s.privatize("out", "i", 3)),
    "copies of a transposed product": (spmm_t, "csr", lambda s: s.privatize("out", "i", 4)),
}  # fmt: skip


GPU = ("gathered, csr", "gathered, ell", "gathered, hyb", "tiled gemm")  # threads are bound


def recipe_of(name):
    program, fmt, recipe = CASES[name]
    return program.decompose(A=FORMATS[fmt]) if fmt else program, recipe


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["random", "one row", "empty"])
def test_meaning_after_every_pass(name, kind, rng):
    definition, recipe = recipe_of(name)
    target = "cuda" if name in GPU else "cpp"
    seen = after_every_pass(definition, arguments(definition, rng, kind, d=9, k=9), recipe, target)
    assert "schedule" in seen


@needs_cxx
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_on_the_cpu(name, index, rng):
    definition, recipe = recipe_of(name)
    kernel = definition.typed(index=index).schedule(recipe).build()
    for m, n, d in SIZES:
        args = arguments(definition, rng, "random", m=m, n=n, d=d, k=d)
        if index == "int64":
            args = {k: widened(v) if isinstance(v, Packed) else v for k, v in args.items()}
        wanted = evaluate(definition.program, args)
        for t in definition.program.outputs:
            close(called(kernel, definition, args)[t.name], wanted[t.name], "float32")


# ---------------------------------------------------------------------------- tile operations


def halves(size, dtype, rng):
    m, n, k = size
    return {"A": half(rng, (m, k), dtype), "B": half(rng, (k, n), dtype)}


TILES = [(64, 128, 64), (17, 9, 33), (1, 1, 1), (0, 4, 4), (3, 5, 0), (130, 71, 100)]


@pytest.mark.parametrize("size", [(33, 24, 64), *TILES[1:5]], ids=str)
def test_tiles_from_shared_memory_after_every_pass(size, rng):
    program = gemm_program.typed(A="float16", B="float16")
    after_every_pass(program, halves(size, "float16", rng), lambda s: mma_gemm(s, 1), "cuda")


@needs_cxx
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", TILES, ids=str)
def test_tiles_from_shared_memory_on_the_cpu(size, dtype, rng):
    program = gemm_program.typed(A=dtype, B=dtype)
    args = halves(size, dtype, rng)
    (got,) = called(program.schedule(mma_gemm).build(), program, args).values()
    np.testing.assert_allclose(got, product(args["A"], args["B"], dtype), rtol=1e-5, atol=1e-5)


def blocks_and_rows(block, dtype, rng, m=100, n=77, d=45):
    program = bsr_spmm_program.typed(A=dtype, X=dtype).decompose(A=tw.bsr(block))
    a = pack(tw.bsr(block), matrix("sparse", m, n, rng), dtype)
    return program, {"A": a, "X": half(rng, (n, d), dtype)}


@needs_cxx
@pytest.mark.parametrize(("block", "dtype"), [(16, "float16"), (32, "bfloat16")])
def test_blocks_from_shared_memory(block, dtype, rng):
    program, args = blocks_and_rows(block, dtype, rng, 40, 50, 29)
    after_every_pass(program, args, cached_bsr, "cuda")
    (got,) = called(program.schedule(cached_bsr).build(), program, args).values()
    wanted = product(unpacked(args["A"], dtype), args["X"], dtype)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def unpacked(a, dtype):
    (i, j), values = a.unpack()
    out = stored(np.zeros(a.shape), dtype)
    out[i, j] = values
    return out


# ---------------------------------------------------------------------------- CUDA

CUDA = {
    name: CASES[name] for name in ("gathered, csr", "gathered, ell", "gathered, hyb", "tiled gemm")
}


@needs_nvrtc
@pytest.mark.parametrize("name", CUDA)
def test_cubins_spill_nothing(name):
    definition, recipe = recipe_of(name)
    kernel = definition.schedule(recipe).build("cuda:sm_90a")
    assert "bar.sync" not in kernel.source and "tw::bar_sync(BARRIER, " in kernel.source
    assert kernel.manifest.stages[0].smem_bytes > 0
    assert all(found.spill_bytes == 0 for found in kernel.resources.values())


@needs_nvrtc
@pytest.mark.parametrize("dtype", HALVES)
def test_tiles_are_read_by_ldmatrix(dtype):
    kernel = gemm_program.typed(A=dtype, B=dtype).schedule(mma_gemm).build("cuda:sm_80")
    for x, row in (("A", 32), ("B", 128)):  # swizzled: no bytes beside a row
        assert f"tw::shared_rows<uint16_t, tw::swizzled<{row}, 2>>{{{{{x}_shared" in kernel.source
    assert "tw::shared_window" not in kernel.source and "tw::tile(A " not in kernel.source
    assert all(found.spill_bytes == 0 for found in kernel.resources.values())
    assert kernel.manifest.stages[0].smem_bytes == 2 * (32 * 32 + 32 * 128)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA)
def test_scratch_on_a_gpu(name, rng):
    from tilewright.runtime.cuda import DeviceArray

    definition, recipe = recipe_of(name)
    kernel = definition.schedule(recipe).build("cuda")
    for m, n, d in (*SIZES, (300, 8, 96)):
        args = arguments(definition, rng, "random", m=m, n=n, d=d, k=d)
        wanted = evaluate(definition.program, args)["out"]
        given = {
            k: v.to("cuda") if isinstance(v, Packed) else DeviceArray.from_numpy(v)
            for k, v in args.items()
        }
        out = kernel(**given, out=blank(wanted.shape))
        close(out.to_numpy(), wanted, "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [*TILES, (257, 384, 512)], ids=str)
def test_tiles_from_shared_memory_on_a_gpu(size, dtype, rng):
    args = halves(size, dtype, rng)
    kernel = gemm_program.typed(A=dtype, B=dtype).schedule(mma_gemm).build("cuda")
    given = {k: on_gpu(v, dtype) for k, v in args.items()}
    out = kernel(**given, out=blank((size[0], size[1]))).to_numpy()
    np.testing.assert_allclose(out, product(args["A"], args["B"], dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block", [16, 32])
def test_blocks_from_shared_memory_on_a_gpu(block, dtype, rng):
    program, args = blocks_and_rows(block, dtype, rng, 300, 260, 130)
    kernel = program.schedule(cached_bsr).build("cuda")
    a = filled_padding(args["A"])
    out = kernel(a.to("cuda"), on_gpu(args["X"], dtype), out=blank((300, 130)))
    wanted = product(unpacked(args["A"], dtype), args["X"], dtype)
    np.testing.assert_allclose(out.to_numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_copies_on_a_gpu(rng):
    from tilewright.runtime.cuda import DeviceArray

    definition, recipe = recipe_of("copies")
    kernel = definition.schedule(recipe).build("cuda")
    args = arguments(definition, rng, "random", m=60, n=50, d=33)
    wanted = evaluate(definition.program, args)["out"]
    out = kernel(args["A"].to("cuda"), DeviceArray.from_numpy(args["X"]), out=blank((60, 33)))
    close(out.to_numpy(), wanted, "float32")


# ---------------------------------------------------------------------------- refusals

REFUSED = [
    (spmm, "S101", lambda s: s.cache("Z", "j"), "Z"),
    (spmm, "S101", lambda s: s.cache("X", "nowhere"), "nowhere"),
    (spmm, "S102", lambda s: s.cache("X", "j", "global"), "global"),
    (spmm, "S102", lambda s: s.cache("X", "i"), "run-time extent"),
    (spmm, "S102", lambda s: s.split("k", 512).reorder("j", "k_i").cache("X", "j"), "registers"),
    (spmm, "S102", lambda s: s.split("k", 512).split("j", 256).reorder("j_o", "k_i", "j_i")
     .cache("X", "j_o", "shared"), "bytes"),
    (
        spmm, "S102",
        lambda s: s.split("k", 8).reorder("j", "k_i").bind("k_i", "thread.x").cache("X", "j"),
        "threads",
    ),
    (spmm, "S101", lambda s: s.split("j", 4).cache("A", "j_o").cache("A", "j_o"), "A"),
    (row_pairs, "S102", lambda s: s.cache("A", "i"), "A"),
    (spmm, "S102", lambda s: s.privatize("out", "i", 4), "in place"),
    (spmm_t, "S101", lambda s: s.privatize("nope", "i", 4), "nope"),
    (spmm_t, "S101", lambda s: s.privatize("out", "j", 4), "j"),
    (spmm_t, "S102", lambda s: s.privatize("out", "i", 1), "1"),
    (spmm_t, "S102", lambda s: s.atomic("out").parallel("i").privatize("out", "i", 2), "parallel"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "code", "verb", "name"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_say_why(program, code, verb, name):
    with pytest.raises(ScheduleError) as caught:
        verb(program.scheduled())
    assert caught.value.code == code and name in caught.value.message, str(caught.value)
    assert caught.value.hint


LATE = [
    (  # a guard on threads around the meeting
        lambda s: s.split("i", 32).bind("i_i", "thread.x")
        .split("j", 8).cache("X", "j_o", "shared"),
        "inside a loop bound to threads",
    ),
    (
        lambda s: s.split("k", 8).split("j", 8).reorder("i", "k_o", "j_o", "k_i", "j_i")
        .bind("k_i", "thread.x").cache("X", "j_o", "shared"),
        "complete warps",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "why"), LATE)
def test_threads_that_cannot_meet_are_refused(recipe, why):
    definition = spmm.typed(A="float32").schedule(lambda s: recipe(s.specialize("d", 8)))
    with pytest.raises(ScheduleError, match=why):
        definition.lower("cuda:sm_90a")


def test_a_second_home_prints(rng):
    s = recipe_of("gathered, csr")[0].scheduled()
    text = str(gathered(s))
    assert "X_shared" in text and "# threads" in text and ".cache('X', 'j_o', 'shared')" in text
    text = str(spmm_t.scheduled().privatize("out", "i", 4))
    assert "out.copies" in text and "out.join" in text


def test_what_a_cta_does_not_have_is_refused():
    def many(s):
        s = s.split("i", 64).split("k", 64).reorder("i_o", "k_o", "i_i", "k_i", "j")
        return s.bind("i_i", "thread.y").bind("k_i", "thread.x")

    with pytest.raises(ScheduleError, match="4096 threads") as caught:
        spmm.schedule(many).lower("cuda:sm_90a")
    assert caught.value.code == "S103" and caught.value.hint
