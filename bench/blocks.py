"""`python3 dev.py bench blocks`: a matrix in blocks or in short columns on matrix tiles, beside the
dense product of cuBLAS. SpMM, Y = A X, by `ops.bsr_spmm` and by lesson 10 (DBSR, SR-BCRS), and
SDDMM, A ∘ (X Yᵀ) at the stored elements of A, by lesson 10.

Blocks are chosen at random, their elements are N(0, 1); 16-bit operands, a float32 result. The
dense product computes all elements, zeros included: its time says from which sparsity on blocks
pay. The other peers are the kernels that torch has for BSR (Triton) and cuSPARSE's, where they run.
Results are compared with float64 before they count.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import tilewright as tw
from bench import cusparse
from bench.gemm import _SUM_ERROR, check
from bench.harness import (
    Contender,
    Row,
    base_row,
    compare,
    elements_beyond,
    note,
    require_torch,
)  # fmt: skip
from tilewright.errors import ArgumentError
from tilewright.ops import bsr_spmm

LESSON = Path(__file__).resolve().parents[1] / "examples" / "10_blocks.py"


def blocks_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=4096, metavar="N", help="of A and X, square")
    parser.add_argument("--block", type=int, nargs="*", default=[32], metavar="N")
    parser.add_argument("--column", type=int, nargs="*", default=[16, 8], metavar="N",
                        help="elements of the columns of SR-BCRS")  # fmt: skip
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95], metavar="S")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--op", choices=("spmm", "sddmm"), nargs="+", default=["spmm", "sddmm"])


def blocks(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for each format, sparsity and operator: the peers', then ours."""
    if odd := [b for b in (*args.block, *args.column) if args.size % b]:
        rule = f"size {args.size} is no multiple of {odd}"
        raise ArgumentError("A109", rule, where="--size", hint="choose a multiple of each block")
    torch = require_torch()
    torch.manual_seed(0)
    x, y = (torch.randn(args.size, args.size, device="cuda").to(getattr(torch, args.dtype))
            for _ in range(2))  # fmt: skip
    lesson = runpy.run_path(str(LESSON), run_name="lesson")
    kinds: list[tuple[str, int, Any, Any]]
    kinds = [("bsr", b, tw.bsr, tw.bsr) for b in args.block]
    kinds += [("dbsr", b, lesson["covering_dbsr"], tw.dbsr) for b in args.block]
    kinds += [("sr_bcrs", b, tw.sr_bcrs, tw.sr_bcrs) for b in args.column]
    cases = [(kind, float(s)) for kind in kinds for s in args.sparsity]
    for (kind, b, of_spmm, of_sddmm), sparsity in cases:
        block = (b, 1 if kind == "sr_bcrs" else b)
        matrix = random_blocks(args.size, block, sparsity, 0.5 if kind == "dbsr" else 1.0)
        dense = torch.from_numpy(matrix).cuda().to(x.dtype)
        work, packed = 2.0 * np.count_nonzero(matrix) * args.size, None
        for op in args.op:
            base = base_row("blocks", f"{op}.{kind}", "cuda") | {
                "input": f"{args.size} {kind}({b}) {sparsity:g}", "width": args.size,
                "dtype": args.dtype, "sparsity": float((matrix == 0).mean()),
            }  # fmt: skip
            fmt = of_spmm(b) if op == "spmm" else of_sddmm(b)
            if packed is None or packed.format != fmt:
                packed = fmt.pack(matrix, dtype=args.dtype).to("cuda")
            if op == "spmm":
                them = [_dense(dense, x), *_spmm_peers(packed, x), _ours(packed, x)]
                yield from compare(base, them, check(dense, x), work)
            else:
                sampled = Sampled(matrix, packed, dense, x, y)
                them = sampled.contenders(ctas_of(matrix))
                yield from compare(base, them, sampled.check(), work)


def random_blocks(
    size: int, block: tuple[int, int], sparsity: float, rows: float = 1.0
) -> np.ndarray:
    """A float32 matrix with the nearest number of random blocks that are not 0, in a share `rows`
    of its rows of blocks, at random: the others are empty."""
    rng = np.random.default_rng(11)
    high, wide = (size // b for b in block)
    count = round(high * wide * (1 - sparsity))
    mine = np.sort(rng.permutation(high)[: max(round(high * rows), -(-count // wide))])
    kept = np.zeros((high, wide), bool)
    at = rng.permutation(len(mine) * wide)[:count]
    kept[mine[at // wide], at % wide] = True
    mask = np.repeat(np.repeat(kept, block[0], 0), block[1], 1)
    return np.where(mask, rng.standard_normal((size, size), np.float32), np.float32(0))


def ctas_of(matrix: np.ndarray) -> int:
    """How many CTAs share a row of blocks in SDDMM: about one for 128 columns."""
    return max(1, round(np.count_nonzero(matrix) / np.count_nonzero(matrix.any(1)) / 128))


def kernel_of(op: str, fmt: Any, dtype: str, width: int, **options: int) -> tw.Kernel:
    """A kernel of lesson 10; `options` of its schedule."""
    lesson = runpy.run_path(str(LESSON), run_name="lesson")
    operands = ("A", "X", "Y") if op == "sddmm" else ("A", "X")
    typed = lesson[op].typed(**dict.fromkeys(operands, dtype)).decompose(A=fmt)
    return typed.schedule(lambda s: lesson[f"{op}_on_tiles"](s, width, **options)).build("cuda")


def _ours(packed: Any, x: Any) -> Contender:
    torch = require_torch()
    out = torch.full(x.shape, float("nan"), device="cuda")
    name = str(packed.format).partition("(")[0]
    if name == "bsr":
        run = lambda: bsr_spmm(packed, x, out)  # noqa: E731
    else:
        kernel = kernel_of("spmm", packed.format, str(x.dtype)[6:], x.shape[1])
        run = lambda: kernel(packed, x, out=out)  # noqa: E731
    return Contender(f"tilewright {name}_spmm", run, lambda y: y, is_ours=True, is_default=True)


def _dense(dense: Any, x: Any) -> Contender:
    torch = require_torch()
    out = torch.empty_like(x)
    return Contender("torch mm, dense", lambda: torch.mm(dense, x, out=out), lambda y: y)


def _spmm_peers(packed: Any, x: Any) -> Iterator[Contender]:
    """torch's kernel and cuSPARSE's, for BSR."""
    if not str(packed.format).startswith("bsr"):
        return
    torch = require_torch()
    bsr = torch_bsr(packed, x.dtype)
    out = torch.empty_like(x)
    yield from _where_it_runs(
        "torch BSR, Triton", lambda: triton_kernels().bsr_dense_mm(bsr, x, out=out)
    )
    yield from _where_it_runs("cuSPARSE BSR", lambda: cusparse.bsr_spmm(bsr, x))


def triton_kernels() -> Any:
    """torch's own kernels for BSR. Raises ImportError or AttributeError where Triton is missing."""
    return importlib.import_module("torch.sparse._triton_ops")


def torch_bsr(packed: Any, dtype: Any) -> Any:
    """A packed BSR matrix as torch's tensor: the same arrays."""
    torch = require_torch()
    (part,), (values,) = packed.structure.parts, packed.values
    block, arrays = packed.format.blocks, part.arrays[1]
    arrays = [torch.as_tensor(arrays[name], device="cuda") for name in ("indptr", "indices")]
    values = torch.as_tensor(values, device="cuda").view(dtype).reshape(-1, *block)
    return torch.sparse_bsr_tensor(*arrays, values, packed.shape)


def _where_it_runs(name: str, make: Callable[[], Any]) -> Iterator[Contender]:
    """A peer, if this version of its library can do it. `make`: the call, or what gives it."""
    try:
        made = make()
        run = made if callable(made) else make
        run()
    except Exception as error:
        note(f"{name}: {type(error).__name__}: {str(error)[:120]}")
        return
    yield Contender(name, run, lambda y: y)


class Sampled:
    """SDDMM of one matrix: contenders give the values at all stored positions, in their order."""

    def __init__(self, matrix: np.ndarray, packed: Any, dense: Any, x: Any, y: Any) -> None:
        torch = require_torch()
        self.packed, self.dense, self.x, self.y = packed, dense.reshape(-1), x, y
        numbers = np.flatnonzero(matrix).astype(np.int32)  # where the value at each position is
        at = packed.with_values(numbers).values[0]
        self.at = torch.as_tensor(at, device="cuda").long()

    def contenders(self, ctas: int) -> Iterator[Contender]:
        torch = require_torch()
        out = torch.empty_like(self.x)
        run = lambda: torch.mm(self.x, self.y.T, out=out)  # noqa: E731
        yield Contender("torch mm, dense", run, lambda z: self.scaled(z.reshape(-1)[self.at]))
        name = str(self.packed.format).partition("(")[0]
        if name == "bsr":
            bsr = torch_bsr(self.packed, self.x.dtype)
            held = bsr.clone()
            call = lambda: triton_kernels().sampled_addmm(  # noqa: E731
                bsr, self.x, self.y.T, beta=0.0, out=held
            )
            for peer in (
                *_where_it_runs("torch BSR, Triton", call),
                *_where_it_runs("cuSPARSE BSR", lambda: cusparse.bsr_sddmm(bsr, self.x, self.y)),
            ):
                run = peer.run
                yield Contender(peer.impl, run, self.scaled_blocks)
        dtype, width = str(self.x.dtype)[6:], self.x.shape[1]
        kernel = kernel_of("sddmm", self.packed.format, dtype, width, ctas=ctas)
        kept = kernel(self.packed, self.x, self.y)
        run = lambda: kernel(self.packed, self.x, self.y, out=kept)  # noqa: E731
        yield Contender(
            f"tilewright {name}_sddmm", run, lambda z: torch.as_tensor(z.values[0], device="cuda"),
            is_ours=True, is_default=True,
        )  # fmt: skip

    def scaled_blocks(self, z: Any) -> Any:
        """Those of a BSR tensor of torch, or of its blocks."""
        return self.scaled((z if z.ndim == 3 else z.values()).reshape(-1))

    def scaled(self, values: Any) -> Any:
        """The peers' products, times the values of A."""
        return values.float() * self.dense[self.at].float()

    def check(self) -> Callable[[Any], str]:
        x, y, a = self.x.double(), self.y.double(), self.dense[self.at].double()
        expected = (x @ y.T).reshape(-1)[self.at] * a
        magnitudes = (x.abs() @ y.abs().T).reshape(-1)[self.at] * a.abs()
        rounded = require_torch().finfo(self.x.dtype).eps  # the peers' products are 16-bit

        return lambda got: elements_beyond(
            got.reshape(-1), expected, _SUM_ERROR * magnitudes + rounded * expected.abs()
        )
