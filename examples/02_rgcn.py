"""Lesson 2: a layer of a relational graph network. Each edge has a type, each type a weight matrix.

    python examples/02_rgcn.py

The layer is Y[i] = Σ over neighbours j of A[i, j] · X[j] W[type of edge (i, j)]. The product of
every node with every type's matrix, which libraries store, never exists.
"""

import numpy as np

import tilewright as tw


@tw.program
def rgcn(
    A=tw.sparse("m n"),
    R=tw.sparse("m n", "int32", like="A"),
    X=tw.dense("n d"),
    W=tw.dense("r d o"),
):
    i, j, k, o = tw.indices("i:m j:n k:d o:o")
    message = A[i, j] * X[j, k] * W[R[i, j], k, o]  # R[i, j] is read, then used as an index
    return tw.out[i, o](tw.sum(message, over=(j, k)))


def fast(s):
    """The outputs of a node side by side in registers, nodes in parallel."""
    s = s.split("o", 16, tail="cut", into=("o_t", "o_v")).reorder("j", "k", "o_v").vectorize("o_v")
    return s.split("i", 4, into=("unit", "node")).parallel("unit")


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    nodes, relations, d, o = 2000, 12, 32, 16
    adjacency = (rng.random((nodes, nodes)) < 0.004) * rng.random((nodes, nodes), np.float32)
    A = tw.csr().pack(adjacency.astype(np.float32))
    R = A.with_values(rng.integers(0, relations, A.nnz).astype(np.int32))  # shares A's structure
    X = rng.standard_normal((nodes, d), np.float32)
    W = rng.standard_normal((relations, d, o), np.float32)
    Y = rgcn.schedule(fast).build()(A, R, X, W)

    (rows, cols), values = A.unpack()
    expected = np.zeros((nodes, o))
    np.add.at(expected, rows, values[:, None] * np.einsum("ek,eko->eo", X[cols], W[R.unpack()[1]]))
    print(rgcn, A, sep="\n")
    print(f"farthest from NumPy: {np.abs(Y - expected).max():.1e}")
    print(f"not stored: X W for all types, {nodes * relations * o * 4 / 2**20:.1f} MiB")
