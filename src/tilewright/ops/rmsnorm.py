"""RMSNorm: Y = X / sqrt(mean(X²) + ε) · W, row by row (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from functools import cache

from tilewright.build import program
from tilewright.ops import recipes
from tilewright.runtime.kernel import Kernel
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out, rsqrt, scalar, size


@program
def rmsnorm(X=dense("t k"), W=dense("k", kind="weight"), eps=scalar()):
    t, k = indices("t:t k:k")
    mean = trace.sum_(X[t, k] * X[t, k], over=k) / size("k").cast("float32")
    return out[t, k](X[t, k] * rsqrt(mean + eps[()]) * W[k])


RMSNORM = rmsnorm.schedule(recipes.rows.of(row="t", elements=("k", "k2")))


@cache
def rmsnorm_kernel(target: str = "cpp") -> Kernel:
    """X: (t, k), W: (k,), eps: a number → (t, k)."""
    return RMSNORM.build(target)
