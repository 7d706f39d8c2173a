"""Names of users that mean something in C: keywords, macros, what generated code calls its own."""

from __future__ import annotations

import keyword
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tilewright.build import program_of
from tilewright.codegen import params
from tilewright.toolchain import compilers, nvrtc

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")

MORE = {"rows", "NULL", "Params1", "stage0", "body0", "std", "main", "BARRIER", "NAN", "INFINITY"}
WORDS = sorted(params._RESERVED | MORE)
OWN = [w for w in WORDS if not keyword.iskeyword(w)]  # that a parameter in Python can have


def definition(kind: str) -> Any:
    """A program whose parameters, outputs or temporaries have these names."""

    def parameters(**of: Any) -> Any:
        i = tw.indices("i_:m_")
        return tw.out.named("out_")[i](reduce(add, (of[w][i] for w in OWN)))

    def outputs(X_: Any) -> Any:
        i = tw.indices("i_:m_")
        return tuple(tw.out.named(w)[i](X_[i] + n) for n, w in enumerate(WORDS))

    def temporaries(X_: Any) -> Any:
        i = tw.indices("i_:m_")
        total: Any = 0
        for n, w in enumerate(WORDS):
            total = total + tw.temp.named(w)[i](X_[i] * n)[i]
        return tw.out.named("out_")[i](total)

    if kind == "parameters":
        return program_of("words", dict.fromkeys(OWN, tw.dense("m_")), parameters)
    function = outputs if kind == "outputs" else temporaries
    return program_of("words", {"X_": tw.dense("m_")}, function)


@pytest.mark.parametrize("kind", ["parameters", "outputs", "temporaries"])
def test_arrays(kind, rng):
    X = rng.integers(-9, 9, (len(OWN) if kind == "parameters" else 1, 5)).astype(np.float32)
    numbers = np.arange(len(WORDS), dtype=np.float32)
    got = definition(kind).build("cpp")(*X)
    wanted: Any = X.sum(0)
    if kind != "parameters":
        wanted = X + numbers[:, None] if kind == "outputs" else X[0] * numbers.sum()
    np.testing.assert_array_equal(got, wanted)
    if nvrtc.available():
        definition(kind).build("cuda:sm_90a")


def test_loops_and_dimensions(rng):
    """A loop and a dimension of each name, an index of the structure and one of the features."""
    A = np.where(rng.random((4, 6)) < 0.5, rng.integers(1, 9, (4, 6)), 0).astype(np.float32)
    X = rng.integers(-9, 9, (6, 3)).astype(np.float32)
    chosen = ["rows", "NULL", *(str(w) for w in rng.choice(WORDS, 4, replace=False))]
    for word in dict.fromkeys(chosen):

        def product(A_: Any, X_: Any, word: str = word) -> Any:
            i, j, k = tw.indices(f"i_:{word} {word}:n_ k_:d_")
            return tw.out.named("out_")[i, k](tw.sum(A_[i, j] * X_[j, k], over=j))

        declared = {"A_": tw.sparse(f"{word} n_"), "X_": tw.dense("n_ d_")}
        kernel = program_of("words", declared, product).build("cpp")
        np.testing.assert_array_equal(kernel(tw.csr().pack(A), X), A @ X)
