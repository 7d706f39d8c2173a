"""The suites `graph_attention` and `graph_softmax`: one launch of ours, beside operators of torch
one after the other, and on the CPU a loop in C++ that computes a row after the other.
"""

from __future__ import annotations

import argparse
import ctypes
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import peers, sparse
from bench.graphs import Graph
from bench.harness import Contender, Row, base_row, compare, note
from tilewright.runtime import pool
from tilewright.toolchain import cxx

LESSONS = Path(__file__).parent.parent / "examples"
LESSON = runpy.run_path(str(LESSONS / "06_graph_attention.py"))
_SAMPLED_ROWS = 512
HAND_WRITTEN = """#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>
constexpr int H = @H, D = @D, AHEAD = 8;
static void rows(const int32_t* ptr, const int32_t* idx, const float* a, const float* Q,
                 const float* K, const float* V, float scale, float* out, int64_t begin,
                 int64_t end) {
  std::vector<float> memory;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = ptr[i], n = ptr[i + 1] - first;
    if (int64_t(memory.size()) < n) memory.resize(n);
    float* __restrict w = memory.data();
    for (int h = 0; h < H; ++h) {
      const float* __restrict q = Q + (i * H + h) * D;
      float top = -INFINITY, total = 0, o[D] = {};
      for (int64_t p = 0; p < n; ++p) {
        __builtin_prefetch(K + (int64_t(idx[first + p + AHEAD]) * H + h) * D);
        const float* __restrict k = K + (int64_t(idx[first + p]) * H + h) * D;
        float dot = 0;
        for (int c = 0; c < D; ++c) dot += q[c] * k[c];
        w[p] = scale * a[first + p] * dot;
        top = w[p] > top ? w[p] : top;
      }
      for (int64_t p = 0; p < n; ++p) total += w[p] = std::exp(w[p] - top);
      for (int64_t p = 0; p < n; ++p) {
        const float* __restrict v = V + (int64_t(idx[first + p]) * H + h) * D;
        for (int c = 0; c < D; ++c) o[c] += w[p] * v[c];
      }
      for (int c = 0; c < D; ++c) out[(i * H + h) * D + c] = total > 0 ? o[c] / total : 0;
    }
  }
}
extern "C" __attribute__((visibility("default"))) void attend(
    const int32_t* ptr, const int32_t* idx, const float* a, const float* Q, const float* K,
    const float* V, float scale, float* out, int64_t m, int threads) {
  std::vector<std::thread> team;  // rows in as many parts as there are threads, of equal entries
  int64_t begin = 0;
  for (int t = 1; t <= threads; ++t) {
    int64_t end = begin;
    while (end < m && (t == threads || int64_t(ptr[end]) * threads < int64_t(ptr[m]) * t)) ++end;
    if (t == threads) rows(ptr, idx, a, Q, K, V, scale, out, begin, end);
    else team.emplace_back(rows, ptr, idx, a, Q, K, V, scale, out, begin, end);
    begin = end;
  }
  for (auto& one : team) one.join();
}
"""


def graph_attention_arguments(parser: argparse.ArgumentParser) -> None:
    sparse.spmm_arguments(parser)
    parser.add_argument("--heads", type=sparse.positive, nargs="+", default=[1, 8], metavar="N")
    parser.set_defaults(width=[64], graphs=["pubmed", "arxiv"])


def graph_softmax_arguments(parser: argparse.ArgumentParser) -> None:
    sparse.spmm_arguments(parser)
    parser.set_defaults(width=[1], graphs=["pubmed", "arxiv"])


def graph_attention(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of O = softmax(scale · A ∘ Q Kᵀ) V for each graph, width and number of heads."""
    for graph in sparse.inputs(args):
        for width in args.width:
            for heads in args.heads:
                yield from _attention_case(graph, heads, width, args.target)


def graph_softmax(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of the softmax of each row of A, for each graph."""
    for graph in sparse.inputs(args):
        A = LESSON["pack_for_graph_attention"](graph.csr, args.target, dtype="float32")
        kernel = _softmax_kernel(A, args.target)
        base = base_row("graph_softmax", "graph_softmax", args.target)
        base |= sparse._describe(graph, 1, "float32")
        contenders = [_ours(lambda k=kernel, A=A: k(A), sparse._entries)]
        chain = _Chain(graph, args.target)
        contenders.append(Contender("torch chain", chain.softmax, peers.to_host))
        expected = _softmax(graph, graph.values.astype(np.float64)[:, None])[:, 0]
        check = _check(expected, lambda x: x)
        yield from compare(base, contenders, check, 4.0 * graph.nnz)


def _softmax_kernel(A: Any, target: str) -> Any:
    """That of lesson 5."""
    lesson = runpy.run_path(str(LESSONS / "05_row_softmax.py"))
    if target == "cpp":
        return lesson["softmax"].schedule(lesson["softmax_by_row"]).build()
    softmax = lesson["softmax_on_gpu"].decompose(A=A.format)
    return softmax.schedule(lesson["softmax_by_threads"]).build("cuda")


def _attention_case(graph: Graph, heads: int, width: int, target: str) -> list[Row]:
    shapes = [(n, heads, width) for n in (graph.shape[0], graph.shape[1], graph.shape[1])]
    rng = np.random.default_rng(7)
    exact = [rng.standard_normal(s, np.float32) for s in shapes]
    q, k, v = (peers.to_target(x, "float32", target) for x in exact)
    A = LESSON["pack_for_graph_attention"](graph.csr, target, dtype="float32")
    scale = width**-0.5
    contenders = [_ours(lambda: LESSON["graph_attention"](A, q, k, v), peers.to_host)]
    chain = _Chain(graph, target)
    for name, run in chain.attention(q, k, v, scale).items():
        try:
            run()
        except Exception as error:  # torch may lack the memory, or a kernel
            note(f"{name}: left out ({type(error).__name__}: {str(error)[:80]})")
            continue
        contenders.append(Contender(name, run, peers.to_host))
    if target == "cpp":
        contenders.append(_hand_written(graph, exact, scale))
    base = base_row("graph_attention", "graph_attention", target)
    base |= sparse._describe(graph, width, "float32") | {"heads": heads}
    base["input"] += f" × {heads}"
    rows = _rows(graph)
    check = _check(_attention(graph, exact, scale, rows), lambda x: x[rows])
    return compare(base, contenders, check, 4.0 * graph.nnz * heads * width)


def _ours(run: Callable[[], Any], host: Callable[[Any], np.ndarray]) -> Contender:
    return Contender("tilewright", run, host, is_ours=True, is_default=True)


# ---------------------------------------------------------------------------- peers


class _Chain:
    """The operators of torch, one after the other."""

    def __init__(self, graph: Graph, target: str) -> None:
        import torch

        if target == "cpp":
            torch.set_num_threads(pool.wanted_threads())
        device = "cuda" if target == "cuda" else "cpu"
        rows = np.repeat(np.arange(graph.shape[0]), graph.lengths)
        self.torch, self.m, self.target, self.graph = torch, graph.shape[0], target, graph
        self.rows, self.cols, self.a = (
            torch.from_numpy(x).to(device)
            for x in (rows, graph.indices.astype(np.int64), graph.values.astype(np.float32))
        )

    def weights(self, s: Any) -> tuple[Any, Any]:
        """Softmax weights of scores (nnz, heads), and their sums (m, heads)."""
        index = self.rows[:, None].expand_as(s)
        top = s.new_full((self.m, s.shape[1]), -float("inf"))
        top.scatter_reduce_(0, index, s, "amax")
        w = (s - top[self.rows]).exp()
        return w, s.new_zeros(self.m, s.shape[1]).index_add_(0, self.rows, w)

    def softmax(self) -> Any:
        w, total = self.weights(self.a[:, None])
        return (w / total[self.rows])[:, 0]

    def attention(self, q: Any, k: Any, v: Any, scale: float) -> dict[str, Callable[[], Any]]:
        torch = self.torch
        q, k, v = (torch.as_tensor(x) for x in (q, k, v))
        heads, width = q.shape[1:]

        def gathered() -> Any:
            s = (q[self.rows] * k[self.cols]).sum(-1) * (scale * self.a)[:, None]
            w, total = self.weights(s)
            o = v.new_zeros(self.m, heads, width)
            o.index_add_(0, self.rows, w[:, :, None] * v[self.cols])
            return torch.where(total[:, :, None] > 0, o / total[:, :, None], 0.0)

        matrix = peers._torch_csr(self.graph, self.graph.values, "float32", "int32", q.device.type)
        zeros = torch.zeros_like(matrix.values())
        indptr, indices = matrix.crow_indices(), matrix.col_indices()
        at = [[x[:, h].contiguous() for x in (q, k, v)] for h in range(heads)]

        def products() -> Any:
            """Of one head after the other, by the sparse products of torch."""
            out = []
            for qh, kh, vh in at:
                of = torch.sparse_csr_tensor(indptr, indices, zeros, matrix.shape)
                dots = torch.sparse.sampled_addmm(of, qh, kh.t(), beta=0.0).values()
                w, total = self.weights((dots * (scale * self.a))[:, None])
                shares = (w / total[self.rows])[:, 0]
                shares = torch.sparse_csr_tensor(indptr, indices, shares, matrix.shape)
                out.append(torch.sparse.mm(shares, vh))
            return torch.stack(out, 1)

        return {"torch gather chain": gathered, "torch sparse chain": products}


def _hand_written(graph: Graph, qkv: list[np.ndarray], scale: float) -> Contender:
    text = HAND_WRITTEN.replace("@H", str(qkv[0].shape[1])).replace("@D", str(qkv[0].shape[2]))
    flags = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
    library = cxx.load(cxx.compile_cpp(text, name="hand-written", flags=flags, full_link=True))
    indices = np.append(graph.indices.astype(np.int32), np.zeros(8, np.int32))
    arrays = [graph.indptr.astype(np.int32), indices, graph.values.astype(np.float32), *qkv]
    out = np.empty_like(qkv[0])
    m, threads = ctypes.c_int64(graph.shape[0]), ctypes.c_int(pool.wanted_threads())

    def run() -> np.ndarray:
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*arrays, out)]
        library.attend(*pointers[:6], ctypes.c_float(scale), pointers[6], m, threads)
        return out

    return Contender("C++ loop", run, np.array)


# ---------------------------------------------------------------------------- the oracle


def _rows(graph: Graph) -> np.ndarray:
    """Rows that are checked: random ones, the longest, and an empty one."""
    some = np.random.default_rng(3).choice(
        graph.shape[0], min(_SAMPLED_ROWS, graph.shape[0]), False
    )
    order = np.argsort(graph.lengths)
    return np.unique(np.concatenate([some, order[:1], order[-8:]]))


def _attention(graph: Graph, qkv: list[np.ndarray], scale: float, rows: np.ndarray) -> np.ndarray:
    """The rows of the result, in float64."""
    q, k, v = (x.astype(np.float64) for x in qkv)
    out = np.zeros((len(rows), *q.shape[1:]))
    for at, i in enumerate(rows):
        part = slice(graph.indptr[i], graph.indptr[i + 1])
        j, a = graph.indices[part], graph.values[part].astype(np.float64)
        if len(j):
            s = scale * a[:, None] * np.einsum("hk,jhk->jh", q[i], k[j])
            w = np.exp(s - s.max(0))
            out[at] = np.einsum("jh,jhc->hc", w / w.sum(0), v[j])
    return out


def _softmax(graph: Graph, s: np.ndarray) -> np.ndarray:
    """The softmax of scores (nnz, heads) over the entries of each row, in float64."""
    out = np.zeros_like(s)
    for i in np.flatnonzero(graph.lengths):
        part = slice(graph.indptr[i], graph.indptr[i + 1])
        w = np.exp(s[part] - s[part].max(0))
        out[part] = w / w.sum(0)
    return out


def _check(
    expected: np.ndarray, of: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], str]:
    def wrong(result: np.ndarray) -> str:
        got = np.nan_to_num(of(result).astype(np.float64), nan=np.inf)
        error = float(np.abs(got - expected).max(initial=0))
        return f"WRONG by {error:g}" if error > 2e-5 else ""

    return wrong
