"""Synthetic graphs with the sizes and degree laws of data sets that graph kernels are measured on.

Degrees are lognormal, fitted to each set's edge count, maximum, empty rows and hyb padding; columns
follow the same popularity law, a share `f` of them inside the row's own eighth; symmetric graphs
are matchings of half-edges. Every count is exact. Values are N(0, 1), never all ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from tilewright.errors import ArgumentError, FormatError, InternalError

COMMUNITIES = 8
ON_GPU_FROM = 4_000_000  # entries from which a GPU, where there is one, makes the graph

_WITHIN_ROUNDS = 60  # rounds that keep a redrawn entry in its community, then in its own law
_ROUNDS = 400


@dataclass(frozen=True, slots=True)
class Law:
    """A data set: rows, entries, the σ of its degrees, and the shape of its hyb format.

    `padding` is the share of padded slots of hyb(`col_parts`, 1…`widest`) in per cent, as published
    for SparseTIR (ASPLOS 2023, table 2); `blocks` diagonal blocks hold all entries.
    """

    rows: int
    nnz: int
    sigma: float
    max_degree: int
    padding: float
    widest: int
    col_parts: int = 1
    empty: float = 0.0
    blocks: int = 1
    symmetric: bool = True


LAWS: dict[str, Law] = {
    "cora": Law(2_708, 10_556, 0.7, 168, 15.9, 4),
    "citeseer": Law(3_327, 9_228, 1.0, 99, 13.0, 4, empty=0.014),
    "pubmed": Law(19_717, 88_651, 1.0, 171, 23.1, 32),
    "ppi": Law(44_906, 1_271_274, 1.9, 722, 22.9, 32, col_parts=16, blocks=20, symmetric=False),
    "arxiv": Law(169_343, 1_166_243, 1.9, 13_155, 17.5, 32, empty=0.37, symmetric=False),
    "proteins": Law(132_534, 39_561_252, 1.2, 7_750, 21.6, 256, col_parts=8),
    "reddit": Law(232_965, 114_615_892, 1.4, 21_657, 28.6, 512, col_parts=8),
}


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A CSR matrix: `indptr` (rows+1), `indices` (nnz) sorted in each row, `values` (nnz)."""

    name: str
    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> np.ndarray:
        """Entries of each row."""
        return np.diff(self.indptr)

    @property
    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
        """The argument of `Format.pack`."""
        return self.indptr, self.indices, self.values, self.shape

    def __str__(self) -> str:
        return f"{self.name}: {self.shape[0]} × {self.shape[1]}, {self.nnz} entries"


def synthetic(name: str, f: float = 0.0, seed: int = 0, device: str = "auto") -> Graph:
    """The graph called `name` of `LAWS`; `f` of its entries lie in the row's own eighth.

    `device` is cpu, cuda, or auto: a GPU for large graphs where torch finds one. The same seed
    gives the same graph on the same kind of device. Raises ArgumentError[A109].
    """
    if name not in LAWS or not 0 <= f <= 1:
        raise ArgumentError(
            "A109", f"no graph {name!r} with f={f}", hint=f"f in 0…1, names: {', '.join(LAWS)}"
        )
    law = LAWS[name]
    if device == "auto":
        device = "cuda" if law.nnz >= ON_GPU_FROM and _has_gpu() else "cpu"
    xp: Any = _Numpy(seed) if device == "cpu" else _Torch(seed, device)
    degrees = np.random.default_rng(seed).permutation(fit_degrees(law))
    keys = _matched(xp, law, degrees, f) if law.symmetric else _drawn(xp, law, degrees, f)
    indptr = np.zeros(law.rows + 1, np.int32)
    np.cumsum(degrees, out=indptr[1:])
    indices = xp.host(xp.int32(xp.sort(keys) % law.rows))
    values = xp.host(xp.normal(law.nnz))
    return Graph(f"{name}-f{f:g}", indptr, indices, values, (law.rows, law.rows))


def load(path: Path) -> Graph:
    """A graph from `.npz` with `indptr`, `indices`, `shape` and, if there, `values`; else N(0, 1).

    Raises FormatError[F102, F103, F104].
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in ("indptr", "indices", "shape", "values") if k in file}
    except (OSError, ValueError) as error:
        raise FormatError("F102", f"the file is not an .npz: {error}", where=str(path)) from None
    missing = [k for k in ("indptr", "indices", "shape") if k not in arrays]
    if missing:
        raise FormatError("F102", f"the file lacks {', '.join(missing)}", where=str(path))
    indptr, indices, shape = arrays["indptr"], arrays["indices"], arrays["shape"]
    if shape.shape != (2,) or any(
        a.ndim != 1 or a.dtype.kind not in "iu" for a in (indptr, indices)
    ):
        raise FormatError("F102", "these are not the arrays of a CSR matrix", where=str(path))
    rows, cols = int(shape[0]), int(shape[1])
    ends = len(indptr) == rows + 1 and indptr[0] == 0 and indptr[-1] == len(indices)
    if not ends or np.any(np.diff(indptr.astype(np.int64)) < 0):
        raise FormatError("F103", f"indptr does not fit {rows} rows", where=str(path))
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < cols:
        raise FormatError("F104", f"a column is outside 0…{cols - 1}", where=str(path))
    values = arrays.get("values")
    if values is None:
        values = np.random.default_rng(0).standard_normal(len(indices), np.float32)
    if values.shape != indices.shape:
        raise FormatError(
            "F102", f"{values.shape} values for {len(indices)} entries", where=str(path)
        )
    parts = (indptr.astype(np.int32), indices.astype(np.int32), values.astype(np.float32))
    return Graph(path.stem, *parts, (rows, cols))


def load_folder(folder: Path) -> Iterator[Graph]:
    """The graphs of a folder's `.npz` files, by name. Raises FormatError as `load` does."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise FormatError("F102", "no .npz in this folder", where=str(folder))
    for path in paths:
        yield load(path)


# ---------------------------------------------------------------------------- reports


def hyb_padding(graph: Graph, widest: int, col_parts: int = 1) -> float:
    """Per cent of the slots of hyb(`col_parts`, 1, 2, 4 … `widest`) that hold no entry; rows longer
    than the widest bucket are cut into pieces of it."""
    slots = 0
    width = -(-graph.shape[1] // col_parts)
    rows = np.repeat(np.arange(graph.shape[0], dtype=np.int32), graph.lengths)
    for part in range(col_parts):
        inside = graph.indices // width == part if col_parts > 1 else slice(None)
        lengths = np.bincount(rows[inside], minlength=graph.shape[0])
        last = lengths % widest  # entries of the piece that does not fill the widest bucket
        padded = np.where(lengths > widest, widest, _ceil_power(last))
        slots += int(lengths.sum() - last.sum() + padded[last > 0].sum())
    return 100 * (1 - graph.nnz / slots) if slots else 0.0


def window_columns(graph: Graph, rows: int) -> float:
    """Entries per distinct column in windows of `rows` rows: the reuse of such a tile."""
    row = np.repeat(np.arange(graph.shape[0], dtype=np.int64), graph.lengths)
    keys = row // rows * graph.shape[1] + graph.indices
    return graph.nnz / max(len(np.unique(keys)), 1)


def _ceil_power(lengths: np.ndarray) -> np.ndarray:
    return 1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)


# ---------------------------------------------------------------------------- degrees


@functools.lru_cache(maxsize=8)
def fit_degrees(law: Law) -> np.ndarray:
    """Degrees of a law, ascending: lognormal quantiles, rounded and clipped, of the exact sum.

    Quantiles instead of draws, so that every seed has the same padding.
    """
    full = law.rows - round(law.rows * law.empty)
    normal = NormalDist()
    z = law.sigma * np.array([normal.inv_cdf((i + 0.5) / full) for i in range(full)])
    low, high = -20.0, 20.0
    degrees = np.zeros(full, np.int64)
    for _ in range(80):
        mu = (low + high) / 2
        degrees = np.clip(np.round(np.exp(z + mu)), 1, law.max_degree).astype(np.int64)
        degrees[-1] = law.max_degree
        low, high = (mu, high) if degrees.sum() < law.nnz else (low, mu)
    excess = int(degrees.sum()) - law.nnz  # a few: the quantiles move in small steps
    free = np.flatnonzero((degrees > 1) & (degrees < law.max_degree))
    chosen = free[np.linspace(0, len(free) - 1, abs(excess)).astype(int)]
    degrees[chosen] -= np.sign(excess)
    if int(degrees.sum()) != law.nnz:
        raise InternalError("I101", f"degrees sum to {degrees.sum()}, not {law.nnz}")
    return np.concatenate([np.zeros(law.rows - full, np.int64), np.sort(degrees)])


# ---------------------------------------------------------------------------- columns


def _drawn(xp: Any, law: Law, degrees: np.ndarray, f: float) -> Any:
    """Keys row·n + column of a directed graph: each row draws its columns by popularity."""
    n = law.rows
    popularity = np.random.default_rng(n).permutation(degrees).astype(np.float64)
    cdf = xp.array(np.concatenate([[0.0], np.cumsum(popularity) / popularity.sum()]))
    rows = xp.repeat(xp.array(np.arange(n)), xp.array(degrees))
    edges = np.arange(law.blocks + 1) * n // law.blocks
    block = xp.array(np.repeat(np.arange(law.blocks), np.diff(edges)))[rows]
    first, size = xp.array(edges)[block], xp.array(np.diff(edges))[block]
    eighth = (rows - first) * COMMUNITIES // size
    inside = xp.uniform(len(rows)) < f
    low = xp.where(inside, first + eighth * size // COMMUNITIES, first)
    high = xp.where(inside, first + (eighth + 1) * size // COMMUNITIES, first + size)

    def draw(at: Any, low: Any, high: Any) -> Any:
        u = cdf[low] + xp.uniform(len(at)) * (cdf[high] - cdf[low])
        return xp.clip(xp.search(cdf, u) - 1, low, high - 1)

    every = xp.arange(len(rows))
    cols = draw(every, low, high)
    for turn in range(_ROUNDS):
        again = xp.repeated(rows * n + cols)
        if not len(again):
            return rows * n + cols
        a, b = low[again], high[again]
        if turn >= _WITHIN_ROUNDS:  # its community is full: anywhere in its block
            a, b = first[again], first[again] + size[again]
        if turn < 2 * _WITHIN_ROUNDS:
            cols[again] = draw(again, a, b)
        else:  # nearly every popular column is taken: all alike
            cols[again] = a + xp.int64(xp.uniform(len(again)) * (b - a))
    raise InternalError("I101", f"columns of {law} did not become distinct")


def _matched(xp: Any, law: Law, degrees: np.ndarray, f: float) -> Any:
    """Keys of a symmetric graph: half-edges are matched at random, a share `f` in communities;
    loops and repeated edges are mended by exchanging ends, which keeps all degrees."""
    n = law.rows
    ends = xp.repeat(xp.array(np.arange(n)), xp.array(degrees))
    ends = ends[xp.permutation(len(ends))]
    group = xp.where(xp.uniform(len(ends)) < f, ends * COMMUNITIES // n, COMMUNITIES)
    ends = ends[xp.argsort(group)]
    half = len(ends) // 2
    a, b, own = xp.copy(ends[: 2 * half : 2]), xp.copy(ends[1 : 2 * half : 2]), ends[2 * half :]
    counts = xp.host(xp.count(group, COMMUNITIES + 1)) // 2
    stops = np.minimum(np.cumsum(counts), half)
    stops[-1] = half
    starts = np.concatenate([[0], stops[:-1]])
    kind = xp.repeat(xp.array(np.arange(COMMUNITIES + 1)), xp.array(stops - starts))
    start, size = xp.array(starts), xp.array(stops - starts)
    for turn in range(_ROUNDS):
        keys = xp.minimum(a, b) * n + xp.maximum(a, b)
        bad, ordered = xp.conflicts(keys, a == b)
        if not len(bad):
            return xp.concat([a * n + b, b * n + a, own * n + own])  # an odd sum leaves one loop
        near = turn < _WITHIN_ROUNDS
        low = start[kind[bad]] if near else 0 * bad
        many = size[kind[bad]] if near else 0 * bad + half
        _exchange(xp, n, (a, b), (bad, low + xp.int64(xp.uniform(len(bad)) * many)), ordered)
    raise InternalError("I101", f"edges of {law} did not become distinct")


def _exchange(xp: Any, n: int, edges: tuple[Any, Any], pairs: tuple[Any, Any], known: Any) -> None:
    """Exchange ends of bad edges with ends of good ones where both results are new, in place.

    before: a–b, c–d    after: a–d, c–b
    """
    (a, b), (bad, other) = edges, pairs
    is_bad = xp.zeros_bool(len(a))
    is_bad[bad] = True
    keep = xp.first(other) & ~is_bad[other]
    bad, other = bad[keep], other[keep]
    flip = xp.uniform(len(bad)) < 0.5
    c, d = xp.where(flip, b[other], a[other]), xp.where(flip, a[other], b[other])
    p, q = a[bad], b[bad]
    one = xp.minimum(p, d) * n + xp.maximum(p, d)
    two = xp.minimum(c, q) * n + xp.maximum(c, q)
    fresh = xp.first(xp.concat([one, two]))
    keep = fresh[: len(one)] & fresh[len(one) :] & (p != d) & (c != q)
    keep = keep & ~xp.among(one, known) & ~xp.among(two, known)
    bad, other = bad[keep], other[keep]
    b[bad] = d[keep]
    a[other], b[other] = c[keep], q[keep]


# ---------------------------------------------------------------------------- NumPy or torch


class _Numpy:
    """The few array verbs that NumPy and torch spell differently."""

    def __init__(self, seed: int) -> None:
        self.rng: Any = np.random.default_rng(seed + 1)
        self.where: Any = np.where
        self.minimum: Any = np.minimum
        self.maximum: Any = np.maximum
        self.clip: Any = np.clip
        self.repeat: Any = np.repeat
        self.concat: Any = np.concatenate
        self.sort: Any = np.sort
        self.copy: Any = np.copy
        self.array: Any = np.asarray

    def uniform(self, n: int) -> Any:
        return self.rng.random(n)

    def normal(self, n: int) -> Any:
        return self.rng.standard_normal(n, np.float32)

    def permutation(self, n: int) -> Any:
        return self.rng.permutation(n)

    def arange(self, n: int) -> Any:
        return np.arange(n)

    def zeros_bool(self, n: int) -> Any:
        return np.zeros(n, bool)

    def argsort(self, x: Any) -> Any:
        return np.argsort(x, kind="stable")

    def search(self, ordered: Any, x: Any) -> Any:
        return np.searchsorted(ordered, x, side="right")

    def count(self, x: Any, n: int) -> Any:
        return np.bincount(x, minlength=n)

    def int64(self, x: Any) -> Any:
        return x.astype(np.int64)

    def int32(self, x: Any) -> Any:
        return x.astype(np.int32)

    def host(self, x: Any) -> np.ndarray:
        return x

    def nonzero(self, x: Any) -> Any:
        return np.flatnonzero(x)

    # the code below serves both

    def repeated(self, keys: Any) -> Any:
        """The positions of keys that equal an earlier one."""
        return self.nonzero(~self.first(keys))

    def first(self, keys: Any) -> Any:
        """A mask of the first of each group of equal keys."""
        mask = ~self.zeros_bool(len(keys))
        order = self.argsort(keys)
        ordered = keys[order]
        mask[order[1:][ordered[1:] == ordered[:-1]]] = False
        return mask

    def conflicts(self, keys: Any, also: Any) -> tuple[Any, Any]:
        """Where keys are repeated or `also` holds; and the keys, sorted."""
        order = self.argsort(keys)
        ordered = keys[order]
        also[order[1:][ordered[1:] == ordered[:-1]]] = True
        return self.nonzero(also), ordered

    def among(self, keys: Any, ordered: Any) -> Any:
        """A mask of the keys that `ordered` holds."""
        at = self.search(ordered, keys) - 1
        return ordered[self.clip(at, 0, len(ordered) - 1)] == keys


class _Torch(_Numpy):
    """The same on a GPU (or, with torch, on many cores)."""

    def __init__(self, seed: int, device: str) -> None:
        import torch

        super().__init__(seed)
        self.torch, self.device = torch, device
        self.generator = torch.Generator(device).manual_seed(seed + 1)
        self.where, self.minimum, self.maximum = torch.where, torch.minimum, torch.maximum
        self.clip, self.repeat, self.concat = torch.clip, torch.repeat_interleave, torch.cat
        self.copy, self.sort = torch.clone, lambda x: torch.sort(x).values
        self.array = lambda x: torch.as_tensor(x, device=device)
        self.options = {"generator": self.generator, "device": device}

    def uniform(self, n: int) -> Any:
        return self.torch.rand(n, dtype=self.torch.float64, **self.options)

    def normal(self, n: int) -> Any:
        return self.torch.randn(n, **self.options)

    def permutation(self, n: int) -> Any:
        return self.torch.randperm(n, **self.options)

    def arange(self, n: int) -> Any:
        return self.torch.arange(n, device=self.device)

    def zeros_bool(self, n: int) -> Any:
        return self.torch.zeros(n, dtype=self.torch.bool, device=self.device)

    def argsort(self, x: Any) -> Any:
        return self.torch.argsort(x, stable=True)

    def search(self, ordered: Any, x: Any) -> Any:
        return self.torch.searchsorted(ordered, x, right=True)

    def count(self, x: Any, n: int) -> Any:
        return self.torch.bincount(x, minlength=n)

    def int64(self, x: Any) -> Any:
        return x.to(self.torch.int64)

    def int32(self, x: Any) -> Any:
        return x.to(self.torch.int32)

    def host(self, x: Any) -> np.ndarray:
        return x.cpu().numpy()

    def nonzero(self, x: Any) -> Any:
        return self.torch.nonzero(x).flatten()


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
