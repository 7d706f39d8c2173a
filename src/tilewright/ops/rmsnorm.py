"""RMSNorm: Y = X / sqrt(mean(X²) + ε) · W, row by row (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from functools import cache
from typing import Any

from tilewright.build import program
from tilewright.ops import recipes
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out, rsqrt, scalar, size


def _normalised(X: Any, W: Any, eps: Any, t: Any, k: Any) -> Any:
    mean = trace.sum_(X[t, k] * X[t, k], over=k) / size("k").cast("float32")
    return X[t, k] * rsqrt(mean + eps[()]) * W[k]


@program
def rmsnorm(X=dense("t k"), W=dense("k", kind="weight"), eps=scalar()):
    t, k = indices("t:t k:k")
    return out[t, k](_normalised(X, W, eps, t, k))


@program
def rmsnorm_add(X=dense("t k"), W=dense("k", kind="weight"), eps=scalar(), R=dense("t k")):
    t, k = indices("t:t k:k")
    return out[t, k](R[t, k] + _normalised(X, W, eps, t, k))


BY_ROW = recipes.rows.of(row="t", elements=("k", "k2"))
RMSNORM = rmsnorm.schedule(BY_ROW)

# X: (t, k), W: (k,), eps: a number → (t, k); the second adds a residual, R: (t, k).
rmsnorm_kernel = cache(RMSNORM.build)
rmsnorm_add_kernel = cache(rmsnorm_add.schedule(BY_ROW).build)
