"""`Kernel.report`: searches, repeated work, bytes and padding, against figures counted by hand."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import farthest, softmax, spmm, two_sparse
from tests.shipped import lesson

import tilewright as tw
from tilewright import compiler
from tilewright.errors import ArgumentError
from tilewright.ops.linear import linear_definition
from tilewright.runtime.kernel import Kernel, Launcher
from tilewright.runtime.report import Padding, Recomputed, Report, Search
from tilewright.target import target

M, N = 6, 5
MATRIX = np.zeros((M, N), np.float32)
MATRIX[0, :3] = MATRIX[2, 1:3] = MATRIX[5, 4] = 1  # rows of 3, 0, 2, 0, 0 and 1 entries
NNZ = 6
CPU, GPU = "cpp", "cuda:sm_90a"


def dense(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


def report(definition: Any, on: str, *args: Any, **named: Any) -> Report:
    """The report of a kernel that is rendered for a target but not compiled, for arrays of a
    CPU."""
    built = compiler.built(definition.scheduled(target(on)))
    return Kernel(replace(built.manifest, target=CPU), Launcher(), built.source).report(
        *args, **named
    )


def moved(r: Report) -> dict[str, tuple[Any, Any]]:
    """(unique, issued) bytes by array; a colon is behind those that are written."""
    return {f"{b.array}{':' * (b.way == 'written')}": (b.unique, b.issued) for b in r.bytes}


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        (spmm, {}),
        (softmax, {}),
        (two_sparse, {"B.indices1": (2, NNZ)}),  # i, j
        (two_sparse.schedule(lambda s: s.parallel("i")), {"B.indices1": (2, NNZ)}),
        (
            two_sparse.decompose(B=tw.dcsr()),
            {"B.indices0": (2, NNZ), "B.indices1": (2, NNZ)},
        ),
        (  # the first and the last entry of the row, then the entry
            two_sparse.decompose(B=tw.coo()),
            {"B.indices1": (2, NNZ), "B.indices0": (2, 2 * NNZ)},
        ),
        (two_sparse.decompose(B=tw.ragged()), {}),  # an address
        (spmm.schedule(lambda s: s.fuse_axes("A")), {"A.indptr1": (1, NNZ)}),
    ],
)  # fmt: skip
def test_searches_inside_loops_are_listed_with_their_depth_and_trips(definition, expected) -> None:
    given = {
        t.name: t.format.pack(MATRIX) if t.is_sparse else dense(N, 4)
        for t in definition.program.inputs
    }
    kernel = definition.build("interp")
    for k in (kernel, pickle.loads(pickle.dumps(kernel)), definition.build("interp")):
        searches = k.report(**given).searches
        assert {s.search_in: (s.depth, s.times) for s in searches} == expected


def test_without_arguments_amounts_are_formulas_in_sizes() -> None:
    (search,) = report(farthest, CPU).searches
    assert search == Search("A.indices1", 3, "n * A.row1 * B.row1")
    by_hand = {
        "A.indptr1": ("(A.count0 + 1) * 4", "m * 8"),
        "A.indices1": ("A.count1 * 4", "m * d * A.row1 * 4"),
        "A.values": ("A.count1 * 4", "m * d * A.row1 * 4"),
        "X": ("n * d * 4", "m * d * A.row1 * 4"),
        "out:": ("m * d * 4", "m * d * 4"),
    }
    assert moved(report(spmm, CPU)) == by_hand == moved(report(spmm, GPU))
    with pytest.raises(ArgumentError, match="A103"):
        report(spmm, CPU, tw.csr().pack(MATRIX), dense(N + 1, 4))


# Passes over the entries of a row: 6 of 16 features and 4 of one; on a GPU 4 of 32 threads.
@pytest.mark.parametrize(("on", "passes"), [(CPU, 10), (GPU, 4)])
def test_lesson_1(on: str, passes: int) -> None:
    m = lesson("01_spmm.py")
    r = report(m.spmm.schedule(m.fast), on, tw.csr().pack(MATRIX), dense(N, 100))
    assert moved(r) == {
        "A.indptr1": (28, 2 * M * 4),
        "A.indices1": (NNZ * 4, passes * NNZ * 4),
        "A.values": (NNZ * 4, passes * NNZ * 4),
        "X": (N * 100 * 4, NNZ * 100 * 4),
        "out:": (M * 100 * 4, M * 100 * 4),
    }
    assert (r.searches, r.recomputed, r.padding) == ((), (), ())


@pytest.mark.parametrize(("on", "passes"), [(CPU, 10), (GPU, 4)])
def test_lesson_1_counts_the_padding_of_hyb(on: str, passes: int) -> None:
    m = lesson("01_spmm.py")
    r = report(m.scheduled, on, m.hyb.pack(MATRIX), dense(N, 100))
    assert r.padding == (Padding("A", 7, NNZ),)  # 3 entries in a bucket of 4
    assert moved(r) == {
        "A.indices0": (M * 4, M * 4),
        "A.indptr1": (4, 0),  # no row is long
        "A.indices1": (7 * 4, passes * 7 * 4),
        "A.values": (7 * 4, passes * 7 * 4),
        "X": (N * 100 * 4, 7 * 100 * 4),
        "out:": (M * 100 * 4, M * 100 * 4),
    }


# Passes over the outputs of a node: a vector of 16 and 4 single ones.
@pytest.mark.parametrize(("on", "loop", "passes"), [(CPU, "o_t", 5), (GPU, "o", 20)])
def test_lesson_2(on: str, loop: str, passes: int) -> None:
    m = lesson("02_rgcn.py")
    definition = m.rgcn.schedule(m.fast) if on == CPU else m.rgcn
    A = tw.csr().pack(MATRIX)
    R = A.with_values(np.ones(NNZ, np.int32))
    r = report(definition, on, A, R, dense(N, 3), dense(2, 3, 20))
    product = "A.values[j_p] * X[j, k]"
    assert r.recomputed == (Recomputed(product, (loop,), ("out",), NNZ * 3, passes * NNZ * 3),)
    by_hand = {
        "X": (N * 3 * 4, passes * NNZ * 3 * 4),
        "R.values": (NNZ * 4, passes * NNZ * 4),
        "W": (2 * 3 * 20 * 4, NNZ * 3 * 20 * 4),
        "out:": (M * 20 * 4, M * 20 * 4),
    }
    assert moved(r).items() >= by_hand.items()


def test_lesson_3_computes_nothing_twice_and_keeps_a_row() -> None:
    m = lesson("03_graph_softmax.py")
    args = tw.csr().pack(MATRIX), dense(M, 3), dense(N, 3), dense(N, 4), 1.0
    r = report(m.attend.schedule(m.by_row), CPU, *args)
    by_row = {
        "A.values": (NNZ * 4, NNZ * 4),
        "A.indices1": (NNZ * 4, (1 + 4) * NNZ * 4),  # once for scores, then for each feature
        "Q": (M * 3 * 4, NNZ * 3 * 4),
        "K": (N * 3 * 4, NNZ * 3 * 4),
        "V": (N * 4 * 4, NNZ * 4 * 4),
        "out:": (M * 4 * 4, M * 4 * 4),
    }
    assert moved(r).items() >= by_row.items() and not r.recomputed and len(r.launches) == 1
    for on in (CPU, GPU):  # a launch for each statement; scores and weights are stored
        r = report(m.attend, on, *args)
        stored = {
            "score.values:": (NNZ * 4, NNZ * 4), "score.values": (NNZ * 4, 2 * NNZ * 4),
            "weight.values:": (NNZ * 4, NNZ * 4), "weight.values": (NNZ * 4, (1 + 4) * NNZ * 4),
        }  # fmt: skip
        assert moved(r).items() >= stored.items() and not r.recomputed and len(r.launches) == 5


@pytest.mark.parametrize("on", [CPU, GPU])
def test_lesson_4(on: str) -> None:
    band, kept = tw.band(-2, 0), 3 * M  # positions, those before column 0 too
    A = band.pack(np.zeros((M, M), np.float32))
    definition = lesson("04_band_attention.py").attend.decompose(A=band)
    r = report(definition, on, A, dense(M, 3), dense(M, 3), dense(M, 4), 1.0)
    (again,) = r.recomputed
    assert again.recomputed.startswith("exp(temp.values[") and again.loops == ("v",)
    assert again.statements == ("out.2", "out")
    assert (again.elements, again.evaluated) == (kept, kept + 4 * kept)
    assert r.padding == (Padding("A", kept, 0),)
    by_hand = {
        "Q": (M * 3 * 4, kept * 3 * 4),
        "temp.values": (kept * 4, (1 + 1 + 4) * kept * 4),  # maximum, sum, each feature
        "V": (M * 4 * 4, kept * 4 * 4),
    }
    assert moved(r).items() >= by_hand.items()


@pytest.mark.parametrize("on", [CPU, GPU])
def test_lesson_5(on: str) -> None:
    m = lesson("05_row_softmax.py")
    by_row = m.softmax.schedule(m.softmax_by_row)
    by_threads = m.softmax_on_gpu.schedule(m.softmax_by_threads)
    r = report(by_row if on == CPU else by_threads, on, tw.csr().pack(MATRIX))
    exp = Recomputed("exp(A.values[j_p2] - top[])", (), ("total", "out.values"), NNZ, 2 * NNZ)
    assert r.recomputed == (() if on == CPU else (exp,))
    row = 4 * NNZ / M  # bytes, of mean length
    kept = {"weight (row):": (row, NNZ * 4), "weight (row)": (row, 2 * NNZ * 4)}
    assert moved(r) == {
        "A.indptr1": (28, 2 * M * 4),
        "A.values": (NNZ * 4, (2 if on == CPU else 3) * NNZ * 4),
        "out.values:": (NNZ * 4, NNZ * 4),
        **(kept if on == CPU else {}),
    }


@pytest.mark.parametrize("on", [CPU, GPU])
def test_lesson_6(on: str) -> None:
    m, row = lesson("06_graph_attention.py"), 2 * 64 * 4  # bytes of all heads of a node
    definition = m.graph_attention_definition(tw.csr(), ("float32",) * 4, (2, 64, 64))
    sides = (dense(n, 2, 64) for n in (M, N, N))
    r = report(definition, on, tw.csr().pack(MATRIX), *sides, 1.0)
    by_hand = {
        "A.values": (NNZ * 4, 2 * NNZ * 4),
        "Q": (M * row, NNZ * row),
        "K": (N * row, NNZ * row),
        "V": (N * row, NNZ * row),
        "out:": (M * row, M * row),
    }
    assert moved(r).items() >= by_hand.items()
    # On a GPU heads and rows are one loop, on which the product depends.
    scaled = Recomputed("scale[] * A.values[j_p]", ("h",), ("score",), NNZ, 2 * NNZ)
    assert r.recomputed == ((scaled,) if on == CPU else ())


@pytest.mark.parametrize("on", [CPU, GPU])
def test_lesson_9_tiles_load_a_block_once_for_its_rows(on: str) -> None:
    m, rows, keys, sizes = lesson("09_flash_attention.py"), 64, 96, (4, 2, 32)
    program = m.attention(2, causal=True).typed(Q="float16", K="float16", V="float16")
    q = dense(rows, 4, 32, dtype="float16")
    args = q, *(dense(keys, 2, 32, dtype="float16") for _ in "KV"), 1.0
    plain = report(program.schedule(lambda s: m.plain(s, *sizes)), on, *args) if on == CPU else None
    tiles = report(program.schedule(lambda s: m.tiles(s, *sizes, rows=32, warps=2)), on, *args)
    each = rows * keys * 4 * 32 * 2  # every row reads every key
    whole, side = q.nbytes, keys * 2 * 32 * 2
    if plain:
        by_hand = {"Q": (whole, each), "K": (side, each), "V": (side, each), "out:": (whole, whole)}
        assert moved(plain).items() >= by_hand.items()
    blocks = 2 * 4 * keys * 32 * 2  # of 32 rows, for each head
    by_hand = {
        "Q": (whole, whole),
        "K": (side, blocks),
        "V": (side, blocks),
        "out:": (whole, whole),
    }
    assert moved(tiles).items() >= by_hand.items()


def test_unrolled_rows_share_what_is_loaded_and_computed() -> None:
    """Of 11 tokens the first 8 are computed 4 at a time: a weight is dequantised 2 + 3 times."""
    tokens, n, k = 11, 64, 64
    scales = dense(n, k // 32, dtype="float16")
    operands = {"X": dense(tokens, k), "Q": dense(n, k // 32, 32, dtype="int8"), "D": scales}
    r = report(linear_definition("q8_0", True, n, k), CPU, **operands)
    (again,) = r.recomputed
    assert again.loops == ("t_o", "t_t") and (again.elements, again.evaluated) == (n * k, 5 * n * k)
    assert moved(r)["Q"] == (n * k, 5 * n * k)
    assert moved(r)["out:"] == (tokens * n * 4, tokens * n * 4)


def test_a_report_prints_as_tables() -> None:
    ell = tw.ell(4)
    r = report(two_sparse.decompose(A=ell), CPU, ell.pack(MATRIX), tw.csr().pack(MATRIX))
    lines = [line.split() for line in str(r).splitlines()]
    assert lines[0] == ["two_sparse", "for", CPU]
    assert ["B.indices1", "2", "24"] in lines and ["A", "24", "6"] in lines
