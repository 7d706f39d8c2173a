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

from tilewright.errors import ProgramError

SIZES = st.integers(0, 6)
SEEDS = st.integers(0, 2**32 - 1)


def legal(definition) -> bool:
    """Whether the compiler takes the program with its formats; else it says P107."""
    try:
        definition.lower()
    except ProgramError as e:
        assert e.code == "P107" and e.hint
        return False
    return True


@settings(max_examples=150)
@given(
    st.sampled_from(SPARSE),
    st.sampled_from(list(FORMATS)),
    st.sampled_from(MATRICES),
    SIZES,
    SIZES,
    st.integers(1, 3),
    SEEDS,
)
def test_sparse_programs(program, fmt, kind, m, n, d, seed):
    program = program.decompose(A=FORMATS[fmt])
    if legal(program):
        args = arguments(program, np.random.default_rng(seed), kind, m=m, n=n, d=d)
        assert "materialize_reductions" in after_every_pass(program, args)


@settings(max_examples=60)
@given(
    st.sampled_from((*SQUARE, *SEARCHED)),
    st.sampled_from(list(FORMATS)),
    st.sampled_from(list(FORMATS)),
    st.sampled_from(MATRICES),
    st.integers(0, 5),
    SEEDS,
)
def test_two_structures_and_square_graphs(program, f, g, kind, n, seed):
    names = {t.name for t in program.program.inputs}
    program = program.decompose(**{k: FORMATS[v] for k, v in (("A", f), ("B", g)) if k in names})
    if legal(program):
        args = arguments(program, np.random.default_rng(seed), kind, m=n, n=n)
        after_every_pass(program, args)


@settings(max_examples=120)
@given(
    st.sampled_from(OTHER),
    st.sampled_from(list(FORMATS)),
    st.sampled_from(MATRICES),
    st.integers(0, 6),
    SEEDS,
)
def test_one_structure_read_in_several_ways(program, fmt, kind, n, seed):
    program = program.decompose(A=FORMATS[fmt])
    if legal(program):
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


@pytest.mark.parametrize("fmt", list(FORMATS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_narrow_and_wide_values(fmt, dtype, rng):
    for program in SPARSE[:2]:
        program = program.decompose(A=FORMATS[fmt]).typed(A=dtype, X=dtype)
        if legal(program):
            after_every_pass(program, arguments(program, rng, "random"))
