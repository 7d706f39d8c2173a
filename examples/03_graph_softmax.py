"""Lesson 3: attention along the edges of a graph: a product, a softmax and a product in one launch.

    python examples/03_graph_softmax.py

Scores exist at the stored coordinates only. A reduction over `j` ranges over the neighbours of `i`,
so the softmax is one of each row; a missing edge is not a zero, it is not there. `compute_at` says
where a temporary is computed: in the loop of its reader, so that everything is one launch, nothing
is computed twice, and of the scores only one row exists at a time.
"""

import numpy as np

import tilewright as tw


@tw.program
def attend(
    A=tw.sparse("m n"), Q=tw.dense("m d"), K=tw.dense("n d"), V=tw.dense("n v"), scale=tw.scalar()
):
    i, j, k, c = tw.indices("i:m j:n k:d c:v")
    dot = tw.sum(Q[i, k] * K[j, k], over=k)
    score = tw.temp.like(A).named("score")[i, j](scale * A[i, j] * dot)
    top = tw.temp.named("top")[i](tw.max(score[i, j], over=j))
    weight = tw.temp.like(A).named("weight")[i, j](tw.exp(score[i, j] - top[i]))
    total = tw.temp.named("total")[i](tw.sum(weight[i, j], over=j))
    return tw.out[i, c](tw.sum(weight[i, j] * V[j, c], over=j) / total[i])


def by_row(s):
    """One row after the other: its scores, their maximum, the weights, their sum, the features."""
    for temporary in ("score", "top", "weight", "total"):
        s = s.compute_at(temporary, "i")
    return s.parallel("i")


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    nodes, d = 1500, 24
    mask = (rng.random((nodes, nodes)) < 0.01) | np.eye(nodes, dtype=bool)  # everyone sees itself
    adjacency = (mask * (0.5 + rng.random((nodes, nodes)))).astype(np.float32)
    Q, K, V = (rng.standard_normal((nodes, d), np.float32) for _ in range(3))
    scale = d**-0.5

    scores = np.where(mask, scale * adjacency * (Q @ K.T), -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights @ V / weights.sum(1, keepdims=True)

    # The same program and schedule on three formats: neither changes with the storage.
    for fmt in (tw.csr(), tw.hyb(buckets=(8, 16, 32)), tw.ell(64)):
        A = fmt.pack(adjacency)
        kernel = attend.decompose(A=fmt).schedule(by_row).build()
        error = np.abs(kernel(A, Q, K, V, scale) - expected).max()
        launches = len(kernel.manifest.stages)
        print(f"{fmt!s:20} launches: {launches}, farthest from NumPy: {error:.1e}")
