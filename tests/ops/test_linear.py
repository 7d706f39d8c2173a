"""Linear layers and embeddings, for every kind of weight, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.cases import KINDS, TOKENS, arrays, close, normal, poisoned, values, weight

from tilewright.errors import ArgumentError, ModelError
from tilewright.ops.embedding import embedding_kernel
from tilewright.ops.linear import (
    can_interleave,
    gpu_recipe,
    interleave,
    linear_kernel,
    linear_program,
    weight_views,
)

SIZES = {  # rows and columns that are no multiples of tiles and lanes
    "f32": ((1, 1), (20, 37), (13, 100)),
    "f16": ((21, 41),),
    "bf16": ((21, 41),),
    "q8_0": ((3, 32), (21, 96)),
    "q4_0": ((3, 32), (21, 96)),
    "q4_1": ((3, 32), (21, 96)),
}
QUANTISED = ("q4_0", "q4_1", "q8_0")
CASES = [(kind, n, k) for kind in KINDS for n, k in SIZES[kind]]


@pytest.mark.parametrize(("kind", "n", "k"), CASES)
@pytest.mark.parametrize("many", [False, True])
def test_linear(rng, kind, n, k, many):
    w = weight(rng, kind, n, k)
    kernel = linear_kernel("cpp", kind, many, n, k)
    for t in TOKENS if many else (1, 2):
        x, y = normal(rng, t, k), poisoned(t, n)
        assert kernel(x, *arrays(w), out=y) is y
        close(y, x @ values(w).T, np.abs(x) @ np.abs(values(w)).T + 1)


@pytest.mark.parametrize(("kind", "n", "k"), CASES)
def test_the_schedule_of_a_gpu_run_on_the_cpu(rng, kind, n, k):
    """Its loops, guards and indices, one thread after the other."""
    dims = {"n": n, "k": k} | ({"b": k // 32} if kind.startswith("q") else {})

    def scheduled(s):
        for dim, size in dims.items():
            s = s.specialize(dim, size)
        return gpu_recipe(s, n, k)

    w, x, y = weight(rng, kind, n, k), normal(rng, 3, k), poisoned(3, n)
    linear_program(kind).schedule(scheduled).build("cpp")(x, *arrays(w), out=y)
    close(y, x @ values(w).T, np.abs(x) @ np.abs(values(w)).T + 1)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 96)])
@pytest.mark.parametrize("many", [False, True])
def test_interleaved_rows(rng, kind, n, k, many):
    w = weight(rng, kind, n, k)
    assert can_interleave(kind, n) and not can_interleave(kind, n + 8)
    kernel = linear_kernel("cpp", kind, many, n, k, interleaved=True)
    for t in TOKENS if many else (1, 2):
        x, y = normal(rng, t, k), poisoned(t, n)
        kernel(x, *interleave(w.kind, w.data), out=y.reshape(t, -1, 16))
        close(y, x @ values(w).T, np.abs(x) @ np.abs(values(w)).T + 1)


AFTER = ("bias", "residual", "gate", "norm", "norm_gate")
EPS = 0.25  # as large as the mean of squares is apart from 1, so that leaving it out shows


def fused(after, x, w, other, r):
    """(the layer's value in float64, the sum of the absolute values that make it)."""
    if after.startswith("norm"):
        x = x.astype(np.float64)
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * norm_weight(x.shape[1])
    y, size = x @ values(w).T, np.abs(x) @ np.abs(values(w)).T + 1
    if after == "norm":
        return y, size
    if after == "bias":
        return y + r[0], np.abs(r[0]) + size
    if after == "residual":
        return r + y, np.abs(r) + size
    up, up_size = x @ values(other).T, np.abs(x) @ np.abs(values(other)).T + 1
    return y / (1 + np.exp(-y)) * up, size * up_size


def norm_weight(k):
    return np.linspace(-1, 2, k, dtype=np.float32)


def last(after, r, weight2, k):
    """The last arguments of a kernel; the bias is the first row of `r`."""
    norm = norm_weight(k), EPS
    return {
        "bias": (r[0],), "residual": (r,), "gate": weight2, "norm": norm,
        "norm_gate": (*norm, *weight2),
    }[after]  # fmt: skip


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("many", [False, True])
def test_a_residual_and_a_gate(rng, kind, many, after):
    """The sizes of a kind take turns; in the test below each of them has each epilogue."""
    n, k = SIZES[kind][(AFTER.index(after) + many) % len(SIZES[kind])]
    w, other = weight(rng, kind, n, k), weight(rng, kind, n, k)
    kernel = linear_kernel("cpp", kind, many, n, k, after=after)
    for t in TOKENS if many else (1, 2):
        x, r, y = normal(rng, t, k), normal(rng, t, n), poisoned(t, n)
        kernel(x, *arrays(w), *last(after, r, arrays(other), k), out=y)
        close(y, *fused(after, x, w, other, r))


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize(("kind", "n", "k"), CASES)
def test_a_residual_and_a_gate_by_the_schedule_of_a_gpu(rng, kind, n, k, after):
    def scheduled(s):
        s = s.specialize("n", n)
        s = s.specialize("k", k).merge_sums("out")
        return gpu_recipe(s.specialize("b", k // 32) if s.has("b") else s, n, k)

    w, other = weight(rng, kind, n, k), weight(rng, kind, n, k)
    x, r, y = normal(rng, 3, k), normal(rng, 3, n), poisoned(3, n)
    kernel = linear_program(kind, after=after).schedule(scheduled).build("cpp")
    kernel(x, *arrays(w), *last(after, r, arrays(other), k), out=y)
    close(y, *fused(after, x, w, other, r))


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("many", [False, True])
def test_a_residual_and_a_gate_of_interleaved_rows(rng, kind, many, after):
    n, k = 48, 96
    w, other = weight(rng, kind, n, k), weight(rng, kind, n, k)
    kernel = linear_kernel("cpp", kind, many, n, k, interleaved=True, after=after)
    for t in TOKENS if many else (1, 2):
        x, r, y = normal(rng, t, k), normal(rng, t, n), poisoned(t, n)
        more = last(after, r.reshape(t, -1, 16), interleave(kind, other.data), k)
        kernel(x, *interleave(kind, w.data), *more, out=y.reshape(t, -1, 16))
        close(y, *fused(after, x, w, other, r))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("many", [False, True])
def test_blocks_mean_what_the_gguf_library_says(rng, kind, many):
    """Rows of the identity pick single weights, so that nothing rounds but the weight itself."""
    gguf = pytest.importorskip("gguf", reason="the gguf library is the reference")
    quantised = gguf.GGMLQuantizationType[kind.upper()]
    raw = gguf.quants.quantize(normal(rng, 32, 64), quantised)
    wanted = gguf.quants.dequantize(raw, quantised)
    x = np.eye(64, dtype=np.float32)
    got = linear_kernel("cpp", kind, many, 32, 64)(x, *weight_views(kind, raw))
    assert np.array_equal(got.T, wanted)
    got = linear_kernel("cpp", kind, many, 32, 64, interleaved=True)(x, *interleave(kind, raw))
    assert np.array_equal(got.reshape(64, 32).T, wanted)
    rows = embedding_kernel(kind)(np.arange(32, dtype=np.int32), *weight_views(kind, raw))
    assert np.array_equal(rows.reshape(32, 64), wanted)


def test_interleaving_moves_rows_and_nothing_else(rng):
    w = weight(rng, "q4_1", 32, 64)
    for plain, moved in zip(arrays(w), interleave(w.kind, w.data), strict=True):
        assert moved.flags.c_contiguous and moved.shape == (2, *plain.shape[1:], 16)
        for row in (0, 15, 16, 31):
            assert np.array_equal(moved[row // 16, ..., row % 16], plain[row])


def test_linear_of_no_tokens():
    w = np.ones((20, 37), np.float32)
    assert linear_kernel("cpp", "f32", True, 20, 37)(np.empty((0, 37), np.float32), w).shape == (
        0,
        20,
    )


def test_linear_reads_rows_that_lie_apart(rng):
    """Rows of X and Y with gaps between them; the gaps keep their values."""
    w, x = weight(rng, "f32", 20, 37), poisoned(5, 64)
    x[:, 3:40] = normal(rng, 5, 37)
    y = poisoned(5, 40)
    linear_kernel("cpp", "f32", True, 20, 37)(x[:, 3:40], *arrays(w), out=y[:, 10:30])
    inside = x[:, 3:40]
    close(y[:, 10:30], inside @ values(w).T, np.abs(inside) @ np.abs(values(w)).T)
    assert np.isnan(y[:, :10]).all() and np.isnan(y[:, 30:]).all()


def test_linear_refuses_what_does_not_fit(rng):
    kernel = linear_kernel("cpp", "f32", False, 20, 37)
    w, x = normal(rng, 20, 37), normal(rng, 1, 37)
    y = poisoned(1, 20)
    for code, args in (
        ("A103", (x[:, :36], w)),
        ("A103", (x, w[:19])),
        ("A103", (x[0], w)),
        ("A102", (x.astype(np.float64), w)),
        ("A104", (np.asfortranarray(normal(rng, 2, 37)), w)),
        ("A101", (x,)),
        ("A107", (x, "w")),
    ):
        with pytest.raises(ArgumentError) as caught:
            kernel(*args, out=y)
        assert caught.value.code == code, args
    assert np.isnan(y).all()
    with pytest.raises(ArgumentError, match="A108"):
        linear_kernel("cpp", "f32", False, 37, 37)(x, normal(rng, 37, 37), out=x)


def test_unknown_kinds_are_refused():
    for make in (lambda: linear_kernel("cpp", "q9", False, 8, 8), lambda: embedding_kernel("q9")):
        with pytest.raises(ModelError) as caught:
            make()
        assert caught.value.code == "M104" and "q8_0" in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_embedding(rng, kind):
    k = 96 if kind.startswith("q") else 37
    w = weight(rng, kind, 11, k)
    shape = (k // 32, 2, 16) if kind.startswith("q") else (k,)
    for t in TOKENS:
        ids, out = rng.integers(0, 11, t).astype(np.int32), poisoned(t, *shape)
        ids[-1] = 10
        embedding_kernel(kind)(ids, *arrays(w), out=out)
        wanted = values(w)[ids]
        close(out.reshape(t, k), wanted, np.abs(wanted) + 1)


def test_embedding_refuses_other_ids():
    table = np.ones((4, 8), np.float32)
    with pytest.raises(ArgumentError, match="A102"):
        embedding_kernel("f32")(np.zeros(2, np.int64), table)
    with pytest.raises(ArgumentError, match="A103"):
        embedding_kernel("f32")(np.zeros((2, 1), np.int32), table)
