"""Hand-written CUDA kernels on a CPU: their own text, compiled with warps.h in front of it, and
warps_hopper.h where it includes hopper.cuh. Each launch is checked for races (order.h), and each
step by which threads synchronise can be left out."""

from __future__ import annotations

import ctypes
import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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

SOURCES = (
    Path(render.__file__).parent / "kernels",
    Path(render.__file__).parent.parent / "serve/kernels",
)
REPLACED = "gpu.cuh", "mma.cuh", "async.cuh", "hopper.cuh", "integers.cuh"
FLAGS = "-O1", "-fsanitize=thread"
RUN = """
extern "C" __attribute__((visibility("default"))) UNWATCHED const char*
run(const void* p, int threads, const int32_t* order, int ctas, uint64_t seed,
    const int64_t* arrays, int count, bool equal_stores) {{
  {start}
  auto kernel = [](const void* p) {{ {entry}(*static_cast<const {params}*>(p)); }};
  return simulated::run(kernel, p, threads, order, ctas, seed, arrays, count, equal_stores);
}}
"""

# Steps by which threads synchronise; each call of these is a site.
STEPS = (
    r"__syncwarp|__syncthreads|__threadfence|sync|tw::bar_sync|tw::copy_async_wait<[^>;]*>"
    r"|tw::copy_async_commit|tw::copy_async_arrive|tw::barrier_(?!test)\w+|tw::fence_async|tw::stores_read"
    r"|tw::wgmma_\w+(?:<[^;]*?>)?|tw::wait_for_previous_launch|tw::start_next_launch|release"
    r"|team\.(?:sync|begin)|end_narrow|consumer\.\w+_queries|(?:consumer\.)?arrive|wait_outputs|keys_read|values_ready"
)
CALL = re.compile(rf"(?<![\w.:>])((?:{STEPS})\((?:[^;()]|\((?:[^()]|\([^()]*\))*\))*\));")
VOTE = re.compile(r"(?<=[ (])sync_or\((\w+)\)")
# Conditions on the number of a thread, of its lane or its warp.
GUARD = re.compile(r"(?<!\w)if \(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
NUMBER = re.compile(r"\b(thread|lane|warp|part_lane|tw::elect\(\))(?![\w.])")


class Refused(AssertionError):
    """What a launch reports: a race, or a barrier that some threads do not reach."""


def marked(text: str) -> tuple[str, list[str]]:
    """The text with each site in a form that can be left out, and the names of the sites: their
    file, the text, and which one it is of those with this text."""
    sites: list[str] = []
    for path in sorted(p for folder in SOURCES for p in folder.glob("*.*h")):
        seen: Counter[str] = Counter()

        def name(what: str, path: Path = path, seen: Counter[str] = seen) -> int:
            seen[what] += 1
            sites.append(f"{path.name}: {what}" + f" · {seen[what]}" * (seen[what] > 1))
            return len(sites) - 1

        def step(found: re.Match[str], name: Any = name) -> str:
            return f"(simulated::keeps({name(found[1])}) ? (void)({found[1]}) : (void)0);"

        def vote(found: re.Match[str], name: Any = name) -> str:
            return f"(simulated::keeps({name(found[0])}) ? {found[0]} : {found[1]} != 0)"

        def guard(found: re.Match[str], name: Any = name) -> str:
            if not NUMBER.search(found[1]):
                return found[0]
            return f"if (!simulated::keeps({name(f'if ({found[1]})')}) || ({found[1]}))"

        for part in re.split('^#include ".+"\n', path.read_text(encoding="utf-8"), flags=re.M):
            if len(part) > 200 and part in text:
                lines = []
                for line in part.split("\n"):
                    code, *comment = line.split("  //", 1)
                    if not code.lstrip().startswith(("//", "#")) and "TW_INLINE" not in code:
                        code = VOTE.sub(vote, CALL.sub(step, GUARD.sub(guard, code)))
                    lines.append("  //".join((code, *comment)))
                text = text.replace(part, "\n".join(lines))
    return text, sites


def expanded(text: str) -> str:
    """The text without the files and macros that warps.h replaces."""
    text = re.sub(f'#include "({"|".join(REPLACED)})"\n|#define TW_METHOD .*', "", text)
    return re.sub(r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];",
                  r"\1* \2 = reinterpret_cast<\1*>(simulated::smem);", text)  # fmt: skip


@dataclass
class Sites:
    """Which one all launches leave out, and those that launches have come to."""

    dropped: str = ""
    reached: set[str] = field(default_factory=set)


SITES = Sites()


class Kernel:
    """A compiled kernel. `sites`: the steps and guards of its text, by the number that `dropped`
    takes (-1: none is left out); `reached`: whether a thread has come to each."""

    def __init__(self, library: ctypes.CDLL, sites: list[str]) -> None:
        self.sites, self.run = sites, library.run
        address, number = ctypes.c_void_p, ctypes.c_int
        self.run.argtypes = (address, number, address, number, ctypes.c_uint64, address, number,
                             ctypes.c_bool)  # fmt: skip
        self.run.restype = ctypes.c_char_p
        self.dropped = ctypes.c_int.in_dll(library, "dropped")
        self.reached = (ctypes.c_uint8 * 1024).in_dll(library, "reached")


@functools.lru_cache(32)
def kernel(text: str, entry: str = "stage0", params: str = "body0::Params") -> Kernel:
    """A kernel's CUDA C++, to launch."""
    names = ["warps.h", *["warps_hopper.h"] * ('#include "hopper.cuh"' in text)]
    names.insert(0, "order.h")
    shim = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in names]
    start = "start_others = simulated::start_hopper, simulated::end_thread = simulated::end_hopper"
    start = f"simulated::{start};" if len(names) > 2 else ""
    text, sites = marked(text)
    parts = (shim[0], prelude_files.prelude("cpu.h"), *shim[1:], expanded(text),
             RUN.format(entry=entry, params=params, start=start))  # fmt: skip
    isa = compilers.resolve_isa().name
    return Kernel(cxx.load(cxx.compile_cpp("\n".join(parts), isa=isa, flags=FLAGS)), sites)


def launch(
    kernel: Kernel, block: Any, threads: int, ctas: int, seed: int,
    writes: Sequence[np.ndarray], before: Sequence[np.ndarray] = (),
    equal_stores: bool = False,
) -> None:  # fmt: skip
    """Run a kernel's CTAs in a random order; `block`: its packed parameters, or their address;
    `writes`: the arrays that it may write; `before`: those, of these or others, that a launch in
    front writes, which it must wait for; `equal_stores`: threads of a CTA may store one value to
    one element at once. Raises Refused."""
    order = np.random.default_rng(seed).permutation(ctas).astype(np.int32)
    rows = [(x.ctypes.data, x.nbytes, min(x.itemsize, 4), n < len(before))
            for n, x in enumerate((*before, *writes))]  # fmt: skip
    arrays = np.array(rows, np.int64).reshape(-1, 4)
    address = block if isinstance(block, int) else ctypes.addressof(block)
    sites = kernel.sites
    kernel.dropped.value = sites.index(SITES.dropped) if SITES.dropped in sites else -1
    report = kernel.run(address, threads, order.ctypes.data, ctas, seed, arrays.ctypes.data,
                        len(arrays), equal_stores)  # fmt: skip
    SITES.reached.update(name for name, was in zip(sites, kernel.reached, strict=False) if was)
    if report:
        raise Refused(report.decode())


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
