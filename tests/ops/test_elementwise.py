"""RMSNorm, SiLU and sums, row by row, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.cases import TOKENS, close, normal, poisoned

from tilewright.errors import ArgumentError
from tilewright.ops.rowwise import (
    gated_kernel,
    heads_norm_kernel,
    rmsnorm_add_kernel,
    scaled_kernel,
)

WIDTHS = (1, 7, 16, 33, 100)


@pytest.mark.parametrize("k", [4, 16, 36, 128])
def test_heads_norm(rng, k):
    for t in TOKENS:
        x, w, y = normal(rng, t, 3, k), normal(rng, k), poisoned(t, 3, k)
        heads_norm_kernel(k, "float32", "float32", "cpp")(x, w, 1e-5, out=y)
        wide = x.astype(np.float64)
        wanted = wide / np.sqrt((wide**2).mean(2, keepdims=True) + 1e-5) * w
        close(y, wanted, np.abs(wanted))


def test_rmsnorm_of_zeros_and_of_large_numbers():
    x, w = np.zeros((2, 20), np.float32), np.ones(20, np.float32)
    x[1] = 1e18
    y = rmsnorm_add_kernel()(x, w, 1e-5, np.zeros_like(x))
    assert (y[0] == 0).all()
    np.testing.assert_allclose(y[1], 1, rtol=1e-6)


@pytest.mark.parametrize("k", WIDTHS)
def test_silu_mul(rng, k):
    for t in TOKENS:
        g, u, y = 4 * normal(rng, t, k), normal(rng, t, k), poisoned(t, k)
        gated_kernel()(g, u, out=y)
        wide = g.astype(np.float64)
        close(y, wide / (1 + np.exp(-wide)) * u, np.abs(wide * u) + 1e-6)


@pytest.mark.parametrize("k", WIDTHS)
def test_gelu_mul_and_scaled(rng, k):
    for t in TOKENS:
        g, u, y = 4 * normal(rng, t, k), normal(rng, t, k), poisoned(t, k)
        gated_kernel(gelu=True)(g, u, out=y)
        wide = g.astype(np.float64)
        bent = np.tanh((2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3))
        close(y, wide / 2 * (1 + bent) * u, np.abs(wide * u) + 1e-6)
        scaled_kernel()(g, 3.5, out=y)
        np.testing.assert_array_equal(y, g * np.float32(3.5))


@pytest.mark.parametrize("k", WIDTHS)
def test_rmsnorm_add(rng, k):
    for t in TOKENS:
        x, w, r, y = normal(rng, t, k), normal(rng, k), normal(rng, t, k), poisoned(t, k)
        rmsnorm_add_kernel()(x, w, 1e-5, r, out=y)
        wide = x.astype(np.float64)
        wanted = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * w
        close(y, r + wanted, np.abs(r) + np.abs(wanted) + 1e-6)


def test_silu_far_out():
    """Where exp overflows or vanishes: the limits, and no NaN."""
    g = np.array([[-1000.0, -104, -88.7, 0, 88.7, 1000, -0.0]], np.float32)
    y = gated_kernel()(g, np.ones_like(g))
    np.testing.assert_allclose(y, [[0, 0, 0, 0, 88.7, 1000, 0]], rtol=1e-6, atol=1e-30)


def test_wrong_arguments(rng):
    a = normal(rng, 3, 8)
    for code, call in (
        ("A103", lambda: gated_kernel()(a, a[:, :7])),
        ("A103", lambda: gated_kernel()(a, a[:2])),
        ("A108", lambda: gated_kernel()(a, a.copy(), out=a)),
        ("A103", lambda: rmsnorm_add_kernel()(a, a[0, :7], 1e-5, a)),
        ("A107", lambda: rmsnorm_add_kernel()(a, a[0], "small", a)),
        ("A102", lambda: rmsnorm_add_kernel()(a, a[0].astype(np.float16), 1e-5, a)),
        ("A103", lambda: gated_kernel()(a, a, out=poisoned(3, 9))),
    ):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert caught.value.code == code
