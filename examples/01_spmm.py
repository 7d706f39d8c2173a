"""Lesson 1: a sparse operator, from the mathematics to a kernel. Run it, then see every step of it:

python examples/01_spmm.py
tilewright show examples/01_spmm.py scheduled --stages
"""

import numpy as np

import tilewright as tw


# 1. Say what is computed, on coordinates. Nothing here knows how the matrix is stored.
@tw.program
def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))  # over the stored coordinates of A


# 2. Choose a format. hyb gives rows of similar length one width: no branch, no wasted lane.
hyb = tw.hyb(buckets=(1, 2, 4, 8))


# 3. Say how the loops run: rows in parallel, features side by side. Each verb is a checked rewrite.
#    Loops are called as their dimensions are; `tw.indices("row:m col:n")` would name them.
def fast(s):
    if s.target.is_cuda:  # a warp a row, eight rows a CTA
        s = s.split("d", 32, into=("d_o", "d_x")).reorder("m", "d_x", "d_o").bind("d_x", "thread.x")
        return s.split("m", 8, into=("cta", "y")).bind("cta", "cta.x").bind("y", "thread.y")
    s = s.split("d", 16, tail="cut", into=("d_o", "d_v")).reorder("n", "d_v").vectorize("d_v")
    return s.split("m", 8, into=("unit", "row")).parallel("unit")


scheduled = spmm.decompose(A=hyb).schedule(fast)

if __name__ == "__main__":
    rng = np.random.default_rng(0)

    def random_matrix(rows, cols):
        """Most rows short, a few long: where hyb pays."""
        density = rng.pareto(1.5, (rows, 1)) / cols
        return np.where(rng.random((rows, cols)) < density, rng.standard_normal((rows, cols)), 0)

    # 4. Build once; pack a matrix; call it on whatever arrays you have.
    kernel = scheduled.build()
    dense = random_matrix(3000, 2000).astype(np.float32)
    A = hyb.pack(dense)
    X = rng.standard_normal((2000, 100), np.float32)
    Y = kernel(A, X)

    print("the program:", spmm, "the matrix:", A, "the kernel:", kernel.report(A, X), sep="\n")
    print(f"farthest from NumPy: {np.abs(Y - dense @ X).max():.1e}")

    # 5. Another matrix of the same format needs no other kernel; new values need no new packing.
    B = hyb.pack(random_matrix(500, 2000).astype(np.float32))
    twice = A.with_values(2 * A.entry_values())
    doubled = np.allclose(kernel(twice, X), 2 * Y)
    print(f"another matrix: {kernel(B, X).shape}; values doubled: {doubled}")
