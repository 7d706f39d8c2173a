"""Lesson 10's products on matrix tiles against float64: formats, odd shapes, empty rows of blocks,
on the interpreter after every pass, in C++, as cubins, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import after_every_pass, filled_padding, matrix, numbers, pack, stored
from tests.compiler.memory import poisoned
from tests.shipped import lesson

import tilewright as tw
from tilewright import dtypes
from tilewright.errors import ScheduleError
from tilewright.ir.levels import Dense, Fixed
from tilewright.toolchain import nvrtc

module = lesson("10_blocks.py")
FORMATS = (tw.bsr(16), tw.bsr(32), tw.dbsr(16), tw.dbsr(32), tw.sr_bcrs(8), tw.sr_bcrs(16))
COVERING = module.covering_dbsr(16), module.covering_dbsr(32)
PIECES = [module.in_pieces(f, 2 if f.blocks[1] > 1 else 32) for f in FORMATS[::2] + FORMATS[5:]]
STRIPES = [  # padded: every stripe has the same number of slots
    tw.Format(f"ell({b})", (Dense(0, block=b), Fixed(1, width=49), Dense(0, block=b, inner=True)))
    for b in (8, 16)
]
CASES = [("spmm", fmt) for fmt in (*FORMATS, *COVERING, *STRIPES)]
CASES += [("sddmm", fmt) for fmt in (*FORMATS, *COVERING, *PIECES)]
HALVES = ("float16", "bfloat16")
SIZES = [(96, 64, 32), (1, 1, 29), (37, 45, 29), (7, 130, 32)]  # m, n, d


def half(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Random values in an array with NaN around every row."""
    m, n = shape
    around = poisoned((m + 3, n + 24), dtypes.dtype(dtype))
    inside = around[1 : m + 1, 8 : n + 8]
    inside[:] = stored(rng.uniform(-1, 1, shape), dtypes.dtype(dtype))
    return inside


def packed(fmt: Any, kind: str, m: int, n: int, dtype: str, rng: np.random.Generator) -> Any:
    """A matrix with a row of blocks that is empty, and NaN in all padding."""
    dense = matrix(kind, m, n, rng)
    dense[:, 49:] *= fmt not in STRIPES
    dense[fmt.blocks[0] : 2 * fmt.blocks[0]] = 0
    return pack(fmt, dense, dtype)


def definition(name: str, fmt: Any, d: int, dtype: str, **options: int) -> Any:
    operands = ("A", "X") if name == "spmm" else ("A", "X", "Y")
    typed = getattr(module, name).typed(**dict.fromkeys(operands, dtype)).decompose(A=fmt)
    schedule = getattr(module, f"{name}_on_tiles")
    return typed, lambda s: schedule(s, d, **options)


def arguments(name: str, a: Any, d: int, dtype: str, rng: np.random.Generator) -> dict[str, Any]:
    m, n = a.shape
    if name == "spmm":
        return {"A": a, "X": half(rng, (n, d), dtype)}
    return {"A": a, "X": half(rng, (m, d), dtype), "Y": half(rng, (n, d), dtype)}


def expected(name: str, args: dict[str, Any], dtype: str) -> np.ndarray:
    """Y, or the values of the result in the order of `unpack`."""
    (i, j), values = args["A"].unpack()
    values, x = numbers(np.asarray(values), dtype), numbers(args["X"], dtype)
    if name == "sddmm":
        return values * (x @ numbers(args["Y"], dtype).T)[i, j]
    dense = np.zeros(args["A"].shape)
    dense[i, j] = values
    return dense @ x


def result(name: str, out: Any) -> np.ndarray:
    return out.unpack()[1] if name == "sddmm" else np.asarray(out)


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "fmt"), CASES, ids=str)
def test_on_threads_of_the_interpreter(name, fmt, rng):
    """Meaning after every pass, and no race; asynchronous copies where rows are 16 bytes apart."""
    dtype, kind = str(rng.choice(HALVES)), str(rng.choice(["sparse", "one row", "empty"]))
    m, n = (int(x) for x in rng.integers(1, 40, 2))
    for d in (8, 5):
        options = {"warps": 2, "stages": 2}
        options |= {"group": 16} if name == "spmm" else {"depth": 16}
        program, recipe = definition(name, fmt, d, dtype, **options)
        a = packed(fmt, kind, m, n, dtype, rng)
        seen = after_every_pass(program, arguments(name, a, d, dtype, rng), recipe, "cuda:sm_80")
        assert "materialize_tiles" in seen and ("pipeline_loops" in seen) == (d == 8)


@pytest.mark.parametrize(("name", "fmt"), CASES, ids=str)
def test_in_cpp(name, fmt, rng):
    for d in {d for *_, d in SIZES}:
        dtype = str(rng.choice(HALVES))
        program, recipe = definition(name, fmt, d, dtype)
        kernel = program.schedule(recipe).build()
        for m, n, _ in [s for s in SIZES if s[2] == d]:
            for kind in ("sparse", "one row", "empty"):
                args = arguments(name, packed(fmt, kind, m, n, dtype, rng), d, dtype, rng)
                close(result(name, kernel(**args)), expected(name, args, dtype))


def test_rows_that_no_column_names_are_not_read(rng):
    """NaN in them, and after the last row, enters no sum."""
    d, dtype = 32, "float16"
    for fmt in (tw.sr_bcrs(8), tw.dbsr(32)):
        dense = matrix("dense", 40, 90, rng)
        dense[:, 32:64] = 0
        args = arguments("spmm", fmt.pack(dense, dtype=dtype), d, dtype, rng)
        args["X"][32:64] = np.nan
        program, recipe = definition("spmm", fmt, d, dtype)
        wanted = dense.astype(np.float16).astype(float) @ np.nan_to_num(args["X"].astype(float))
        close(program.schedule(recipe).build()(**args), wanted)


def test_formats_store_columns(rng):
    dense = matrix("sparse", 21, 30, rng)
    a = tw.sr_bcrs(8).pack(dense)
    stripes = np.pad(dense, ((0, 3), (0, 0))).reshape(3, 8, 30).any(1)
    assert len(a.values[0]) == 8 * stripes.sum() and np.array_equal(a.dense(), dense)
    assert a.format.blocks == (8, 1) and str(a.format) == "sr_bcrs(8)"
    pieces = module.in_pieces(tw.sr_bcrs(8), 4).pack(dense)
    groups = -(-stripes.sum(1) // 4)
    assert len(pieces.values[0]) == 4 * 8 * groups.sum() and np.array_equal(pieces.dense(), dense)


def test_tiles_of_other_heights_are_refused(rng):
    program, recipe = definition("spmm", tw.sr_bcrs(4), 32, "float16")
    with pytest.raises(ScheduleError, match="16 × 8 × 16") as e:
        program.schedule(recipe).lower("cuda:sm_90a")
    assert e.value.code == "S102"


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize(("name", "fmt"), [c for c in CASES if c[1].blocks[0] != 16], ids=str)
def test_cubins_copy_16_bytes_and_spill_nothing(name, fmt, arch):
    program, recipe = definition(name, fmt, 256, "float16" if name == "spmm" else "bfloat16")
    kernel = program.schedule(recipe).build(f"cuda:{arch}")
    assert "copy_async<uint16_t, 8>" in kernel.source and "tw::mma" in kernel.source
    assert all(found.spill_bytes == 0 for found in kernel.resources.values())


def test_one_launch_stores_rows_with_blocks_and_without(rng):
    """Rows of blocks are whole: a matrix whose last block is cut off, and empty rows between."""
    fmt = module.covering_dbsr(16)
    program, recipe = definition("spmm", fmt, 32, "float16")
    kernel = program.schedule(recipe).build()
    assert [s.entry for s in kernel.manifest.stages] == ["stage0"]
    dense = matrix("dense", 70, 40, rng)
    dense[16:64] = 0
    a = fmt.pack(dense, dtype="float16")
    assert [p.counts[0] for p in a.structure.parts] == [2, 48]
    args = arguments("spmm", a, 32, "float16", rng)
    out = np.full((70, 32), np.nan, np.float32)
    close(kernel(**args, out=out), expected("spmm", args, "float16"))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "fmt"), CASES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (5, 9, 1), (300, 260, 256)], ids=str)
def test_on_a_gpu(name, fmt, size, rng):
    from tilewright.runtime.cuda import DeviceArray

    m, n, d = size
    dtype = str(rng.choice(HALVES))
    program, recipe = definition(name, fmt, d, dtype)
    kernel = program.schedule(recipe).build("cuda")
    for kind in ("sparse", "one row", "empty"):
        a = filled_padding(packed(fmt, kind, m, n, dtype, rng))
        args = arguments(name, a, d, dtype, rng)
        given = {
            k: x.to("cuda") if x is a else DeviceArray.from_numpy(np.ascontiguousarray(x), dtype)
            for k, x in args.items()
        }
        if name == "spmm":
            given["out"] = DeviceArray.from_numpy(poisoned((m, d), dtypes.float32), "float32")
        got = kernel(**given)
        got = got.to_numpy() if name == "spmm" else result(name, got)
        close(got, expected(name, args, dtype))
