"""Lesson 11's linear layers against float64: odd shapes, types, on the interpreter after every
pass, in C++, as cubins, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import after_every_pass, numbers, stored
from tests.compiler.memory import poisoned
from tests.shipped import lesson

from tilewright import dtypes
from tilewright.errors import ScheduleError
from tilewright.toolchain import nvrtc

module = lesson("11_linear.py")
EPS = 0.25  # large enough to be seen
SMALL = {"rows": 32, "cols": 32, "warps": 2, "stages": 2}


def arguments(name: str, sizes: Any, dtype: str, rng: Any) -> dict[str, Any]:
    """Matrices of a dtype; what is added is float32. `sizes`: t, n, k."""
    kind, (t, n, k) = dtypes.dtype(dtype), sizes
    shapes = {"X": (t, k), "W": (n, k)} | ({"U": (n, k)} if name == "gated" else {})
    args = {x: stored(rng.uniform(-1, 1, shape), kind) for x, shape in shapes.items()}
    if name == "projected":
        args |= {"B": rng.uniform(-1, 1, n), "R": rng.uniform(-1, 1, (t, n))}
        args |= {x: args[x].astype(np.float32) for x in "BR"}
    return {**args, "eps": EPS}


def definition(name: str, k: int, dtype: str, **options: int) -> Any:
    operands = ("X", "W", "U") if name == "gated" else ("X", "W")
    recipe = module.few_rows if name == "gated" else lambda s: module.on_tiles(s, k, **options)
    return getattr(module, name).typed(**dict.fromkeys(operands, dtype)), recipe


def expected(name: str, args: dict[str, Any], dtype: str) -> np.ndarray:
    x, w, *u = (numbers(args[a], dtype) for a in "XWU" if a in args)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + EPS)
    if name == "projected":
        return args["R"] + np.maximum(x @ w.T + args["B"], 0)
    gate = x @ w.T
    return gate / (1 + np.exp(-gate)) * (x @ u[0].T)


@pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [("gated", dtype, sizes) for dtype in ("float16", "bfloat16", "float32", "float64")
     for sizes in ((1, 17, 96), (8, 5, 33), (3, 1, 7))]
    + [("projected", dtype, sizes) for dtype in ("float16", "bfloat16")
       for sizes in ((70, 90, 96), (1, 1, 8), (65, 64, 40), (5, 130, 24))],
)  # fmt: skip
def test_in_cpp(name, dtype, sizes, rng):
    args = arguments(name, sizes, dtype, rng)
    program, recipe = definition(name, sizes[2], dtype)
    out = np.full(sizes[:2], np.nan, np.float32)
    program.schedule(recipe).build()(**args, out=out)
    np.testing.assert_allclose(out, expected(name, args, dtype), rtol=2e-5, atol=1e-5)


def test_weights_of_a_gated_layer_are_read_once(rng):
    """One launch; the sum of squares is a multiply-add more for each weight of `W`."""
    kernel = module.gated.schedule(module.few_rows).build()
    report = kernel.report(**arguments("gated", (4, 8, 64), "float32", rng))
    assert len(report.launches) == 1
    issued = {b.array: b.issued for b in report.bytes}
    assert issued["W"] == issued["U"] == issued["X"] == 4 * 8 * 64 * 4


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("gated", (2, 9, 40)), ("projected", (19, 35, 40)), ("projected", (33, 3, 24))],
)
def test_on_threads_of_the_interpreter(name, sizes, rng):
    """Meaning after every pass, and no race."""
    dtype = str(rng.choice(["float16", "bfloat16"]))
    program, recipe = definition(name, sizes[2], dtype, **(SMALL if name == "projected" else {}))
    args = arguments(name, sizes, dtype, rng)
    seen = after_every_pass(program, args, recipe, "cuda:sm_80")
    if name == "projected":
        assert {"materialize_tiles", "pipeline_loops"} <= set(seen)


def test_rows_that_are_no_multiple_of_16_bytes_are_refused():
    program, recipe = definition("projected", 7, "float16")
    with pytest.raises(ScheduleError, match="2 bytes at a time") as e:
        program.schedule(recipe).build()
    assert e.value.code == "S102" and "a multiple of 8" in e.value.hint


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("name", ["gated", "projected"])
def test_cubins_have_no_spills(name, arch):
    program, recipe = definition(name, 256, "float16")
    kernel = program.schedule(recipe).build(f"cuda:{arch}")
    assert all(found.spill_bytes == 0 for found in kernel.resources.values())
    if name == "projected":
        assert "copy_async<uint16_t, 8>" in kernel.source and "tw::mma" in kernel.source


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gated", "projected"])
@pytest.mark.parametrize("sizes", [(1, 1, 8), (8, 100, 264), (5, 130, 24), (300, 260, 256)])
def test_on_a_gpu(name, sizes, rng):
    from tilewright.runtime.cuda import DeviceArray

    dtype = str(rng.choice(["float16", "bfloat16"]))
    args = arguments(name, sizes, dtype, rng)
    program, recipe = definition(name, sizes[2], dtype)
    kernel = program.schedule(recipe).build("cuda")
    kinds = {x: dtype if x in ("X", "W", "U") else "float32" for x in args}
    given = {x: DeviceArray.from_numpy(a, kinds[x]) for x, a in args.items() if x != "eps"}
    out = DeviceArray.from_numpy(poisoned(sizes[:2], dtypes.float32), "float32")
    kernel(**given, eps=EPS, out=out)
    wanted = expected(name, args, dtype)
    np.testing.assert_allclose(out.to_numpy(), wanted, rtol=2e-5, atol=1e-4)
