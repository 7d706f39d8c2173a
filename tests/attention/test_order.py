"""What the simulation of hand-written kernels reports of accesses to memory, and what it does
not: small kernels of two warps."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from tests.attention import simulated

from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")

# Two warps; `s` is shared memory, `p.x` an array; a statement each, and what is reported of it.
CASES = {
    "s[t] = t; __syncthreads(); p.x[t] = s[63 - t];": "",
    "s[t] = t; p.x[t] = s[63 - t];": "race: a",
    "s[t] = t; __syncwarp(); p.x[t] = s[t ^ 1];": "",
    "s[t] = t; __syncwarp(); p.x[t] = s[63 - t];": "race: a",
    "s[t] = t; __syncthreads(); p.x[t] = s[63 - t]; s[t] = 1;": "race: a",
    "s[t] = t; p.x[t] = __shfl_xor_sync(~0u, s[t], 1) + s[t ^ 1];": "race: a",
    "if (t < 63) __syncthreads();": "waits for threads that do not come",
    "if (t != 3) __syncwarp(); else __any_sync(~0u, true);": "different collectives",
    "p.x[64 + t] = 1;": "the test does not name",
    "s[t / 32] = 7; __syncthreads(); p.x[t] = s[t % 2];": "",
    "s[t / 32] = t; __syncthreads(); p.x[t] = s[t % 2];": "race: a write",
    "s[0] = 7;": "race: a write",
    "p.x[0] = t;": "race: a write",
    "if (t == 0) s[0] = 0; __syncthreads(); atomicAdd(s, 1); __syncthreads(); p.x[t] = s[0];": "",
    "if (t == 0) s[0] = 0; __syncthreads(); atomicAdd(s, 1); p.x[t] = s[0];": "race: a",
    "if (t == 0) s[0] = 0; __syncthreads(); if (atomicAdd(s, 1) == 63) s[0] = 0;": "",
    "tw::copy_async_16(s + t * 4, p.x, 16); tw::copy_async_commit(); tw::copy_async_wait<0>();"
    "int y = s[t * 4]; __syncthreads(); p.x[t] = y;": "",
    "tw::copy_async_16(s + t * 4, p.x, 16); tw::copy_async_commit(); tw::copy_async_wait<1>();"
    "int y = s[t * 4]; __syncthreads(); p.x[t] = y;": "race: a",
    "tw::copy_async_16(s + t * 4, p.x, 16); tw::copy_async_wait<0>(); s[t * 4] = 1;": "race: a",
    "tw::copy_async_16(s + t * 4, p.x, 16); tw::copy_async_commit(); tw::copy_async_wait<0>();"
    "__syncwarp(); int y = s[(t ^ 1) * 4]; __syncthreads(); p.x[t] = y;": "",
    "tw::copy_async_16(s + t * 4, p.x, 16); tw::copy_async_commit(); tw::copy_async_wait<0>();"
    "int y = s[(t ^ 1) * 4]; __syncthreads(); p.x[t] = y;": "race: a",
    "for (int i = 0; i < 4; ++i) s[t * 4 + i] = 0; __syncwarp(); uint32_t v[4];"
    "tw::load_matrices(v, s + t * 4); __syncwarp(); s[t * 4] = 1;": "",
    "for (int i = 0; i < 4; ++i) s[t * 4 + i] = 0; __syncwarp(); uint32_t v[4];"
    "tw::load_matrices(v, s + t * 4); s[t * 4] = 1;": "race: a",
    "for (int i = 0; i < 4; ++i) s[t * 4 + i] = 0; uint32_t v[4]; tw::load_matrices(v, s + t * 4);":
        "race: a",
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_reports(seed):
    branches = "\n".join(f"if (p.which == {n}) {{ {x} }}" for n, x in enumerate(CASES))
    text = f"""
namespace body0 {{
struct Params {{ int* x; int64_t which; }};
void stage0(const Params& p) {{
  const int t = threadIdx.x;
  int* s = reinterpret_cast<int*>(simulated::smem);
  {branches}
}}
}}
using body0::stage0;
"""
    kernel = simulated.kernel(text)
    for n, (code, wanted) in enumerate(CASES.items()):
        x = np.zeros(64, np.int32)
        block = (ctypes.c_int64 * 2)(x.ctypes.data, n)
        said = ""
        try:
            simulated.launch(kernel, block, 64, 1, seed, (x,))
        except simulated.Refused as error:
            said = str(error)
        assert (wanted in said) and bool(wanted) == bool(said), (code, said)


def test_launches_and_ctas():
    """A CTA knows what another did behind a counter, but only lanes that a barrier orders behind
    the one that arrived; a launch what one in front did behind a wait."""
    text = """
namespace body0 {
struct Params { int* x; int* counter; int64_t which; };
void stage0(const Params& p) {
  const int t = threadIdx.x, c = blockIdx.x;
  if (p.which < 2) {
    p.x[c * 32 + t] = t;
    __syncwarp();
    int before = t == 0 ? tw::arrive(p.counter) : 0;
    before = __shfl_sync(~0u, before, 0);
    if (p.which) __threadfence();
    else __syncwarp();
    if (before == 1) p.x[t] = p.x[32 + t];
  } else if (p.which == 2) {
    p.x[t] = c;
  } else if (p.which == 3) {
    tw::wait_for_previous_launch();
    p.x[c * 32 + t] = t;
  } else {
    p.x[c * 32 + t] = t;
  }
}
}
using body0::stage0;
"""
    kernel = simulated.kernel(text)
    for which, wanted in enumerate(["", *["race: a"] * 2, "", "the launch before"]):
        x, counter = np.zeros(64, np.int32), np.zeros(1, np.int32)
        block = (ctypes.c_int64 * 3)(x.ctypes.data, counter.ctypes.data, which)
        before = (x,) if which > 2 else ()
        said = ""
        try:
            simulated.launch(kernel, block, 32, 2, 1, (x, counter), before)
        except simulated.Refused as error:
            said = str(error)
        assert wanted in said and bool(wanted) == bool(said), (which, said)
