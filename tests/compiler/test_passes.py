"""Each pass keeps the meaning: programs run after every pass, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compiler.cases import (
    DENSE,
    FORMATS,
    MATRICES,
    OTHER,
    SEARCHED,
    SPARSE,
    SQUARE,
    after_every_pass,
    arguments,
    attention,
    filled,
)
from tests.compiler.legality import accepted, accepted_pairs

SIZES = st.integers(0, 6)
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=150)
@given(
    st.sampled_from(accepted(SPARSE)),
    st.sampled_from(MATRICES),
    SIZES,
    SIZES,
    st.integers(1, 3),
    SEEDS,
)
def test_sparse_programs(cell, kind, m, n, d, seed):
    program, fmt = cell
    program = program.decompose(A=FORMATS[fmt])
    args = arguments(program, np.random.default_rng(seed), kind, m=m, n=n, d=d)
    assert "materialize_reductions" in after_every_pass(program, args)


@settings(max_examples=60)
@given(
    st.sampled_from([*accepted(SQUARE), *accepted_pairs(SEARCHED, list(FORMATS), list(FORMATS))]),
    st.sampled_from(MATRICES),
    st.integers(0, 5),
    SEEDS,
)
def test_two_structures_and_square_graphs(cell, kind, n, seed):
    program, *formats = cell
    of = {name: FORMATS[f] for name, f in zip("AB", formats, strict=False)}
    program = program.decompose(**of)
    after_every_pass(program, arguments(program, np.random.default_rng(seed), kind, m=n, n=n))


@settings(max_examples=120)
@given(st.sampled_from(accepted(OTHER)), st.sampled_from(MATRICES), st.integers(0, 6), SEEDS)
def test_one_structure_read_in_several_ways(cell, kind, n, seed):
    program, fmt = cell
    program = program.decompose(A=FORMATS[fmt])
    after_every_pass(program, arguments(program, np.random.default_rng(seed), kind, n=n))


@settings(max_examples=20)
@given(st.sampled_from(DENSE), st.integers(0, 4), st.integers(0, 5), st.integers(0, 5), SEEDS)
def test_dense_programs(program, m, n, k, seed):
    args = arguments(program, np.random.default_rng(seed), m=m, n=n, k=k, d=k)
    after_every_pass(program, args)


@pytest.mark.parametrize("fmt", ["csr", "bsr", "dcsr", "ell", "hyb"])
def test_attention_through_sparse_temporaries(fmt, rng):
    program = attention.decompose(A=FORMATS[fmt])
    after_every_pass(program, arguments(program, rng, "random"))


@pytest.mark.parametrize("fmt", ["csr", "csc", "bsr3", "dcsr", "ell", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_missing_coordinates_read_the_fill(fmt, dtype, rng):
    program = filled.decompose(A=FORMATS[fmt]).typed(A=dtype, X=dtype)
    after_every_pass(program, arguments(program, rng, "sparse"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_narrow_and_wide_values(dtype, rng):
    cells = accepted(SPARSE[:2], dtype)
    assert len(cells) >= 8
    for program, fmt in cells:
        program = program.decompose(A=FORMATS[fmt]).typed(A=dtype, X=dtype)
        after_every_pass(program, arguments(program, rng, "random"))
