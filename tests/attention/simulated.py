"""Hand-written CUDA kernels on a CPU: their own text, compiled with warps.h in front of it, and
warps_hopper.h where it includes hopper.cuh."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
from tests.attention import oracle

from tilewright.attention import render
from tilewright.attention.arguments import values_of
from tilewright.attention.spec import param_values
from tilewright.codegen import prelude_files
from tilewright.runtime.view import view
from tilewright.toolchain import compilers, cxx

REPLACED = "gpu.cuh", "mma.cuh", "async.cuh", "hopper.cuh"
RUN = """
extern "C" __attribute__((visibility("default")))
void run(const {params}* p, int threads, const int32_t* order, int ctas, uint64_t seed) {{
  auto kernel = [](const void* p) {{ {entry}(*static_cast<const {params}*>(p)); }};
  simulated::run(kernel, p, threads, order, ctas, seed);
}}
"""


def expanded(text: str) -> str:
    """The text without the files and macros that warps.h replaces."""
    text = re.sub(f'#include "({"|".join(REPLACED)})"\n|#define TW_(METHOD|SCAN) .*', "", text)
    return re.sub(r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];",
                  r"\1* \2 = reinterpret_cast<\1*>(simulated::smem);", text)  # fmt: skip


@functools.lru_cache(32)
def kernel(text: str, entry: str = "stage0", params: str = "body0::Params") -> Any:
    """`run(params, threads, order, ctas, seed)` of a kernel's CUDA C++."""
    names = ["warps.h", *["warps_hopper.h"] * ('#include "hopper.cuh"' in text)]
    shim = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)
    parts = (
        prelude_files.prelude("cpu.h"),
        shim,
        expanded(text),
        RUN.format(entry=entry, params=params),
    )
    library = cxx.load(cxx.compile_cpp("\n".join(parts), isa=compilers.resolve_isa().name))
    library.run.argtypes = (*(ctypes.c_void_p, ctypes.c_int) * 2, ctypes.c_uint64)
    library.run.restype = None
    return library.run


def launch(run: Any, block: Any, threads: int, ctas: int, seed: int) -> None:
    """Run a kernel's CTAs in a random order; `block`: its packed parameters."""
    order = np.random.default_rng(seed).permutation(ctas).astype(np.int32)
    run(ctypes.addressof(block), threads, order.ctypes.data, ctas, seed)


def arguments(
    case: oracle.Case, attn: Any, kv: Any, tokens: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray, dict[str, Any], Any]:
    """Poisoned o (of `dtype`) and lse, the parameters of a kernel that writes them, and the arrays
    of the variant, which stay alive as long as the caller keeps them."""
    o = np.full((*case.q.shape[:2], case.dims[1]), np.nan, dtype)
    lse = np.full(case.q.shape[:2], np.nan, np.float32)
    sizes = {"qo_head": attn.qo_heads, "kv_head": attn.kv_heads, "request": kv.table.requests,
             "q_token": tokens}  # fmt: skip
    arrays = values_of(attn.variant, oracle.arrays_of(case), sizes, "cpu")
    numbers = param_values(view(case.q), kv.pool, kv.table, (view(o), view(lse)), attn.scale)
    seen = {n: found for n, (_, found) in arrays.items()}
    return o, lse, numbers | render.param_values(attn.variant.traced, seen), arrays
