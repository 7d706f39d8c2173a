"""Random cases against the independent oracle; `python -m tests.attention.oracle` runs more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.attention import oracle

from tilewright.toolchain import compilers


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("first", range(0, 304, oracle.CASES_OF_A_KERNEL))
def test_random_cases(first):
    for number in range(first, first + oracle.CASES_OF_A_KERNEL):
        oracle.check(oracle.draw(1, number))


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
def test_values_by_request_where_rows_of_several_share_keys():
    """A mask is bounded by the value of a request only in tiles of one request."""
    oracle.check(oracle.draw(7003, 528))


def test_the_cases_cover_what_they_should():
    cases = [oracle.draw(1, n) for n in range(120)]
    assert {c.mask for c in cases} >= set(oracle.MASKS) - {"nothing"}
    assert {c.sink for c in cases} == set(oracle.SINKS)
    assert {c.logits for c in cases} == {*oracle.LOGITS, *oracle.SIGMOID}
    assert {c.softmax for c in cases} == {True, False}
    assert {c.k.dtype.name for c in cases} == {"float32", "float16", "bfloat16"}
    assert len({c.k.shape[3] for c in cases}) > 3 and {c.k.shape[1] for c in cases} > {
        1,
        2,
        7,
        16,
        64,
    }
    assert {c.form for c in cases} == set(oracle.FORMS)
    assert {len(c.positions) for c in cases} == {0, 1, 3}
    assert len({c.q.shape[2] - c.v.shape[3] for c in cases}) > 3
    assert any(min(c.k.strides) < 0 for c in cases)
    assert any(len(c.kv_indices) > c.kv_indptr[-1] for c in cases)
    assert sum(np.isnan(c.k.astype(np.float32)).any() for c in cases) > 60
    keys = [len(slots) for c in cases for slots in oracle.slots_of(c)]
    assert min(keys) == 0 and max(keys) > 2500


def test_the_oracle_knows_wrong_results():
    """A small change of one output, of one lse, of the mask or of a hook of rows is found."""
    cases = [c for c in (oracle.draw(3, n) for n in range(100)) if c.q.size > 99]
    case = next(c for c in cases if c.mask != "nothing" and c.softmax and not c.rows)
    o, lse, _ = oracle.oracle(case)
    oracle.compare(case, o, lse)
    row = np.argwhere(np.isfinite(lse))[0]
    for array in (o, lse):
        wrong = array.copy()
        wrong[tuple(row)] += 1e-2 if case.sm_scale == 1.0 else 1e-3
        with pytest.raises(AssertionError):
            oracle.compare(case, *((wrong, lse) if array is o else (o, wrong)))
    with pytest.raises(AssertionError):
        oracle.compare(dataclasses.replace(case, mask="nothing"), o, lse)
    for softmax in (True, False):
        some = (c for c in cases if c.softmax == softmax and bool(c.rows) == softmax)
        case, o = next((c, x) for c in some if (x := oracle.oracle(c)[0]).any())
        lse = oracle.oracle(case)[1] if softmax else None
        oracle.compare(case, o, lse)
        o[np.unravel_index(np.abs(o).argmax(), o.shape)] *= 1.01
        with pytest.raises(AssertionError):
            oracle.compare(case, o, lse)
