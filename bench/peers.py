"""Peers of the sparse benchmarks: other implementations, each in its best configuration.

CPU: SciPy, torch's CSR with int32 and with int64 indices, on as many threads as ours. GPU:
cuSPARSE, every algorithm with preprocessing, and torch's CSR. A peer that does not run is named and
left out.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.graphs import Graph
from bench.harness import Contender, note
from tilewright import dtypes
from tilewright.runtime import pool

Peer = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]
Setup = Callable[[], Peer]


def to_target(values: np.ndarray, dtype: str, target: str) -> Any:
    """An array of the target: NumPy on the CPU (torch for bfloat16), torch on the GPU."""
    if target == "cpp" and dtype != "bfloat16":
        return np.ascontiguousarray(values)
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    return tensor.cuda() if target == "cuda" else tensor


def to_host(array: Any) -> np.ndarray:
    """NumPy from any array; bfloat16 as float32."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach()
    if str(array.dtype) == "torch.bfloat16":
        array = array.float()
    return array.cpu().numpy()


def spmm_peers(
    graph: Graph, values: np.ndarray, x: Any, dtype: str, target: str
) -> Iterator[Contender]:
    """Peers of Y = A X. `values` are float32 where NumPy lacks the dtype."""
    makers: dict[str, Setup] = {}
    if target == "cpp":
        if dtype in ("float32", "float64"):
            makers["scipy csr @ X"] = lambda: _scipy(graph, values, x)
        for index in ("int32", "int64"):
            for preallocated in (False, True):
                makers[f"torch csr {index}{', out=' if preallocated else ' @ X'}"] = (
                    lambda index=index, preallocated=preallocated: _torch_mm(
                        graph, values, x, index, preallocated
                    )
                )
    else:
        makers["torch csr int32 @ X"] = lambda: _torch_mm(graph, values, x, "int32", False)
        from bench import cusparse

        for name, number in cusparse.SPMM_ALGORITHMS.items():
            makers[f"cusparse spmm {name}"] = lambda number=number: cusparse.spmm(
                graph, to_target(values, dtype, target), x, number
            )
    yield from _ready(makers)


def sddmm_peers(
    graph: Graph, values: np.ndarray, pq: tuple[Any, ...], dtype: str, target: str
) -> Iterator[Contender]:
    """Peers of A ∘ (P Qᵀ). Theirs sample without multiplying by A's values, which is less work; the
    check multiplies afterwards."""
    makers: dict[str, Setup] = {}
    if target == "cpp":
        makers["numpy gather"] = lambda: _numpy_sddmm(graph, values, pq)
    for index in ("int32", "int64") if target == "cpp" else ("int32",):
        makers[f"torch sampled_addmm {index}"] = lambda index=index: _sampled(
            graph, values, pq, dtype, index
        )
    if target == "cuda":
        from bench import cusparse

        makers["cusparse sddmm"] = lambda: cusparse.sddmm(
            graph, values, to_target(values, dtype, target), *pq
        )
    yield from _ready(makers)


def _ready(makers: dict[str, Setup]) -> Iterator[Contender]:
    for package in ("scipy.sparse", "torch"):
        with contextlib.suppress(ImportError):
            importlib.import_module(package)  # not a cost of the first peer that needs it
    for name, make in makers.items():
        try:
            began = time.perf_counter()
            run, host = make()
            pack_ms = 1e3 * (time.perf_counter() - began)
            run()
        except Exception as error:  # a peer may lack the dtype, the package, the memory
            reason = (str(error).splitlines() or [""])[0][:90]
            note(f"{name}: left out ({type(error).__name__}: {reason})")
            continue
        yield Contender(name, run, host, costs={"pack": pack_ms})


def _scipy(graph: Graph, values: np.ndarray, x: Any) -> Peer:
    import scipy.sparse

    a = scipy.sparse.csr_matrix((values, graph.indices, graph.indptr), shape=graph.shape)
    return lambda: a @ x, to_host


def _torch_csr(graph: Graph, values: np.ndarray, dtype: str, index: str, device: str) -> Any:
    import warnings

    import torch

    if device == "cpu":
        torch.set_num_threads(pool.wanted_threads())
    kind = getattr(torch, index)
    rows, cols = (torch.from_numpy(a).to(kind) for a in (graph.indptr, graph.indices))
    of = torch.from_numpy(values).to(getattr(torch, dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own CSR a beta
        matrix = torch.sparse_csr_tensor(rows, cols, of, size=graph.shape)
    return matrix.cuda() if device == "cuda" else matrix


def _torch_of(array: Any) -> Any:
    import torch

    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def _torch_mm(graph: Graph, values: np.ndarray, x: Any, index: str, preallocated: bool) -> Peer:
    import torch

    t = _torch_of(x)
    a = _torch_csr(graph, values, str(t.dtype).rpartition(".")[2], index, t.device.type)
    if not preallocated:
        return lambda: torch.sparse.mm(a, t), to_host
    out = torch.empty(graph.shape[0], t.shape[1], dtype=t.dtype, device=t.device)
    return lambda: torch.mm(a, t, out=out), to_host


def _sampled(graph: Graph, values: np.ndarray, pq: tuple[Any, ...], dtype: str, index: str) -> Peer:
    import torch

    p, q = _torch_of(pq[0]), _torch_of(pq[1])
    a = _torch_csr(graph, values, dtype, index, p.device.type)
    q_t = q.t()  # a view: both operands stay feature-contiguous, which is fast

    def host(result: Any) -> np.ndarray:
        return _scaled(to_host(result.values()), values)

    return lambda: torch.sparse.sampled_addmm(a, p, q_t, beta=0.0), host


def _scaled(sampled: np.ndarray, values: np.ndarray) -> np.ndarray:
    wide = sampled.astype(np.float64 if sampled.dtype == np.float64 else np.float32)
    return wide * values


def _numpy_sddmm(graph: Graph, values: np.ndarray, pq: tuple[Any, ...]) -> Peer:
    if dtypes.dtype(str(values.dtype)).bits < 32 or not all(isinstance(a, np.ndarray) for a in pq):
        raise TypeError("NumPy sums narrow floats in their own precision")
    rows = np.repeat(np.arange(graph.shape[0]), graph.lengths)
    p, q = pq
    step = max(1, (4 << 20) // max(p.shape[1], 1))  # gathered rows stay in the cache

    def run() -> np.ndarray:
        out = np.empty_like(values)
        for begin in range(0, len(out), step):
            part = slice(begin, begin + step)
            out[part] = np.einsum("ek,ek->e", p[rows[part]], q[graph.indices[part]]) * values[part]
        return out

    return run, to_host
