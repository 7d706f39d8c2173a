"""Lesson 12: several sparse operands: unions and intersections of what they store.

    python examples/12_unions.py

A sum of two matrices ranges over the coordinates that either stores, a product over those that both
store. The order of the operands decides nothing. A union merges two ascending lists (csr, dcsr) in
one loop; of an intersection one operand is walked, and the others are merged with it, searched or
located, as their formats allow. `where=` names the coordinates in every other case: counts and
means of what a matrix stores, whatever its values are.
"""

import numpy as np

import tilewright as tw


@tw.program
def either(A=tw.sparse("m n"), B=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    return tw.out[i, k](tw.sum((A[i, j] + B[i, j]) * X[j, k], over=j))


@tw.program
def two_sums(A=tw.sparse("m n"), B=tw.sparse("m n"), X=tw.dense("n d")):
    """The same as two sums, each over what one matrix stores: for formats that are no lists."""
    i, j, k = tw.indices("m n d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j) + tw.sum(B[i, j] * X[j, k], over=j))


@tw.program
def both(A=tw.sparse("m n"), B=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    return tw.out[i, k](tw.sum(A[i, j] * B[i, j] * X[j, k], over=j))


@tw.program
def only_first(A=tw.sparse("m n"), B=tw.sparse("m n")):
    """Of each row of A: its entries where B has none, their mean, the column of its largest."""
    i, j = tw.indices("m n")
    alone = tw.stored(A[i, j]) & ~tw.stored(B[i, j])
    return (
        tw.out.named("count").typed("int32")[i](tw.sum(1, over=j, where=alone)),
        tw.out.named("average")[i](tw.mean(A[i, j], over=j, where=alone)),
        tw.out.named("largest")[i](tw.argmax(A[i, j], over=j)),
    )


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    m, n, d = 400, 300, 20
    masks = rng.random((2, m, n)) < 0.05
    a, b = masks * rng.standard_normal((2, m, n), np.float32)
    X = rng.standard_normal((n, d), np.float32)
    csr, dcsr, rows = tw.csr(), tw.dcsr(), tw.hyb(buckets=(4, 8, 16))
    cases = [
        (either, a + b, [(csr, csr), (csr, dcsr)]),
        (two_sums, a + b, [(rows, csr), (tw.bsr(4), tw.bitmap())]),
        (both, a * b, [(csr, csr), (rows, csr), (tw.coo(), tw.bitmap()), (csr, tw.bsr(4))]),
    ]
    for program, matrix, formats in cases:
        for A, B in formats:
            kernel = program.decompose(A=A, B=B).build()
            error = np.abs(kernel(A.pack(a), B.pack(b), X) - matrix @ X).max()
            print(f"{program.name}, {A} and {B}: farthest from NumPy: {error:.1e}")

    count, average, largest = only_first.build()(csr.pack(a), csr.pack(b))
    alone = masks[0] & ~masks[1]
    assert (count == alone.sum(1)).all()
    assert (largest == np.where(masks[0], a, -np.inf).argmax(1)).all()
    error = np.abs(average - (a * alone).sum(1) / alone.sum(1)).max()
    print(f"{count.sum()} entries of A alone, their means farthest from NumPy: {error:.1e}")
