"""The suites `spmm`, `sddmm`, `spgemm` and `graphs` of `bench`.

Inputs are the synthetic graphs of `tools.graphs` or a folder of `.npz`; values are random. The call
of ours is the one a user writes, `ops.spmm(A, X)`, with `A` packed by the operator's own choice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import graphs as synthesis
from bench import peers
from bench.graphs import Graph
from bench.harness import Contender, Row, base_row, compare, note
from tilewright import dtypes
from tilewright.errors import ArgumentError
from tilewright.toolchain import disk_cache

SMALL = ("cora", "citeseer", "pubmed", "ppi", "arxiv")
MEASURED = ("cora", "pubmed", "ppi", "arxiv", "proteins", "reddit")
DTYPES = ("float32", "float64", "float16", "bfloat16")
_SAMPLED_ROWS, _SAMPLED_ENTRIES = 1024, 2_000_000


def spmm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=("cpp", "cuda"), default="cpp")
    parser.add_argument("--width", type=positive, nargs="+", default=[32, 128, 512], metavar="N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a folder of .npz with indptr, indices, shape"
    )
    parser.add_argument(
        "--graphs", nargs="+", metavar="NAME",
        help=f"synthetic graphs: {', '.join(synthesis.LAWS)}, or `synthetic` for the usual ones",
    )  # fmt: skip
    parser.add_argument(
        "--f",
        type=float,
        nargs="+",
        default=[0.0, 0.8],
        metavar="F",
        help="shares inside communities",
    )


def positive(text: str) -> int:
    """A number above zero, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def sddmm_arguments(parser: argparse.ArgumentParser) -> None:
    spmm_arguments(parser)
    parser.set_defaults(width=[32, 128])


def spgemm_arguments(parser: argparse.ArgumentParser) -> None:
    spmm_arguments(parser)
    parser.set_defaults(graphs=list(SMALL[:3]))


def graphs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--graphs", nargs="+", default=list(SMALL), metavar="NAME", help=", ".join(synthesis.LAWS)
    )
    parser.add_argument("--f", type=float, nargs="+", default=[0.0, 0.8], metavar="F")
    parser.set_defaults(data=None, target="cpp")


def inputs(args: argparse.Namespace) -> Iterator[Graph]:
    """The graphs that the command line asks for, one at a time: large ones are not kept."""
    if args.data is not None:
        yield from synthesis.load_folder(args.data)
        return
    usual = MEASURED if args.target == "cuda" else SMALL
    for name in usual if not args.graphs or args.graphs == ["synthetic"] else args.graphs:
        for f in args.f:
            began = time.perf_counter()
            graph = synthesis.synthetic(name, f)
            note(f"made {graph} in {time.perf_counter() - began:.1f} s")
            yield graph


# ---------------------------------------------------------------------------- the suites


def spmm(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of Y = A X for each graph and width."""
    for graph in inputs(args):
        for width in args.width:
            yield from _spmm_case(graph, width, args.dtype, args.target)


def sddmm(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of O[i, j] = A[i, j] Σ P[i, k] Q[j, k] for each graph and width."""
    for graph in inputs(args):
        for width in args.width:
            yield from _sddmm_case(graph, width, args.dtype, args.target)


def spgemm(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of A A, A + Aᵀ and A ∘ Aᵀ for each graph, on the CPU, beside SciPy."""
    if args.dtype not in ("float32", "float64") or args.target != "cpp":
        raise ArgumentError(
            "A102", f"sparse results in {args.dtype} on {args.target}", where="bench spgemm",
            hint="float32 or float64, which SciPy has, and cpp",
        )  # fmt: skip
    for graph in inputs(args):
        if graph.shape[0] != graph.shape[1]:
            note(f"{graph.name}: left out, it is not square")
            continue
        yield from _sparse_results(graph, args.dtype)


def graphs(args: argparse.Namespace) -> Iterator[Row]:
    """How each synthetic graph fits its law, and what a window of rows could reuse."""
    for graph in inputs(args):
        law = synthesis.LAWS[graph.name.rpartition("-f")[0]]
        base = base_row("graphs", "graph", "cpp") | {
            "input": graph.name,
            "width": 0,
            "dtype": "",
            "ms": None,
            "ratio": None,
        }
        lengths = graph.lengths
        for impl, metric, value in (
            ("entries", f"of {law.nnz}", graph.nnz),
            ("longest row", f"of {law.max_degree}", int(lengths.max())),
            ("empty rows", f"% of {100 * law.empty:g}", 100 * float((lengths == 0).mean())),
            (
                "hyb padding",
                f"% of {law.padding:g}",
                synthesis.hyb_padding(graph, law.widest, law.col_parts),
            ),
            ("entries per column, 8 rows", "", synthesis.window_columns(graph, 8)),
            ("entries per column, 16 rows", "", synthesis.window_columns(graph, 16)),
        ):
            yield base | {"impl": impl, "metric": metric, "value": value}


@dataclass(frozen=True, slots=True)
class Operands:
    """Random operands in one dtype: as float64 for the oracle, and as arrays of the target."""

    exact: tuple[np.ndarray, ...]
    arrays: tuple[Any, ...]


def operands(shapes: list[tuple[int, int]], dtype: str, target: str) -> Operands:
    """N(0, 1) values, rounded to the dtype first, so that oracle and contenders see the same."""
    rng = np.random.default_rng(7)
    exact, arrays = [], []
    for shape in shapes:
        wide = rng.standard_normal(shape, np.float32 if dtype != "float64" else np.float64)
        rounded = rounded_to(wide, dtype)
        exact.append(rounded.astype(np.float64))
        arrays.append(peers.to_target(rounded, dtype, target))
    return Operands(tuple(exact), tuple(arrays))


def rounded_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values that the dtype holds exactly (bfloat16 ones as float32)."""
    if dtype == "bfloat16":
        return dtypes.bfloat16_values(dtypes.bfloat16_bits(values))
    return values.astype(dtype)


def _spmm_case(graph: Graph, width: int, dtype: str, target: str) -> list[Row]:
    values = rounded_to(graph.values, dtype)
    data = operands([(graph.shape[1], width)], dtype, target)
    oracle = SpmmOracle(graph, values.astype(np.float64), data.exact[0], dtype)
    base = base_row(f"spmm-{dtype}", "spmm", target) | _describe(graph, width, dtype)
    contenders = [
        *ours_spmm(graph, values, data.arrays[0], dtype, target),
        *peers.spmm_peers(graph, values, data.arrays[0], dtype, target),
    ]
    return compare(base, contenders, oracle.wrong, 2.0 * graph.nnz * width)


def _sddmm_case(graph: Graph, width: int, dtype: str, target: str) -> list[Row]:
    values = rounded_to(graph.values, dtype)
    data = operands([(graph.shape[0], width), (graph.shape[1], width)], dtype, target)
    oracle = SddmmOracle(graph, values.astype(np.float64), data.exact, dtype)
    base = base_row(f"sddmm-{dtype}", "sddmm", target) | _describe(graph, width, dtype)
    contenders = [
        *ours_sddmm(graph, values, data.arrays, dtype, target),
        *peers.sddmm_peers(graph, values, data.arrays, dtype, target),
    ]
    return compare(base, contenders, oracle.wrong, 2.0 * graph.nnz * width)


def _sparse_results(graph: Graph, dtype: str) -> Iterator[Row]:
    import scipy.sparse

    from tilewright import ops
    from tilewright.sparse import formats

    values = rounded_to(graph.values, dtype)
    a = scipy.sparse.csr_matrix((values, graph.indices, graph.indptr), shape=graph.shape)
    t = a.T.tocsr()
    A, T = formats.csr().pack(a), formats.csr().pack(t)
    products = int(np.diff(a.indptr)[a.indices].sum())
    for op, ours, theirs, other, work in (
        (ops.spgemm, lambda: ops.spgemm(A, A), lambda: a @ a, a, 2 * products),
        (ops.add, lambda: ops.add(A, T), lambda: a + t, t, 2 * graph.nnz),
        (ops.multiply, lambda: ops.multiply(A, T), lambda: a.multiply(t), t, 2 * graph.nnz),
    ):
        base = base_row(f"spgemm-{dtype}", op.__name__, "cpp") | _describe(graph, 0, dtype)
        base["input"] += f" {op.__name__}"
        check = SparseOracle(op.__name__, a, other, dtype).wrong
        packed = _built(
            Contender("tilewright", ours, _scipy_of, is_ours=True, is_default=True), 0, "cpp"
        )
        yield from compare(base, [Contender("scipy", theirs, _itself), packed], check, work)


def _scipy_of(c: Any) -> Any:
    import scipy.sparse

    coords, values = c.unpack()
    return scipy.sparse.csr_matrix((values, coords), shape=c.shape)


def _itself(c: Any) -> Any:
    return c


def _describe(graph: Graph, width: int, dtype: str) -> Row:
    return {
        "input": graph.name,
        "width": width,
        "dtype": dtype,
        "nnz": graph.nnz,
        "shape": list(graph.shape),
    }


# ---------------------------------------------------------------------------- ours


_kept: dict[str, tuple[Graph, tuple[str, str], tuple[Any, float]]] = {}
"""The last graph that was packed for an operator, with the time of packing."""


def ours_spmm(graph: Graph, values: np.ndarray, x: Any, dtype: str, target: str) -> list[Contender]:
    """`ops.spmm(A, X)`, and the same into preallocated memory."""
    from tilewright import ops

    matrix = (graph.indptr, graph.indices, values, graph.shape)
    kept = _kept.get("spmm")
    if kept is None or kept[0] is not graph or kept[1] != (dtype, target):
        packing = _timed(lambda: ops.pack_for_spmm(matrix, target, dtype=dtype), target)
        _kept["spmm"] = kept = (graph, (dtype, target), packing)  # one format serves every width
    packed, pack_ms = kept[2]
    plain = Contender(
        "tilewright", lambda: ops.spmm(packed, x), peers.to_host, is_ours=True, is_default=True
    )
    plain = _built(plain, pack_ms, target)
    out = ops.spmm(packed, x)
    preallocated = Contender(
        "tilewright, out=", lambda: ops.spmm(packed, x, out=out), peers.to_host, is_ours=True
    )
    return [preallocated, plain]


def ours_sddmm(
    graph: Graph, values: np.ndarray, pq: tuple[Any, ...], dtype: str, target: str
) -> list[Contender]:
    """`ops.sddmm(A, P, Q)`."""
    from tilewright import ops

    matrix = (graph.indptr, graph.indices, values, graph.shape)
    packed, pack_ms = _timed(lambda: ops.pack_for_sddmm(matrix, target, dtype=dtype), target)
    plain = Contender(
        "tilewright", lambda: ops.sddmm(packed, *pq), _entries, is_ours=True, is_default=True
    )
    return [_built(plain, pack_ms, target)]


def _entries(result: Any) -> np.ndarray:
    values = result.entry_values()
    return dtypes.bfloat16_values(values) if result.dtype.name == "bfloat16" else values


def _timed(make: Callable[[], Any], target: str) -> tuple[Any, float]:
    _wait(target)
    began = time.perf_counter()
    result = make()
    _wait(target)
    return result, 1e3 * (time.perf_counter() - began)


def _built(contender: Contender, pack_ms: float, target: str) -> Contender:
    """Adds its costs: the time of packing, and that of the first call beyond the second."""
    compiled = disk_cache.stats.compiled
    _, first = _timed(contender.run, target)
    _, second = _timed(contender.run, target)
    costs = {"pack": pack_ms, "first_call": first}
    if disk_cache.stats.compiled > compiled:  # no build cost for a kernel from the cache
        costs["build"] = max(first - second, 0.0)
    return replace(contender, costs=costs)


def _wait(target: str) -> None:
    if target == "cuda":
        import torch

        torch.cuda.synchronize()


# ---------------------------------------------------------------------------- the oracle


_FLOOR = {"float16": 2.0**-24}  # spacing of its smallest numbers
_UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class SpmmOracle:
    """float64 A X: each row of small inputs; of large ones sampled rows, the longest among them,
    and of every row its product with one random vector."""

    def __init__(self, graph: Graph, values: np.ndarray, x: np.ndarray, dtype: str) -> None:
        self.graph, self.values, self.x = graph, values, x
        self.rounding, self.floor = _UNIT[dtype], _FLOOR.get(dtype, 1e-30)
        self.unit = min(self.rounding, _UNIT["float32"])  # sums are kept in float32 at least
        rng = np.random.default_rng(11)
        m = graph.shape[0]
        some = (
            np.arange(m) if m <= 4 * _SAMPLED_ROWS else rng.choice(m, _SAMPLED_ROWS, replace=False)
        )
        longest = np.argsort(graph.lengths)[-8:]
        self.rows = np.unique(np.concatenate([some, longest]))
        self.vector = rng.standard_normal(x.shape[1])
        self.expected, self.size = self._rows()

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Sampled rows of A X, and of |A| |X|, which bounds the rounding of any order of sums."""
        shape = (len(self.rows), self.x.shape[1])
        expected, size = np.zeros(shape), np.zeros(shape)
        for at, row in enumerate(self.rows):
            begin, end = self.graph.indptr[row : row + 2]
            part, v = self.x[self.graph.indices[begin:end]], self.values[begin:end]
            expected[at], size[at] = v @ part, np.abs(v) @ np.abs(part)
        return expected, size

    def wrong(self, y: np.ndarray) -> str:
        """The fault of a result (m, d); empty if it is right."""
        if y.shape != (self.graph.shape[0], self.x.shape[1]):
            return f"wrong shape {y.shape}"
        grow = 8 + 4 * np.sqrt(self.graph.lengths)
        got = y[self.rows].astype(np.float64)
        bound = (
            grow[self.rows, None] * self.unit * self.size
            + 2 * self.rounding * np.abs(self.expected)
            + self.floor
        )
        if fault := _beyond(got, self.expected, bound):
            return fault
        wide = y.astype(np.float64)
        weight = np.abs(self.vector)
        size = self._sums(np.abs(self.values), np.abs(self.x) @ weight)
        bound = (
            grow * self.unit * size
            + 2 * self.rounding * (np.abs(wide) @ weight)
            + self.floor * weight.sum()
        )
        return _beyond(wide @ self.vector, self._sums(self.values, self.x @ self.vector), bound)

    def _sums(self, values: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Row sums of values · x[column]."""
        out = np.zeros(self.graph.shape[0])
        full = np.flatnonzero(self.graph.lengths)
        if len(full):
            products = values * x[self.graph.indices]
            out[full] = np.add.reduceat(products, self.graph.indptr[full])
        return out


class SddmmOracle:
    """float64 A ∘ (P Qᵀ) at the stored entries; of large inputs at sampled ones."""

    def __init__(
        self, graph: Graph, values: np.ndarray, pq: tuple[np.ndarray, ...], dtype: str
    ) -> None:
        nnz = graph.nnz
        self.nnz, self.rounding, self.floor = nnz, _UNIT[dtype], _FLOOR.get(dtype, 1e-30)
        self.unit = min(self.rounding, _UNIT["float32"])
        rng = np.random.default_rng(13)
        many = nnz <= _SAMPLED_ENTRIES
        self.at = np.arange(nnz) if many else np.unique(rng.integers(0, nnz, _SAMPLED_ENTRIES))
        rows = np.searchsorted(graph.indptr, self.at, side="right") - 1
        cols = graph.indices[self.at]
        self.expected, self.size = np.empty(len(rows)), np.empty(len(rows))
        for begin in range(0, len(rows), 1 << 17):  # a slice at a time: the products are wide
            part = slice(begin, begin + (1 << 17))
            product = pq[0][rows[part]] * pq[1][cols[part]]
            v = values[self.at[part]]
            self.expected[part], self.size[part] = (
                v * product.sum(1),
                np.abs(v) * np.abs(product).sum(1),
            )
        self.grow = 8 + 4 * np.sqrt(pq[0].shape[1])

    def wrong(self, values: np.ndarray) -> str:
        """The fault of the values (nnz) of a result; empty if they are right."""
        if values.shape != (self.nnz,):
            return f"wrong shape {values.shape}"
        if not np.isfinite(values.astype(np.float32)).all():
            return "not finite"
        bound = (
            self.grow * (self.unit + self.rounding / 4) * self.size
            + 4 * self.rounding * np.abs(self.expected)
            + self.floor
        )
        return _beyond(values[self.at].astype(np.float64), self.expected, bound)


class SparseOracle:
    """float64 A B, A + B or A ∘ B by SciPy, and bounds of the rounding."""

    def __init__(self, op: str, a: Any, b: Any, dtype: str) -> None:
        self.op, self.unit = op, _UNIT[dtype]
        self.expected = self.of(a.astype(np.float64), b.astype(np.float64))
        self.size = self.of(abs(a).astype(np.float64), abs(b).astype(np.float64))
        self.grow = 8 + 4 * np.sqrt(np.diff(a.indptr).max(initial=0))

    def of(self, a: Any, b: Any) -> Any:
        return (
            a @ b if self.op == "spgemm" else a + b if self.op == "add" else a.multiply(b)
        ).tocsr()

    def wrong(self, c: Any) -> str:
        """The fault of a result; empty if it is right."""
        if c.shape != self.expected.shape:
            return f"wrong shape {c.shape}"
        error = abs(c.astype(np.float64) - self.expected) - self.grow * self.unit * self.size
        return f"WRONG by {error.max():g}" if error.nnz and error.max() > 0 else ""


def _beyond(got: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> str:
    """The entry farthest beyond its bound, in words; empty if there is none."""
    if not got.size:
        return ""
    excess = np.abs(got - expected) / bound
    excess = np.where(np.isnan(excess), np.inf, excess)
    at = np.unravel_index(int(excess.argmax()), excess.shape)
    if excess[at] <= 1:
        return ""
    where = ", ".join(map(str, at))
    return f"WRONG at ({where}): {got[at]:g} for {expected[at]:g}"
