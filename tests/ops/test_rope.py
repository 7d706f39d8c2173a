"""Rotary positions in both layouts, and appends into the pages of a KV cache, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.cases import TOKENS, close, normal, poisoned

from tilewright.errors import ArgumentError
from tilewright.ops.rope import Rope, append_kernel, rope_append_kernel, rope_kernel

HEADS = ((1, 2), (3, 10), (9, 64), (2, 6))  # heads, head_dim: pairs that fill no vector
POSITIONS = 300
BASE = 1e4


def heads_of(x: np.ndarray, interleaved: bool) -> np.ndarray:
    """(t, h, d) seen as pairs."""
    t, h, d = x.shape
    return x.reshape((t, h, d // 2, 2) if interleaved else (t, h, 2, d // 2))


def turned(x: np.ndarray, positions: np.ndarray, interleaved: bool) -> np.ndarray:
    """The pairs (…, 2) as complex numbers, times e^(i · angle)."""
    axis = 3 if interleaved else 2
    pairs = np.moveaxis(heads_of(x, interleaved).astype(np.float64), axis, 0)
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * BASE ** (-np.arange(half) / half)
    z = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angle)
    return np.stack([z.real, z.imag], axis)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("h", "d"), HEADS)
def test_rope(rng, interleaved, h, d):
    tables = Rope(BASE).tables(POSITIONS, d)
    for t in TOKENS:
        x, at = normal(rng, t, h, d), rng.integers(0, POSITIONS, t).astype(np.int32)
        at[0] = POSITIONS - 1
        x = heads_of(x, interleaved)
        y = poisoned(*x.shape)
        rope_kernel(interleaved)(x, *tables, at, out=y)
        close(y, turned(x.reshape(t, h, d), at, interleaved), 4.0)


def test_position_zero_changes_nothing(rng):
    x = normal(rng, 3, 2, 4, 2)
    tables = Rope(BASE).tables(8, 8)
    np.testing.assert_array_equal(rope_kernel(True)(x, *tables, np.zeros(3, np.int32)), x)


def test_tables():
    cos, sin = Rope(1e5).tables(5000, 64)
    angle = 4999 * 1e5 ** (-2 * 31 / 64)
    assert cos.shape == sin.shape == (5000, 32) and cos.dtype == np.float32
    np.testing.assert_allclose(
        [cos[4999, 31], sin[4999, 31]], [np.cos(angle), np.sin(angle)], rtol=1e-6
    )
    np.testing.assert_allclose(
        [cos[4999, 0], sin[4999, 0]], [np.cos(4999), np.sin(4999)], rtol=1e-6
    )


def places(
    rng: np.random.Generator, t: int, pages: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Different slots for t tokens, anywhere."""
    chosen = rng.permutation(pages * size)[:t]
    return (chosen // size).astype(np.int32), (chosen % size).astype(np.int32)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("h", "d"), HEADS)
def test_keys_are_turned_into_their_slots(rng, interleaved, h, d):
    tables = Rope(BASE).tables(POSITIONS, d)
    for t in TOKENS:
        x, at = normal(rng, t, h, d), rng.integers(0, POSITIONS, t).astype(np.int32)
        page, slot = places(rng, t, 7, 5)
        keys = heads_of(poisoned(35, h, d), interleaved).reshape(
            7, 5, *heads_of(x, interleaved).shape[1:]
        )
        assert (
            rope_append_kernel(interleaved)(keys, heads_of(x, interleaved), *tables, at, page, slot)
            is keys
        )
        close(keys[page, slot], turned(x, at, interleaved), 4.0)
        assert np.isnan(keys).sum() == (35 - t) * h * d  # no other slot was written


@pytest.mark.parametrize(("h", "d"), HEADS)
def test_values_go_to_their_slots(rng, h, d):
    for t in TOKENS:
        x, pages = normal(rng, t, h, d), poisoned(7, 5, h, d)
        page, slot = places(rng, t, 7, 5)
        append_kernel()(pages, x, page, slot)
        np.testing.assert_array_equal(pages[page, slot], x)
        assert np.isnan(pages).sum() == (35 - t) * h * d


@pytest.mark.parametrize("interleaved", [True, False])
def test_bfloat16_pages_and_queries_round_once(rng, interleaved):
    torch = pytest.importorskip("torch")
    x, at = normal(rng, 9, 3, 16), rng.integers(0, POSITIONS, 9).astype(np.int32)
    page, slot = places(rng, 9, 7, 5)
    tables, wide = Rope(BASE).tables(POSITIONS, 16), heads_of(x, interleaved)
    arrays = [torch.from_numpy(a) for a in (wide, *tables, at, page, slot)]
    exact = turned(x, at, interleaved)
    # Half a step of bfloat16 (8 bits), and what float32 leaves of x · cos - y · sin, which the
    # compiler may contract to either of two fused products; a product that was rounded to
    # bfloat16 on the way would miss by 2⁻⁹ of a product.
    step = 2.0 ** (np.frexp(exact)[1] - 8)
    products = np.abs(wide).max(3 if interleaved else 2, keepdims=True)
    bound = step / 2 + 2.0**-21 * (products + np.abs(exact))

    def once(got: Any) -> None:
        assert got.dtype == torch.bfloat16
        assert (np.abs(got.double().numpy() - exact) <= bound).all()

    once(rope_kernel(interleaved, "cpp", "bfloat16")(*arrays[:4]))
    keys = torch.full((7, 5, *wide.shape[1:]), torch.nan, dtype=torch.bfloat16)
    rope_append_kernel(interleaved, "cpp", "bfloat16")(keys, *arrays)
    values = torch.full((7, 5, 3, 16), torch.nan, dtype=torch.bfloat16)
    append_kernel("cpp", "bfloat16")(values, torch.from_numpy(x), *arrays[4:])
    once(keys[page, slot])
    assert torch.equal(values[page, slot], torch.from_numpy(x).bfloat16())
    assert int(keys.isnan().sum()) == int(values.isnan().sum()) == (35 - 9) * 3 * 16


def test_wrong_arguments(rng):
    x, pages = normal(rng, 2, 3, 4), poisoned(7, 5, 3, 4)
    page = slot = np.zeros(2, np.int32)
    frozen = pages.copy()
    frozen.flags.writeable = False
    for code, call in (
        ("A103", lambda: append_kernel()(pages, x[:, :2], page, slot)),
        ("A103", lambda: append_kernel()(pages, x, page[:1], slot)),
        ("A102", lambda: append_kernel()(pages, x, page.astype(np.int64), slot)),
        ("A104", lambda: append_kernel()(frozen, x, page, slot)),
        ("A103", lambda: rope_kernel(True)(x.reshape(2, 3, 2, 2), *Rope(BASE).tables(9, 8), page)),
    ):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert caught.value.code == code
    assert np.isnan(pages).all()
