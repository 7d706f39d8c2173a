"""`Kernel.report`: binary searches inside loops, with the number of loops around them."""

from __future__ import annotations

import pickle
import re

import pytest
from tests.compiler.cases import farthest, softmax, spmm, two_sparse

import tilewright as tw

SEARCH = re.compile(r"binary search in (\S+) for each iteration of (\d+) nested loops")


def searches(kernel: object) -> dict[str, int]:
    return {array: int(depth) for array, depth in SEARCH.findall(kernel.report())}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        (spmm, {}),
        (softmax, {}),
        (two_sparse, {"B.indices1": 2}),  # i, j
        (two_sparse.schedule(lambda s: s.parallel("i")), {"B.indices1": 1}),  # in a unit: j
        (two_sparse.decompose(B=tw.dcsr()), {"B.indices0": 2, "B.indices1": 2}),
        (two_sparse.decompose(B=tw.coo()), {"B.indices0": 2, "B.indices1": 2}),
        (two_sparse.decompose(B=tw.ragged()), {}),  # an address
        (farthest, {"A.indices1": 3}),  # i, j, k
        (spmm.schedule(lambda s: s.fuse_axes("A")), {"A.indptr1": 1}),
    ],
)  # fmt: skip
def test_searches_inside_loops_are_listed_with_their_depth(definition, expected) -> None:
    kernel = definition.build("interp")
    assert searches(kernel) == expected
    assert searches(pickle.loads(pickle.dumps(kernel))) == expected
    assert searches(definition.build("interp")) == expected  # from the cache
