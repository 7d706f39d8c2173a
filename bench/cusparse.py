"""cuSPARSE through ctypes: the SpMM and SDDMM that vendors' users get at best, CSR and BSR.

Row-major operands, int32 indices, float32 sums, the analysis done beforehand.
Reference: the cuSPARSE documentation, generic API (cusparseSpMM, cusparseSDDMM).
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
from collections.abc import Callable
from ctypes import byref, c_double, c_float, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np

from bench.graphs import Graph
from tilewright.errors import MissingExtra

SPMM_ALGORITHMS = {"alg1": 4, "alg2": 6, "alg3": 12}  # CUSPARSE_SPMM_CSR_ALG1, 2, 3
_SPMM_BSR = 14  # CUSPARSE_SPMM_BSR_ALG1
_SDDMM_DEFAULT = 0
_INDEX_32, _BASE_ZERO, _ROW_MAJOR = 2, 0, 2
_PLAIN, _TRANSPOSED = 0, 1
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # CUDA_R_*


@functools.cache
def library() -> ctypes.CDLL:
    """The cuSPARSE that torch or CUDA brings. Raises MissingExtra[E101]."""
    libraries: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        libraries += glob.glob(f"{folder}/**/libcusparse.so*", recursive=True)
    for name in (*sorted(libraries), "libcusparse.so.12", "libcusparse.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise MissingExtra(
        "E101", "there is no cuSPARSE library", hint="pip install 'tilewright[torch]' with CUDA"
    )


def _check(status: int, function: str) -> None:
    if status:
        raise RuntimeError(f"{function} gave status {status}")


@functools.cache
def _handle() -> c_void_p:
    handle = c_void_p()
    _check(library().cusparseCreate(byref(handle)), "cusparseCreate")
    return handle


def _csr(graph: Graph, values: Any) -> tuple[c_void_p, list[Any]]:
    """A descriptor of a matrix on the GPU, and the arrays that it points to."""
    import torch

    arrays = [torch.from_numpy(a).cuda() for a in (graph.indptr, graph.indices)]
    descriptor = c_void_p()
    status = library().cusparseCreateCsr(
        byref(descriptor), c_int64(graph.shape[0]), c_int64(graph.shape[1]), c_int64(graph.nnz),
        *(c_void_p(a.data_ptr()) for a in (*arrays, values)),
        _INDEX_32, _INDEX_32, _BASE_ZERO, _type(values),
    )  # fmt: skip
    _check(status, "cusparseCreateCsr")
    return descriptor, [*arrays, values]


def _bsr(a: Any, values: Any) -> c_void_p:
    """A descriptor of the structure of a BSR tensor of torch, with `values`."""
    arrays = a.crow_indices(), a.col_indices(), values
    rows, cols = (n // b for n, b in zip(a.shape, values.shape[1:], strict=True))
    descriptor = c_void_p()
    status = library().cusparseCreateBsr(
        byref(descriptor), *map(c_int64, (rows, cols, *values.shape)),
        *(c_void_p(x.data_ptr()) for x in arrays), _INDEX_32, _INDEX_32, _BASE_ZERO,
        _type(values), _ROW_MAJOR,
    )  # fmt: skip
    _check(status, "cusparseCreateBsr")
    return descriptor


def _dense(array: Any) -> c_void_p:
    descriptor = c_void_p()
    rows, cols = array.shape
    status = library().cusparseCreateDnMat(
        byref(descriptor),
        c_int64(rows),
        c_int64(cols),
        c_int64(cols),
        c_void_p(array.data_ptr()),
        _type(array),
        _ROW_MAJOR,
    )
    _check(status, "cusparseCreateDnMat")
    return descriptor


def _type(array: Any) -> int:
    return _TYPES[str(array.dtype).rpartition(".")[2]]


def _prepared(name: str, arguments: list[Any], keep: Any, result: Any) -> Callable[[], Any]:
    """Size, workspace and analysis of one operation; then the call that does it."""
    import torch

    cusparse, handle = library(), _handle()

    def on_stream() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        cusparse.cusparseSetStream(handle, c_void_p(stream))

    on_stream()  # the last call may have been captured, on another one
    size = c_size_t()
    _check(
        getattr(cusparse, f"{name}_bufferSize")(handle, *arguments, byref(size)),
        f"{name}_bufferSize",
    )
    workspace = torch.empty(max(size.value, 16), dtype=torch.uint8, device="cuda")
    address = c_void_p(workspace.data_ptr())
    _check(
        getattr(cusparse, f"{name}_preprocess")(handle, *arguments, address), f"{name}_preprocess"
    )
    function = getattr(cusparse, name)
    held = (keep, workspace)

    def run() -> Any:
        on_stream()
        status = function(handle, *arguments, address)
        if status:
            _check(status, name)
        return result if held else None

    return run


def _scalars(array: Any) -> tuple[Any, Any, int]:
    """One, zero and the type of sums."""
    kind = c_double if _type(array) == _TYPES["float64"] else c_float
    return kind(1), kind(0), _TYPES["float64"] if kind is c_double else _TYPES["float32"]


def spmm(
    graph: Graph, values: Any, x: Any, algorithm: int
) -> tuple[Callable[[], Any], Callable[[Any], np.ndarray]]:
    """Y = A X into memory allocated once; `values` (nnz) and `x` (n, d) are tensors on the GPU."""
    import torch

    from bench.peers import to_host

    y = torch.empty(graph.shape[0], x.shape[1], dtype=x.dtype, device="cuda")
    a, arrays = _csr(graph, values)
    one, zero, kind = _scalars(x)
    arguments = [_PLAIN, _PLAIN, byref(one), a, _dense(x), byref(zero), _dense(y), kind, algorithm]
    return _prepared("cusparseSpMM", arguments, (arrays, x, one, zero), y), to_host


def sddmm(
    graph: Graph, exact: np.ndarray, values: Any, p: Any, q: Any
) -> tuple[Callable[[], Any], Callable[[Any], np.ndarray]]:
    """(P Qᵀ) at the entries of A into memory allocated once; the check multiplies by A's values."""
    import torch

    from bench.peers import to_host

    out = torch.empty_like(values)
    c, arrays = _csr(graph, out)
    one, zero, kind = _scalars(p)
    arguments = [
        _PLAIN,
        _TRANSPOSED,
        byref(one),
        _dense(p),
        _dense(q),
        byref(zero),
        c,
        kind,
        _SDDMM_DEFAULT,
    ]
    run = _prepared("cusparseSDDMM", arguments, (arrays, p, q, one, zero), out)
    return (
        run,
        lambda result: (
            to_host(result).astype(np.float32 if exact.dtype != np.float64 else np.float64) * exact
        ),
    )


def bsr_spmm(a: Any, x: Any) -> Callable[[], Any]:
    """Y = A X for a BSR tensor of torch with int32 indices, into memory allocated once."""
    import torch

    y = torch.empty_like(x)
    one, zero, kind = _scalars(x)
    arguments = [_PLAIN, _PLAIN, byref(one), _bsr(a, a.values()), _dense(x), byref(zero)]
    arguments += [_dense(y), kind, _SPMM_BSR]
    return _prepared("cusparseSpMM", arguments, (a, x, one, zero), y)


def bsr_sddmm(a: Any, p: Any, q: Any) -> Callable[[], Any]:
    """P Qᵀ at the blocks of a BSR tensor of torch, as `bsr_spmm`; the result: its blocks."""
    import torch

    out = torch.empty_like(a.values())
    one, zero, kind = _scalars(p)
    arguments = [_PLAIN, _TRANSPOSED, byref(one), _dense(p), _dense(q), byref(zero)]
    arguments += [_bsr(a, out), kind, _SDDMM_DEFAULT]
    return _prepared("cusparseSDDMM", arguments, (a, p, q, one, zero), out)
