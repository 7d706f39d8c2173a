"""Weights of every kind, poisoned outputs and bounds that the tests of operators share."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.ops.linear import weight_views
from tilewright.serve.gguf import Weight, block_size, dequantize

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
TOKENS = (1, 2, 3, 5, 8, 17)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def weight(rng: np.random.Generator, kind: str, n: int, k: int) -> Weight:
    """A random (n, k) weight as a model file stores it."""
    if kind == "bf16":
        return Weight("w", kind, (n, k), dtypes.bfloat16_bits(normal(rng, n, k)))
    if kind in ("f32", "f16"):
        return Weight(
            "w", kind, (n, k), normal(rng, n, k).astype({"f32": "<f4", "f16": "<f2"}[kind])
        )
    blocks = rng.integers(0, 256, (n, k // 32, block_size(kind)[1]), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (n, k // 32, 1)).astype("<f2")
    blocks[..., :2] = scales.view(np.uint8)
    if kind == "q4_1":
        blocks[..., 2:4] = (-7.5 * scales).astype("<f2").view(np.uint8)
    return Weight("w", kind, (n, k), blocks.reshape(n, -1))


def values(w: Weight) -> np.ndarray:
    """What the weight holds, float64 (n, k)."""
    return dequantize(w).astype(np.float64)


def arrays(w: Weight) -> tuple[Any, ...]:
    """The weight as operators take it."""
    return weight_views(w.kind, w.data)


def poisoned(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An output in which no element is right: NaN, or the largest integer."""
    kind = np.dtype(dtype)
    return np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).max, kind)


def close(got: np.ndarray, wanted: np.ndarray, size: Any = 1.0, rounding: float = 2.0**-21) -> None:
    """|got − wanted| ≤ rounding · size, with `size` the sum of the absolute values added up.
    Numbers of float16 (a rounding of 2⁻¹⁰) below 6e-5 are 2⁻²⁴ apart, however small they are."""
    assert got.shape == wanted.shape
    assert np.isfinite(got.astype(np.float64)).all()
    error = np.abs(got.astype(np.float64) - wanted)
    bound = rounding * np.maximum(size, 1e-30) + (2.0**-24 if rounding == 2.0**-10 else 0.0)
    assert (error <= bound).all(), (
        f"largest error {error.max():.3g}, {(error / bound).max():.2f} × the bound"
    )
