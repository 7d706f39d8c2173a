"""Levels of structured matrices: bands, diagonals, bitmaps, N:M sparsity, pages; and one that a
user adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compiler.cases import (
    FORMATS,
    MATRICES,
    OTHER,
    SPARSE,
    SQUARE,
    STRUCTURED,
    after_every_pass,
    arguments,
    attention,
    called,
    close,
    filled,
    fitted,
    matrix,
    pack,
    sddmm,
    shuffled,
    softmax,
    spmm,
    widened,
)
from tests.compiler.legality import accepted

import tilewright as tw
from tilewright.errors import FormatError, ProgramError
from tilewright.ir.levels import Band, Compressed, Dense, Fixed, Level, NofM, Paged, coordinates
from tilewright.ir.rewrite import add, mul
from tilewright.ops import recipes
from tilewright.reference.evaluate import evaluate
from tilewright.toolchain import compilers, nvrtc

SEEDS = st.integers(0, 2**32 - 1)
NAMES = st.sampled_from(list(STRUCTURED))
needs_compiler = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


def stored_by(name: str, dense: np.ndarray) -> np.ndarray:
    """Which coordinates a format stores, by the definition of its level."""
    m, n = dense.shape
    offset = np.arange(n) - np.arange(m)[:, None]
    if name == "band":
        return (offset >= -1) & (offset <= 2)
    if name == "dia":
        return np.isin(offset, (-2, 0, 1))
    mask = dense != 0
    if name == "paged":  # up to the last entry of a row
        return np.cumsum(mask[:, ::-1], 1)[:, ::-1] > 0
    if name == "2:4":
        for row in mask:
            for first in range(0, n, 4):
                group = row[first : first + 4]
                for at in np.flatnonzero(~group)[: max(2 - int(group.sum()), 0)]:
                    group[at] = True
    return mask


@given(NAMES, st.sampled_from(MATRICES), st.integers(0, 9), st.integers(0, 19), SEEDS)
def test_a_format_gives_back_what_it_packs(name, kind, m, n, seed):
    rng, fmt = np.random.default_rng(seed), STRUCTURED[name]
    dense = fitted(fmt, matrix(kind, m, n, rng))
    for packed in (fmt.pack(dense), *([shuffled(fmt.pack(dense))] if name == "paged" else [])):
        np.testing.assert_array_equal(packed.dense(), dense)
        coords, _ = packed.unpack()
        wanted = np.nonzero(stored_by(name, dense))
        np.testing.assert_array_equal(coords, wanted)
        assert fmt.is_exact == (name in ("bitmap", "counted"))
        values = rng.normal(size=packed.nnz)
        again = packed.with_values(values)
        np.testing.assert_array_equal(again.dense()[np.nonzero(dense)], values)


@pytest.mark.parametrize("name", STRUCTURED)
def test_it_takes_scipy_matrices_with_duplicates_and_explicit_zeros(name):
    rows, cols = np.array([2, 0, 2, 2, 1]), np.array([1, 0, 1, 2, 2])
    data = np.array([1.5, 0, 2, -1, 4], np.float32)
    coo = scipy.sparse.coo_array((data, (rows, cols)), (4, 3))
    fmt = tw.dia(-1, 0, 1) if name == "dia" else STRUCTURED[name]
    packed = fmt.pack(coo)
    np.testing.assert_array_equal(packed.dense(), coo.toarray())
    assert packed.nnz == 4, "the zero is an entry, the duplicates are one"


def test_scipy_diagonals_are_packed_by_their_offsets(rng):
    m = scipy.sparse.dia_array((rng.normal(size=(3, 8)), [-3, 0, 2]), shape=(7, 8))
    np.testing.assert_array_equal(tw.dia(*m.offsets.tolist()).pack(m).dense(), m.toarray())


@given(st.sampled_from([*FORMATS, *STRUCTURED]), st.sampled_from(MATRICES), SEEDS)
def test_levels_have_the_properties_that_they_declare(name, kind, seed):
    """Checked on what a part stores in the order of its loops: rows first, each row by itself."""
    fmt = (FORMATS | STRUCTURED)[name]
    dense = fitted(fmt, matrix(kind, 7, 9, np.random.default_rng(seed)))
    for part in (pack(fmt, dense) if name != "ell" else tw.ell(9).pack(dense)).structure.parts:
        outer, *rest = part.format.levels
        if outer.block or len(rest) != 1 or rest[0].single:
            continue
        coords, at = coordinates(part.format.levels, part.arrays, part.counts, dense.shape)
        first, second = coords[outer.dim], coords[rest[0].dim]
        below = np.diff(first) == 0
        if rest[0].ordered:
            assert (np.diff(second)[below] >= 0).all()
        if rest[0].unique and outer.unique:
            assert (np.diff(second)[below] != 0).all()
        if rest[0].exact and not part.format.is_exact:
            assert outer.exact is False
        if not rest[0].shared:
            assert len(np.unique(at)) == len(at)
        if not rest[0].padded and rest[0].exact:
            assert len(at) == part.size


def test_positions_of_bitmaps_are_dense_or_counted_and_metadata_is_packed(rng):
    dense = matrix("random", 8, 16, rng)
    assert tw.bitmap().pack(dense).structure.parts[0].size == 8 * 16
    counted = tw.bitmap(counted=True).pack(dense).structure.parts[0]
    assert counted.size == np.count_nonzero(dense)
    assert counted.arrays[1]["bits"].nbytes == 8 * 16 // 8
    pairs = tw.n_m(2, 4).pack(fitted(tw.n_m(2, 4), dense)).structure.parts[0]
    assert pairs.size == 8 * 16 // 2 and pairs.arrays[2]["metadata"].nbytes == 8 * 16 // 2 // 4
    for n, m, bits in ((1, 2, 1), (2, 4, 2), (3, 9, 4), (7, 200, 8)):
        assert NofM(1, block=m, inner=True, width=n).bits == bits
        fmt = tw.n_m(n, m)
        wide = fitted(fmt, matrix("random", 5, 405, rng))
        np.testing.assert_array_equal(fmt.pack(wide).dense(), wide)


@pytest.mark.parametrize("most", [1, 3, 50])
def test_rows_of_blocks_are_cut_by_the_number_of_blocks(most, rng):
    dense = np.kron(rng.random((5, 9)) < 0.6, np.ones((4, 3))) * matrix("random", 20, 27, rng)
    blocks = (dense.reshape(5, 4, 9, 3) != 0).any((1, 3)).sum(1)
    bsr = Dense(0, block=4, inner=True), Dense(1, block=3, inner=True)
    for level in (Compressed(1, block=3), Fixed(1, block=3, width=most)):
        fmt = tw.Format("pieces", (Compressed(0, block=4, chunk=most), level, *bsr))
        a = fmt.pack(dense)
        rows = a.structure.parts[0].arrays[0]["indices"]
        np.testing.assert_array_equal(rows, np.arange(5).repeat(-(-blocks // most)))
        np.testing.assert_array_equal(a.dense(), dense)
    assert len(a.values[0]) == len(rows) * most * 12


# ---------------------------------------------------------------------------- programs

CELLS = accepted([*SPARSE, *SQUARE, *OTHER, attention, filled], formats=STRUCTURED)


@settings(max_examples=70)
@given(
    st.sampled_from(CELLS), st.sampled_from(MATRICES), st.integers(0, 6), st.integers(0, 9), SEEDS
)
def test_programs_keep_their_meaning_after_every_pass(cell, kind, m, n, seed):
    program, name = cell
    program = program.decompose(A=STRUCTURED[name])
    after_every_pass(program, arguments(program, np.random.default_rng(seed), kind, m=m, n=n))


@pytest.mark.parametrize("name", STRUCTURED)
def test_the_recipe_of_spmm_fits_every_format(name, rng):
    for sizes in ({"m": 6, "n": 9, "d": 5}, {"m": 1, "n": 1, "d": 1}):
        definition = spmm.decompose(A=STRUCTURED[name])
        for target, recipe in (("cpp", recipes.spmm), ("cuda", recipes.spmm)):
            args = arguments(definition, rng, "random", **sizes)
            after_every_pass(definition, args, recipe, target)


@needs_compiler
@pytest.mark.parametrize("name", STRUCTURED)
def test_kernels_of_both_targets_without_a_gpu(name, rng):
    fmt = STRUCTURED[name]
    for program in (spmm, sddmm, softmax, filled):
        definition = program.decompose(A=fmt)
        kernels = definition.build("cpp"), definition.build("interp")
        for m, n in ((5, 6), (1, 1), (0, 3), (9, 17)):
            args = arguments(definition, rng, "random", m=m, n=n)
            wanted = evaluate(definition.program, args)["out"]
            for kernel in kernels:
                close(called(kernel, definition, args)["out"], wanted, "float32", str(definition))


@needs_compiler
@pytest.mark.parametrize("name", STRUCTURED)
def test_products_are_those_of_numpy(name, rng):
    """Against NumPy, which knows no format; coordinates of both widths."""
    fmt, x = STRUCTURED[name], rng.normal(size=(23, 7)).astype(np.float32)
    dense = fitted(fmt, matrix("random", 19, 23, rng))
    for index in ("int32", "int64"):
        kernel = spmm.typed(index=index).decompose(A=fmt).schedule(recipes.spmm).build("cpp")
        packed = fmt.pack(dense, index=index)
        np.testing.assert_allclose(kernel(packed, x), dense @ x, 1e-4, 1e-5)
    wide = widened(pack(fmt, dense))
    assert wide.structure.parts[0].arrays[1].get("bits", np.zeros(1, np.uint8)).dtype == np.uint8


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("name", STRUCTURED)
def test_cuda_text_compiles(name):
    for program in (spmm.schedule(recipes.spmm), sddmm):
        kernel = program.decompose(A=STRUCTURED[name]).build("cuda:sm_90a")
        assert kernel.resources and not any(r.spill_bytes for r in kernel.resources.values())


def test_verbs_see_a_band_as_a_loop_over_coordinates(rng):
    def recipe(s):
        s = s.split("j", 4, into=("j_o", "j_v")).unroll("j_v")
        return s.split("i", 8, into=("i_unit", "i_row")).parallel("i_unit")

    definition = spmm.decompose(A=tw.band(-1, 2))
    text = str(definition.lower())
    assert "for j in max(i - 1, 0):min(i + 3, n.size)" in text and " if " not in text
    after_every_pass(definition, arguments(definition, rng, m=11, n=9), recipe)


def test_rows_may_have_pages_in_common_but_nothing_is_stored_there():
    fmt = tw.paged(4, shared=True)
    with pytest.raises(ProgramError, match=r"P107.*pages in common"):
        sddmm.decompose(A=fmt).lower()
    assert spmm.decompose(A=fmt).lower()


# ---------------------------------------------------------------------------- refusals

BAD = [
    ("high", lambda: tw.band(2, 1)),
    ("low", lambda: tw.band("x", 1)),  # type: ignore[arg-type]
    ("offset", lambda: tw.dia(1, 2.5)),  # type: ignore[arg-type]
    ("counted", lambda: tw.bitmap(counted=1)),  # type: ignore[arg-type]
    ("n", lambda: tw.n_m(5, 4)),
    ("m", lambda: tw.n_m(1, 300)),
    ("m", lambda: NofM(1, width=2)),
    ("page", lambda: tw.paged(0)),
    ("shared", lambda: tw.paged(4, shared=None)),  # type: ignore[arg-type]
    ("ndim", lambda: tw.paged(4, 1)),
    ("levels", lambda: tw.Format("t", (Band(1), Dense(0)))),
    ("levels", lambda: tw.Format("t", (Dense(0), Band(1, of=1)))),
    ("levels", lambda: tw.Format("t", (Paged(0), Dense(1)))),
]


@pytest.mark.parametrize(("where", "make"), BAD, ids=range(len(BAD)))
def test_f101_names_the_argument(where, make):
    with pytest.raises(FormatError, match="F101") as caught:
        make()
    assert caught.value.where == where, str(caught.value)


@pytest.mark.parametrize(
    ("fmt", "says"),
    [(tw.band(-1, 1), "diagonal 2"), (tw.dia(0, 3), "diagonal 2"), (tw.n_m(1, 2), "2 of 2")],
    ids=str,
)
def test_a_matrix_that_does_not_fit_is_refused(fmt, says):
    dense = np.zeros((4, 6), np.float32)
    dense[1, 3] = dense[1, 2] = dense[1, 3] = 1
    if fmt.name.startswith("dia"):
        dense[1, 2] = 0
    with pytest.raises(FormatError, match="F108") as caught:
        fmt.pack(dense)
    assert says in str(caught.value) and caught.value.hint


# ---------------------------------------------------------------------------- a level of a user


@dataclass(frozen=True, slots=True, repr=False)
class UpperTriangle(Level):
    """Row i has the columns i … n-1: one class, and no change anywhere else."""

    exact: ClassVar[bool] = False

    def loop(self, s, q):
        return s.above(0), s.size

    def pos(self, s, q, v):
        return add(mul(q, s.size), v)

    def build(self, q, c, p):
        assert (c >= p.above[0]).all()
        return {}, q * p.extent + c, p.count * p.extent


@needs_compiler
def test_a_level_from_outside_of_the_package(rng):
    fmt = tw.Format("upper", (Dense(0), UpperTriangle(1)))
    dense = np.triu(matrix("random", 6, 9, rng))
    packed = fmt.pack(dense)
    np.testing.assert_array_equal(packed.dense(), dense)
    assert len(packed.unpack()[1]) == 9 + 8 + 7 + 6 + 5 + 4
    for program in (spmm, sddmm, softmax):
        definition = program.decompose(A=fmt)
        args = arguments(definition, rng, "empty", m=6, n=9) | {"A": packed}
        wanted = evaluate(definition.program, args)["out"]
        close(called(definition.build("cpp"), definition, args)["out"], wanted, "float32")
        after_every_pass(definition, args)


@needs_compiler
def test_a_band_of_blocks(rng):
    levels = Dense(0, block=2), Band(1, block=2, high=1), Dense(0, block=2, inner=True)
    fmt = tw.Format("blocks", (*levels, Compressed(1, block=2, inner=True)))
    dense = np.where(np.isin(np.arange(7) // 2 - np.arange(7)[:, None] // 2, (0, 1)), 1.5, 0)
    x = rng.normal(size=(7, 3)).astype(np.float32)
    packed = fmt.pack(dense, dtype="float32")
    np.testing.assert_array_equal(packed.dense(), dense)
    wanted = dense.astype(np.float64) @ x
    rounding = 1e-6 * (np.abs(dense) @ np.abs(x))  # of magnitudes: sums of both signs cancel
    assert (np.abs(spmm.decompose(A=fmt).build("cpp")(packed, x) - wanted) <= rounding).all()
