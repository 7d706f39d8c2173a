"""Operators of the rows of a matrix: RMSNorm (Zhang and Sennrich, 2019), SiLU or GELU times a
factor, a scaled array, and the likeliest next token."""

import math
from functools import cache
from typing import Any

from tilewright.build import named_recipe, program
from tilewright.ops import schedules
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out, rsqrt, scalar, sigmoid, tanh

BY_ROW = schedules.rows.of(row="t", elements=("k",))
SUM = "k", "k2"  # a sum over the row, then its elements
WITH_SUM = schedules.rows.of(row="t", elements=SUM)


@named_recipe
def wide_rows(s: Schedule, elements: tuple[str, ...], width: int) -> Schedule:
    """Rows of a fixed width: on a GPU a thread takes four neighbours at once, all loads of a row
    are under way together, and a row without a sum is of several CTAs."""
    s, threads = s.specialize("k", width), min(256, -(-width // 128) * 32)
    if not s.target.is_cuda or width % 4:
        return schedules.rows.of(row="t", elements=elements)(s)
    s = s.bind("t", "cta.y").bind("h", "cta.x") if s.has("h") else s.bind("t", "cta.y")
    for e in elements:
        s = s.split(e, 4, into=(f"{e}_4", f"{e}_v")).vectorize(f"{e}_v")
        s = s.split(f"{e}_4", threads, into=(f"{e}_o", "r"))
        s = s.split("r", 32, into=(f"{e}_y", f"{e}_x"))
        s = s.bind(f"{e}_y", "thread.y").bind(f"{e}_x", "thread.x")
        s = s.bind(f"{e}_o", "cta.x") if len(elements) == 1 else s.unroll(f"{e}_o", 8)
    return s


def _normalised(x: Any, W: Any, eps: Any, k: Any) -> Any:
    return x * rsqrt(trace.mean(x * x, over=k) + eps[()]) * W[k]


@program
def rmsnorm_add(X=dense("t k"), W=dense("k", kind="weight"), eps=scalar(), R=dense("t k")):
    t, k = indices("t:t k:k")
    return out[t, k](R[t, k] + _normalised(X[t, k], W, eps, k))


# X / sqrt(mean(X²) + ε) · W + R. X, R: (t, k), W: (k,), eps: a number → (t, k)
rmsnorm_add_kernel = cache(rmsnorm_add.schedule(WITH_SUM).build)


@cache
def heads_norm_kernel(width: int, stored: str, dtype: str, target: str) -> Kernel:
    """X (t, h, k), `stored` → the RMSNorm of each head in `dtype`; `width`: k, a multiple of 4."""

    def heads_norm(X=dense("t h k", stored), W=dense("k", kind="weight"), eps=scalar()):
        t, h, k = indices("t:t h:h k:k")
        return out.typed(dtype)[t, h, k](_normalised(X[t, h, k], W, eps, k))

    return program(heads_norm).schedule(wide_rows.of(elements=SUM, width=width)).build(target)


@cache
def added_norm_kernel(width: int, dtype: str, target: str) -> Kernel:
    """X (t, k) and B (t, k) in `dtype` → X + B, and its RMSNorm in `dtype`; `width`: as above."""

    def added_norm(
        X=dense("t k"), B=dense("t k", dtype), W=dense("k", kind="weight"), eps=scalar()
    ):
        t, k = indices("t:t k:k")
        y = X[t, k] + B[t, k]
        return out.typed("float32")[t, k](y), out.typed(dtype)[t, k](_normalised(y, W, eps, k))

    return program(added_norm).schedule(wide_rows.of(elements=SUM, width=width)).build(target)


@program
def silu_mul(G=dense("t k"), U=dense("t k")):
    t, k = indices("t:t k:k")
    return out[t, k](G[t, k] * sigmoid(G[t, k]) * U[t, k])


@program
def gelu_mul(G=dense("t k"), U=dense("t k")):
    t, k = indices("t:t k:k")
    g = G[t, k]
    bent = tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g * g * g))
    return out[t, k](0.5 * g * (1.0 + bent) * U[t, k])


@program
def scaled(X=dense("t k"), factor=scalar()):
    t, k = indices("t:t k:k")
    return out[t, k](X[t, k] * factor[()])


@cache
def gated_kernel(
    target: str = "cpp", gelu: bool = False, dtype: str = "float32", width: int = 0
) -> Kernel:
    """G, U (t, k) in `dtype` → silu(G) · U in the same, or with the tanh form of GELU (Hendrycks
    and Gimpel, 2016); `width`: k (0: any)."""
    of = wide_rows.of(elements=("k",), width=width) if width else BY_ROW
    return (gelu_mul if gelu else silu_mul).typed(G=dtype, U=dtype).schedule(of).build(target)


# X (t, k) times a number.
scaled_kernel = cache(scaled.schedule(BY_ROW).build)


@program
def argmax(X=dense("t v")):
    t, v = indices("t:t v:v")
    return out[t](trace.argmax(X[t, v], over=v))


@named_recipe
def argmax_by_row(s: Schedule) -> Schedule:
    """A row is read by one CTA of a GPU: all threads it can have, each with several loads."""
    s = schedules.rows.of(row="t", elements=("v", "v2"), threads_y=32)(s)
    return s.unroll("v_o", 8).unroll("v2_o", 8) if s.target.is_cuda else s


ARGMAX = argmax.schedule(argmax_by_row)
# X (t, v) → the smallest index of the largest value of each row, int32 (t,). A row with NaN gives
# some index of it.
argmax_kernel = cache(ARGMAX.build)
