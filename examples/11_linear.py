"""Lesson 11: linear layers with what is computed around them: a norm in front, functions behind.

    python examples/11_linear.py

`gated` is one launch for the few rows of a step of answers: SiLU(x Wᵀ) · (x Uᵀ), where x is the
RMSNorm of X. The sum of squares is taken in the loop of the products (`merge_sums`): a multiply-add
more for each weight, and no pass over X before. `projected` is for many rows, on matrix tiles:
R + max(x Wᵀ + B, 0). Bias, function and residual are computed where the sums are, in registers. The
weights of a norm, one for each column, are in W already: (X N) Wᵀ = X (W N)ᵀ.
"""

import numpy as np

import tilewright as tw


@tw.program
def gated(X=tw.dense("t k"), W=tw.dense("n k"), U=tw.dense("n k"), eps=tw.scalar()):
    t, n, k = tw.indices("t n k")
    scale = tw.rsqrt(tw.mean(X[t, k] * X[t, k], over=k) + eps)
    gate, up = (scale * tw.sum(X[t, k] * weight[n, k], over=k) for weight in (W, U))
    return tw.out.typed("float32")[t, n](gate * tw.sigmoid(gate) * up)


def few_rows(s):
    """A CPU: rows of W in parallel, k in vectors. A GPU: a warp for each row of W."""
    s = s.merge_sums("out").split("k", 32, tail="cut", into=("k_o", "k_i"))
    if not s.target.is_cuda:
        return s.reorder("n", "t").vectorize("k_i").parallel("n")
    s = s.bind("k_i", "thread.x").split("n", 8, into=("n_cta", "n_y"))
    return s.bind("t", "cta.y").bind("n_cta", "cta.x").bind("n_y", "thread.y")


# A statement on tiles has one product or several, and nothing else that reduces: the sum of squares
# is a statement of its own, `squares`, with a schedule of its own.
@tw.program
def projected(
    X=tw.dense("t k"), W=tw.dense("n k"), B=tw.dense("n"), R=tw.dense("t n"), eps=tw.scalar()
):
    t, n, k = tw.indices("t n k")
    squares = tw.temp.named("squares")[t](tw.mean(X[t, k] * X[t, k], over=k))
    x = tw.rsqrt(squares[t] + eps) * tw.sum(X[t, k] * W[n, k], over=k)
    return tw.out.typed("float32")[t, n](R[t, n] + tw.maximum(x + B[n], 0.0))


def on_tiles(s, k, rows=64, cols=64, warps=4, stages=3):
    """A CTA has `rows` of X and `cols` of W; it copies 32 of their columns at a time, `stages` - 1
    steps ahead: 16 bytes of a row at a time, so `k` is a multiple of 8."""
    s = s.specialize("k", k).on(0)
    s = s.split("k", 32, into=("k_o", "k_x")).bind("k_x", "thread.x").bind("t", "cta.x").on(1)
    s = s.split("t", rows, into=("t_cta", "t_r")).split("t_r", rows // warps, into=("t_y", "t_w"))
    s = s.split("n", cols, into=("n_cta", "n_w")).split("k", 32, into=("k_o", "k_w"))
    for loop in "tnk":
        s = s.split(f"{loop}_w", 16, into=(f"{loop}_u", f"{loop}_v")).unroll(f"{loop}_u")
    s = s.reorder("t_cta", "n_cta", "k_o", "t_y", "k_u", "t_u", "n_u", "t_v", "n_v", "k_v")
    s = s.mma("t_v", "n_v", "k_v")
    s = s.bind("t_cta", "cta.x").bind("n_cta", "cta.y").bind("t_y", "thread.y")
    return s.cache("X", "k_o", "shared").cache("W", "k_o", "shared").pipeline("k_o", stages)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    rows, n, k, eps = 70, 90, 96, 1e-5
    X, W, U = (rng.standard_normal(s).astype(np.float16) for s in ((rows, k), (n, k), (n, k)))
    B, R = (rng.standard_normal(s, np.float32) for s in (n, (rows, n)))
    x, w, u = (array.astype(np.float64) for array in (X, W, U))
    x /= np.sqrt((x**2).mean(1, keepdims=True) + eps)

    half = {"X": "float16", "W": "float16"}
    layer = gated.typed(**half, U="float16").schedule(few_rows).build()
    gate = x[:3] @ w.T
    error = np.abs(layer(X[:3], W, U, eps) - gate / (1 + np.exp(-gate)) * (x[:3] @ u.T)).max()
    print(f"gated, {len(layer.manifest.stages)} launch, farthest from NumPy: {error:.1e}")

    layer = projected.typed(**half).schedule(lambda s: on_tiles(s, k)).build()
    error = np.abs(layer(X, W, B, R, eps) - R - np.maximum(x @ w.T + B, 0)).max()
    print(f"projected, on tiles, farthest from NumPy: {error:.1e}")
