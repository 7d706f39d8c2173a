"""Elementwise operators: SiLU times a factor."""

from __future__ import annotations

from functools import cache

from tilewright.build import program
from tilewright.ops import recipes
from tilewright.runtime.kernel import Kernel
from tilewright.sparse.trace import dense, indices, out, sigmoid


@program
def silu_mul(G=dense("t k"), U=dense("t k")):
    t, k = indices("t:t k:k")
    return out[t, k](G[t, k] * sigmoid(G[t, k]) * U[t, k])


SILU_MUL = silu_mul.schedule(recipes.rows.of(row="t", elements=("k",)))


@cache
def silu_mul_kernel(target: str = "cpp") -> Kernel:
    """silu(G) · U, both (t, k)."""
    return SILU_MUL.build(target)
