"""Lesson 5: the softmax of the stored entries of each row, scheduled for a CPU and for a GPU.

    python examples/05_row_softmax.py

`top.j` is the loop j around the statement that computes top: each statement of a row has loops of
its own, and a schedule names them by the statement.
"""

import numpy as np

import tilewright as tw


@tw.program
def softmax(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    top = tw.temp.named("top")[i](tw.max(A[i, j], over=j))
    weight = tw.temp.like(A).named("weight")[i, j](tw.exp(A[i, j] - top[i]))
    total = tw.temp.named("total")[i](tw.sum(weight[i, j], over=j))
    return tw.out.like(A)[i, j](weight[i, j] / total[i])


def softmax_by_row(s):
    """The entries of a row in vectors."""
    for temporary in ("top", "weight", "total"):
        s = s.compute_at(temporary, "i")
    for n in ("top", "weight", "total", "out"):
        s = s.split(f"{n}.j", 16, tail="cut", into=(f"{n}_o", f"{n}_v")).vectorize(f"{n}_v")
    return s.split("i", 16, into=("i_unit", "i_row")).parallel("i_unit")


@tw.program
def softmax_on_gpu(A=tw.sparse("m n")):
    """Exponentials twice: a GPU computes one faster than it keeps it."""
    i, j = tw.indices("i:m j:n")
    top = tw.temp.named("top")[i](tw.max(A[i, j], over=j))
    weight = tw.exp(A[i, j] - top[i])
    total = tw.temp.named("total")[i](tw.sum(weight, over=j))
    return tw.out.like(A)[i, j](weight / total[i])


def softmax_by_threads(s):
    """Eight threads for each row; all of a CTA in a part of the format that is called tall."""
    temporaries = [t.name for t in s.program.tensors if t.role == "temp"]
    for t in temporaries:
        s = s.compute_at(t, "i")
    for nest in range(len(s.nests)):
        is_tall, s = s.format_of(nest).name == "tall", s.on(nest)
        for n in (*temporaries, "out"):
            s = s.split(f"{n}.j", 256 if is_tall else 8, into=(f"{n}_o", f"{n}_x"))
            if is_tall:
                s = s.split(f"{n}_x", 32, into=(f"{n}_y", f"{n}_z")).bind(f"{n}_y", "thread.y")
            s = s.bind(f"{n}_z" if is_tall else f"{n}_x", "thread.x")
        if not is_tall:
            s = s.split("i", 32, into=("i_cta", "i_y")).bind("i_y", "thread.y")
        s = s.bind("i" if is_tall else "i_cta", "cta.x")
    return s.everywhere()


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    mask = rng.random((1000, 800)) < 0.05
    matrix = np.where(mask, rng.standard_normal(mask.shape), 0).astype(np.float32)
    weights = np.where(mask, np.exp(matrix.astype(np.float64)), 0)
    expected = weights / weights.sum(1, keepdims=True)

    A = tw.csr().pack(matrix)
    error = np.abs(softmax.schedule(softmax_by_row).build()(A).dense() - expected).max()
    print(f"farthest from NumPy: {error:.1e}")
    print(softmax_on_gpu.schedule(softmax_by_threads).scheduled("cuda:sm_90a"))
