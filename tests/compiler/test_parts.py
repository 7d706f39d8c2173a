"""Composed formats: promises that their parts keep, masks and entries that agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import matrix, pack, softmax

import tilewright as tw
from tilewright.errors import FormatError
from tilewright.ir.levels import Compressed, Dense, coordinates


@tw.program
def largest(A=tw.sparse("m n")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.max(A[i, j], over=j))


@tw.program
def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))


ROWS = {
    "dcsr": tw.dcsr(),
    "csr": tw.csr(),
    "bucket": tw.bucket(9),
    "pieces": tw.bucket(1, split=True),
    "dbsr": tw.dbsr(2),
    "bsr": tw.bsr(2),
}
COLUMNS_FIRST = {
    "csc": tw.csc(),
    "dcsc": tw.Format("dcsc", (Compressed(1), Compressed(0))),
    "blocks by column": tw.Format(
        "bsc",
        (
            Dense(1, block=2), Compressed(0, block=2),
            Dense(0, block=2, inner=True), Dense(1, block=2, inner=True),
        ),
    ),
}  # fmt: skip


def covering(part: tw.Format, disjoint: bool = True) -> tw.Composed:
    parts = ((tw.Where(0, 2), part), (tw.Where(3), tw.dcsr()))
    return tw.Composed("covering", parts, disjoint_rows=disjoint, covers_rows=True)


@pytest.mark.parametrize("target", ["cpp", "interp"])
@pytest.mark.parametrize("kind", ["sparse", "random", "empty", "one column", "one row"])
@pytest.mark.parametrize("part", ROWS)
def test_rows_without_entries_are_stored_where_rows_are_covered(part, kind, target, rng):
    """No kernel has to set the output first: each row is written, the empty ones too."""
    fmt = covering(ROWS[part])
    dense = matrix(kind, 9, 8, rng)
    packed = pack(fmt, dense)
    np.testing.assert_array_equal(fmt.pack(dense).dense(), dense)
    x = rng.uniform(-1, 1, (8, 3)).astype(np.float32)
    y = spmm.decompose(A=fmt).build(target)(packed, x, out=np.full((9, 3), np.nan, np.float32))
    np.testing.assert_allclose(y, dense @ x, rtol=1e-5, atol=1e-5)
    if fmt.unique_rows:
        m = largest.decompose(A=fmt).build(target)(packed, out=np.full(9, np.nan, np.float32))
        (i, _), values = fmt.pack(dense).unpack()  # blocks store zeros, which a maximum sees
        wanted = np.full(9, -np.inf, np.float32)
        np.maximum.at(wanted, i, values)
        np.testing.assert_array_equal(m, wanted)


@pytest.mark.parametrize("part", [*COLUMNS_FIRST, "coo"])
def test_parts_that_cannot_store_an_empty_row(part):
    fmt = {**COLUMNS_FIRST, "coo": tw.coo()}[part]
    with pytest.raises(FormatError) as caught:
        covering(fmt)
    assert caught.value.code == "F101" and "parts[0]" in caught.value.message
    assert caught.value.where == "covers_rows"


@pytest.mark.parametrize("target", ["cpp", "interp"])
@pytest.mark.parametrize("part", COLUMNS_FIRST)
def test_columns_first_does_not_cover_rows(part, target, rng):
    """A dense level of columns stores every column, not every row."""
    fmt = COLUMNS_FIRST[part]
    assert not fmt.covers_rows
    dense = matrix("sparse", 9, 8, rng)
    mixed = tw.Composed("mixed", ((tw.Where(0, 2), fmt), (tw.Where(3), tw.dcsr())))
    x = rng.uniform(-1, 1, (8, 3)).astype(np.float32)
    for one in (fmt, mixed):
        y = spmm.decompose(A=one).build(target)(
            pack(one, dense), x, out=np.full((9, 3), np.nan, np.float32)
        )
        np.testing.assert_allclose(y, dense @ x, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- choose


@dataclass(frozen=True)
class Says:
    """A part that chooses what it is told to."""

    rows: Any
    numbers: Any

    def choose(self, entries: Any) -> Any:
        return self.rows, self.numbers


DENSE = np.array([[1, 2], [0, 3], [0, 0]], np.float32)  # entries 0, 1 in row 0; 2 in row 1
T, F = True, False
FIRST, SECOND = np.array([T, F, F]), np.array([F, T, T])


def told(*parts: tuple[Any, Any], **promises: bool) -> tw.Composed:
    return tw.Composed("told", tuple((Says(*p), tw.dcsr()) for p in parts), **promises)


@pytest.mark.parametrize("promises", [{}, {"disjoint_rows": True, "covers_rows": True}])
def test_a_choice_that_agrees(promises):
    fmt = told((FIRST, np.array([1, 0])), (SECOND, np.array([2])), **promises)
    np.testing.assert_array_equal(fmt.pack(DENSE).dense(), DENSE)
    assert told((FIRST, [0, 1]), (SECOND, [2])).pack(DENSE).nnz == 3
    empty = told((np.zeros(3, bool), []), (np.ones(3, bool), [0, 1, 2])).pack(DENSE)
    np.testing.assert_array_equal(empty.dense(), DENSE)


BAD = {
    "a row that the mask leaves out": (FIRST, [0, 1, 2]),
    "only rows that the mask leaves out": (np.array([F, F, T]), [0, 1]),
    "a mask of numbers": (np.array([1, 0, 0]), [0, 1]),
    "a mask of another length": (np.array([T, F]), [0, 1]),
    "row numbers": (np.array([0]), [0, 1]),
    "a mask of two dimensions": (np.array([[T, F, F]]), [0, 1]),
    "entries beyond the last": (FIRST, [0, 3]),
    "entries before the first": (FIRST, [0, -3]),
    "a mask of entries": (FIRST, np.array([T, T, F])),
    "fractions": (FIRST, [0.0, 1.0]),
    "two dimensions": (FIRST, [[0, 1]]),
    "no array": (FIRST, None),
}


@pytest.mark.parametrize("promises", [{}, {"disjoint_rows": True}])
@pytest.mark.parametrize("bad", BAD)
def test_a_choice_that_disagrees(bad, promises):
    with pytest.raises(FormatError) as caught:
        told(BAD[bad], (SECOND, [2]), **promises).pack(DENSE)
    assert caught.value.code == "F106"
    assert "parts[0] of told" in caught.value.message and "3 rows" in caught.value.hint


@pytest.mark.parametrize("given", [None, 5, (), (FIRST,), (FIRST, [0], [1])])
def test_a_choice_that_is_no_pair(given):
    class Odd:
        def choose(self, entries: Any) -> Any:
            return given

    with pytest.raises(FormatError) as caught:
        tw.Composed("odd", ((Odd(), tw.dcsr()),)).pack(DENSE)
    assert caught.value.code == "F106"


# ---------------------------------------------------------------------------- blocks

BY_ROWS = ((tw.Where(3), tw.csr()), (tw.Where(1, 2), tw.dbsr(2)), (tw.Where(0, 0), tw.bsr(3)))
BY_COLUMNS = tuple((tw.Where(0, None, c, 3), f) for c, f in enumerate([tw.dbsr(2), tw.csc(),
                                                                       tw.bsr(3)]))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (7, 11), (40, 33)])
@pytest.mark.parametrize("parts", [BY_ROWS, BY_COLUMNS], ids=["rows", "columns"])
def test_no_coordinate_is_stored_by_two_parts(parts, shape, rng):
    fmt = tw.Composed("blocks", parts, disjoint_rows=parts is BY_ROWS)
    dense = np.where(rng.random(shape) < rng.choice([0, 0.1, 0.6], (shape[0], 1)), 2, 0)
    packed = fmt.pack(dense.astype(np.float32))
    np.testing.assert_array_equal(packed.dense(), dense)
    stored = np.zeros(shape, int)
    for part in packed.structure.parts:
        (i, j), _ = coordinates(part.format.levels, part.arrays, part.counts, shape)
        np.add.at(stored, (i, j), 1)
    assert stored.max(initial=0) <= 1 and (stored[dense != 0] == 1).all()
    assert not fmt.repeats


@pytest.mark.parametrize("disjoint", [False, True])
def test_a_choice_that_cuts_a_block_is_refused(disjoint):
    """Entries 0 and 1 are in row 0, 2 in row 1: one block of 2×2."""
    parts = ((Says(FIRST, [0, 1]), tw.dcsr()), (Says(SECOND, [2]), tw.bsr(2)))
    fmt = tw.Composed("cut", parts, disjoint_rows=disjoint)
    with pytest.raises(FormatError, match=r"row 0 is in 2 parts|in parts 0 and 1") as caught:
        fmt.pack(DENSE)
    assert caught.value.code == "F106" and caught.value.hint


@pytest.mark.parametrize("fmt", [tw.hyb(2, (1, 4)), tw.Composed("blocks", BY_COLUMNS)], ids=str)
def test_a_softmax_over_rows_in_pieces(fmt, rng):
    """Maximum and sum of a row are arrays, each in a launch of its own."""
    dense = matrix("random", 300, 211, rng)
    dense[7] = 0
    if isinstance(fmt, tw.Composed) and fmt.blocks != (1, 1):
        dense[dense == 0] = 1  # blocks store zeros, which have a weight
    program = softmax.decompose(A=fmt)
    assert [nest.name for stage in program.lower().stages for nest in stage[:1]] == [
        "out.0.init", "out.0", "out.1.init", "out.1", "out"
    ]  # fmt: skip
    e = np.where(dense != 0, np.exp(dense.astype(np.float64)), 0)
    wanted = np.divide(e, e.sum(1, keepdims=True), where=e != 0, out=np.zeros_like(e))
    got = program.build("cpp")(fmt.pack(dense)).dense()
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)


@tw.program
def argmax(A=tw.sparse("m n")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.argmax(A[i, j], over=j))


@tw.program
def mean(A=tw.sparse("m n")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.mean(A[i, j], over=j))


@tw.program
def above_mean(A=tw.sparse("m n")):
    i, j = tw.indices("m n")
    row = tw.sum(A[i, j], over=j)
    return tw.out[i, j](tw.where(tw.stored(A[i, j]), A[i, j] - row / tw.size("n"), row))


@pytest.mark.parametrize("fmt", [tw.csr(), tw.coo(), tw.csc(), tw.hyb(buckets=(1, 2)),
                                 tw.hyb(2, (1, 2), long_rows="split")], ids=str)  # fmt: skip
@pytest.mark.parametrize("target", ["interp", "cpp"])
def test_reductions_that_read_reductions(fmt, target, rng):
    """Argmax, mean, and a dense output that takes entries and the rest of a row differently."""
    dense = matrix("random", 13, 9, rng)
    dense[3] = 0
    rows, total, entries = dense != 0, dense.sum(1), fmt.pack(dense)
    number = rows.sum(1)
    got = argmax.decompose(A=fmt).build(target)(entries)
    assert got[3] == np.iinfo(np.int32).max
    wanted = np.where(rows, dense, -np.inf).argmax(1)
    np.testing.assert_array_equal(got[number > 0], wanted[number > 0])
    got = mean.decompose(A=fmt).build(target)(entries)
    assert np.isnan(got[number == 0]).all()
    # A sum of values of both signs is exact up to its magnitudes, not up to itself.
    wanted = dense.sum(1, dtype=np.float64) / np.maximum(number, 1)
    rounding = 1e-6 * np.abs(dense).sum(1) / np.maximum(number, 1)
    assert (np.abs(got - wanted) <= rounding)[number > 0].all()
    got = above_mean.decompose(A=fmt).build(target)(entries)
    wanted = np.where(rows, dense - total[:, None] / 9, total[:, None])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@tw.program
def weighted_lists(
    B=tw.sparse("m n"),
    C=tw.sparse("m k"),
    start=tw.dense("s", dtype="int32"),
    columns=tw.dense("z", dtype="int32"),
    values=tw.dense("z"),
):
    i, j, k = tw.indices("m n k")
    is_stored = tw.stored(B[i, j])
    weight = tw.sum(C[i, k], over=k)
    filled = tw.update(columns).append[start[i]](j, over=j, where=is_stored)
    return filled, tw.update(values).append[start[i]](B[i, j] * weight, over=j, where=is_stored)


@pytest.mark.parametrize("fmt", [tw.csr(), tw.coo(), tw.hyb(2, (1, 2))], ids=str)
def test_lists_that_read_a_sum_over_rows_in_pieces(fmt, rng):
    """Both lists are filled in one loop, also where an array of the sums comes first."""
    b, c = matrix("random", 9, 7, rng), matrix("random", 9, 5, rng)
    start = np.append(0, np.cumsum((b != 0).sum(1))).astype(np.int32)
    columns, values = np.full(start[-1], -1, np.int32), np.full(start[-1], np.nan, np.float32)
    kernel = weighted_lists.decompose(C=fmt).build("interp")
    kernel(tw.csr().pack(b), fmt.pack(c), start, columns, values)
    rows, wanted = np.nonzero(b)
    np.testing.assert_array_equal(columns, wanted)
    weights = c.astype(np.float64).sum(1)
    np.testing.assert_allclose(values, b[rows, wanted] * weights[rows], rtol=1e-5, atol=1e-6)
