"""Lesson 4: attention inside a band: each token sees the tokens up to `window` behind it.

    python examples/04_band_attention.py

A band stores no coordinates: in row i the loop over j runs from i - window to i. The program is
that of lesson 3 without weights of edges; the format says which scores there are. All positions of
a band exist, so an empty matrix is packed.
"""

import numpy as np

import tilewright as tw


@tw.program
def attend(
    A=tw.sparse("m n"), Q=tw.dense("m d"), K=tw.dense("n d"), V=tw.dense("n v"), scale=tw.scalar()
):
    i, j, k, c = tw.indices("m n d v")
    score = tw.temp.like(A)[i, j](scale * tw.sum(Q[i, k] * K[j, k], over=k))
    weight = tw.exp(score[i, j] - tw.max(score[i, j], over=j))
    return tw.out[i, c](tw.sum(weight * V[j, c], over=j) / tw.sum(weight, over=j))


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    tokens, d, window = 1500, 24, 63
    Q, K, V = (rng.standard_normal((tokens, d), np.float32) for _ in range(3))
    scale = d**-0.5

    behind = np.arange(tokens)[:, None] - np.arange(tokens)
    scores = np.where((behind >= 0) & (behind <= window), scale * (Q @ K.T), -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights @ V / weights.sum(1, keepdims=True)

    band = tw.band(-window, 0)
    A = band.pack(np.zeros((tokens, tokens), np.float32))
    O = attend.decompose(A=band).build()(A, Q, K, V, scale)
    error = np.abs(O - expected).max()
    kept = sum(part.size for part in A.structure.parts)
    print(f"{band}: {kept} scores instead of {tokens**2}, farthest from NumPy: {error:.1e}")
