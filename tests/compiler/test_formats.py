"""Formats and levels refuse what they are not made of, and name the argument."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import tilewright as tw
from tilewright.errors import FormatError
from tilewright.ir import levels
from tilewright.sparse.formats import ByRow

# what their types would refuse already
bsr, dbsr, ell, hyb, bucket = (getattr(tw, n) for n in ("bsr", "dbsr", "ell", "hyb", "bucket"))
Composed, Format, Where = (getattr(tw, n) for n in ("Composed", "Format", "Where"))
Compressed, Dense, Fixed = (getattr(levels, n) for n in ("Compressed", "Dense", "Fixed"))
REFUSED = [
    ("buckets", lambda: hyb(buckets=4)),
    ("buckets", lambda: hyb(buckets=("a",))),
    ("buckets", lambda: hyb(buckets="12")),
    ("buckets", lambda: hyb(buckets=(1.5, 2))),
    ("buckets", lambda: hyb(buckets=(2, 2))),
    ("buckets", lambda: hyb(buckets=(0, 2))),
    ("col_parts", lambda: hyb("x")),
    ("col_parts", lambda: hyb(10**9)),
    ("long_rows", lambda: hyb(long_rows=[])),
    ("block", lambda: bsr("x")),
    ("block", lambda: bsr(1.5)),
    ("block", lambda: bsr("2")),
    ("block", lambda: bsr(True)),
    ("block", lambda: dbsr(0)),
    ("width", lambda: ell("x")),
    ("width", lambda: ell(2.5)),
    ("width", lambda: ell(-1)),
    ("width", lambda: ell(2**44)),
    ("width", lambda: ell(2**70)),
    ("width", lambda: bucket("x")),
    ("parts", lambda: Composed("t", (tw.csr(),))),
    ("parts", lambda: Composed("t", tw.csr())),
    ("parts", lambda: Composed("t", ((tw.csr(), Where()),))),
    ("parts", lambda: Composed("t", ((Where(), Format("v", (Compressed(0),))),))),
    ("levels", lambda: Format("t", (1, 2))),
    ("levels", lambda: Format("t", 5)),
    ("dim", lambda: Dense(-1)),
    ("dim", lambda: Dense("x")),
    ("block", lambda: Dense(0, block=-2)),
    ("inner", lambda: Dense(0, inner=True)),
    ("inner", lambda: Dense(0, block=2, inner=1)),
    ("chunk", lambda: Compressed(1, chunk=-5)),
    ("width", lambda: Fixed(1, width=None)),
    ("col_part", lambda: Where(col_part=3, col_parts=2)),
    ("col_parts", lambda: Where(col_parts=0)),
    ("shortest", lambda: Where("x")),
    ("longest", lambda: Where(longest=-1)),
]


@pytest.mark.parametrize(("argument", "make"), REFUSED, ids=range(len(REFUSED)))
def test_f101_names_the_argument(argument, make):
    with pytest.raises(FormatError) as caught:
        make()
    assert caught.value.code == "F101" and caught.value.where == argument, str(caught.value)
    assert argument in caught.value.message


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert ell(np.int64(3)) == ell(3) and bsr(np.uint8(4)) == bsr(4)
    assert hyb(buckets=[1, np.int32(2)]) == hyb(buckets=(1, 2))
    assert type(ell(np.int64(3)).levels[1].width) is int


def test_it_is_written_down_that_explicit_zeros_are_stored_coordinates():
    for make in (tw.ragged, tw.bsr):
        assert "explicit zeros are stored" in " ".join(str(make.__doc__).split())
    least = tw.program(_least).decompose(A=tw.ragged()).build("interp")
    assert least(tw.ragged().pack(np.array([[0, 3.0], [2, 5]], np.float32))).tolist() == [0, 2]


def _least(A=tw.sparse("m n")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.min(A[i, j], over=j))


@pytest.mark.parametrize("shape", [(0, 5), (7, 0), (1, 1), (40, 33)])
def test_a_part_takes_the_rows_of_its_lengths_inside_its_columns(rng, shape):
    """Against the definition, row by row."""
    stored = rng.random(shape) < rng.choice([0.0, 0.1, 0.6], (shape[0], 1))
    coords = np.nonzero(stored)
    entries = ByRow(coords, shape)
    for parts in (1, 3):
        width = max(-(-shape[1] // parts), 1)
        for part, (low, high) in itertools.product(range(parts), [(0, 0), (1, 2), (3, None)]):
            rows, numbers = Where(low, high, part, parts).choose(entries)
            inside = [stored[i, part * width : (part + 1) * width].sum() for i in range(shape[0])]
            wanted = [low <= n and (high is None or n <= high) for n in inside]
            assert rows.tolist() == wanted
            assert numbers.tolist() == [
                e for e, (i, j) in enumerate(zip(*coords, strict=True))
                if wanted[i] and j // width == part
            ]  # fmt: skip
