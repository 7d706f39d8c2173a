"""Elementwise operators: SiLU or GELU times a factor, and a scaled array."""

from __future__ import annotations

import math
from functools import cache

from tilewright.build import program
from tilewright.ops import recipes
from tilewright.runtime.kernel import Kernel
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


SILU_MUL = silu_mul.schedule(recipes.rows.of(row="t", elements=("k",)))


@cache
def silu_mul_kernel(target: str = "cpp") -> Kernel:
    """silu(G) · U, both (t, k)."""
    return SILU_MUL.build(target)


@cache
def gelu_mul_kernel(target: str = "cpp") -> Kernel:
    """gelu(G) · U, both (t, k), with the tanh form of GELU (Hendrycks and Gimpel, 2016)."""
    return gelu_mul.schedule(recipes.rows.of(row="t", elements=("k",))).build(target)


@cache
def scaled_kernel(target: str = "cpp") -> Kernel:
    """X (t, k) times a number."""
    return scaled.schedule(recipes.rows.of(row="t", elements=("k",))).build(target)
