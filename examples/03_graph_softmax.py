"""Lesson 3: attention along the edges of a graph, as one program of two statements.

    python examples/03_graph_softmax.py

Scores exist at the stored coordinates only. A reduction over `j` ranges over the neighbours of `i`,
so the softmax is one of each row; a missing edge is not a zero, it is not there.
"""

import numpy as np

import tilewright as tw


@tw.program
def attend(
    A=tw.sparse("m n"), Q=tw.dense("m d"), K=tw.dense("n d"), V=tw.dense("n v"), scale=tw.scalar()
):
    i, j, k, c = tw.indices("m n d v")
    score = tw.temp.like(A)[i, j](scale * A[i, j] * tw.sum(Q[i, k] * K[j, k], over=k))
    weight = tw.exp(score[i, j] - tw.max(score[i, j], over=j))
    return tw.out[i, c](tw.sum(weight * V[j, c], over=j) / tw.sum(weight, over=j))


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

    # The same program on three formats: the mathematics does not change with the storage.
    for fmt in (tw.csr(), tw.hyb(buckets=(8, 16, 32)), tw.ell(64)):
        A = fmt.pack(adjacency)
        O = attend.decompose(A=fmt).build()(A, Q, K, V, scale)
        share = A.nnz / sum(part.size for part in A.structure.parts)
        error = np.abs(O - expected).max()
        print(f"{fmt!s:20} {100 * share:5.1f} % of slots used, farthest from NumPy: {error:.1e}")
