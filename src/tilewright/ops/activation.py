"""Elementwise operators: SiLU or GELU times a factor, and a scaled array."""

from __future__ import annotations

import math
from functools import cache

from tilewright.build import program
from tilewright.ops import recipes
from tilewright.sparse.trace import dense, indices, out, scalar, sigmoid, tanh


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


BY_ROW = recipes.rows.of(row="t", elements=("k",))
SILU_MUL = silu_mul.schedule(BY_ROW)

# silu(G) · U, and gelu(G) · U with the tanh form of GELU (Hendrycks and Gimpel, 2016): both (t, k).
silu_mul_kernel = cache(SILU_MUL.build)
gelu_mul_kernel = cache(gelu_mul.schedule(BY_ROW).build)
# X (t, k) times a number.
scaled_kernel = cache(scaled.schedule(BY_ROW).build)
