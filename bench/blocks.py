"""`python3 dev.py bench blocks`: a matrix in blocks or in short columns on matrix tiles, beside the
dense product of cuBLAS. SpMM, Y = A X, and SDDMM, A ∘ (X Yᵀ) at the stored elements of A, by lesson
10.

Blocks are chosen at random, their elements are N(0, 1); 16-bit operands, a float32 result. The
dense product computes all elements, zeros included: its time says from which sparsity on blocks
pay. The other peers are the kernels that torch has for BSR (Triton) and cuSPARSE's, where they run.
Results are compared with float64 before they count.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import warnings
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
    kinds: list[tuple[str, int, Any]]
    kinds = [("bsr", b, tw.bsr) for b in args.block]
    kinds += [("dbsr", b, tw.dbsr) for b in args.block]
    kinds += [("sr_bcrs", b, tw.sr_bcrs) for b in args.column]
    cases = [(kind, float(s)) for kind in kinds for s in args.sparsity]
    for (kind, b, of), sparsity in cases:
        block = (b, 1 if kind == "sr_bcrs" else b)
        matrix = random_blocks(args.size, block, sparsity, 0.5 if kind == "dbsr" else 1.0)
        dense = torch.from_numpy(matrix).cuda().to(x.dtype)
        work = 2.0 * np.count_nonzero(matrix) * args.size
        for op in args.op:
            base = base_row("blocks", f"{op}.{kind}", "cuda") | {
                "input": f"{args.size} {of(b)} {sparsity:g}", "width": args.size,
                "dtype": args.dtype, "sparsity": float((matrix == 0).mean()),
            }  # fmt: skip
            case = (Product if op == "spmm" else Sampled)(of(b), matrix, dense, x, y)
            yield from compare(base, case.contenders(), case.check(), work)


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


class Case:
    """One operator of one matrix: its contenders, and what is wrong with a result."""

    def __init__(self, fmt: Any, matrix: np.ndarray, dense: Any, x: Any, y: Any) -> None:
        self.fmt, self.matrix, self.dense, self.x, self.y = fmt, matrix, dense, x, y
        self.dtype, self.width = str(x.dtype)[6:], x.shape[1]
        self.name = str(fmt).partition("(")[0]
        self.lesson = runpy.run_path(str(LESSON), run_name="lesson")

    def pack(self, fmt: Any) -> Any:
        return fmt.pack(self.matrix, dtype=self.dtype).to("cuda")

    def kernel(self, op: str, fmt: Any, **options: int) -> tw.Kernel:
        """A kernel of lesson 10; `options` of its schedule."""
        operands = ("A", "X", "Y") if op == "sddmm" else ("A", "X")
        typed = self.lesson[op].typed(**dict.fromkeys(operands, self.dtype)).decompose(A=fmt)
        schedule = self.lesson[f"{op}_on_tiles"]
        return typed.schedule(lambda s: schedule(s, self.width, **options)).build("cuda")

    def bsr(self) -> Any:
        """The matrix as torch's BSR tensor: the arrays that ours has."""
        torch, packed = require_torch(), self.pack(self.fmt)
        (part,), (values,) = packed.structure.parts, packed.values
        lists = (part.arrays[1][name] for name in ("indptr", "indices"))
        values = torch.as_tensor(values, device="cuda").view(self.x.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its own BSR a beta
            return torch.sparse_bsr_tensor(
                *(torch.as_tensor(a, device="cuda") for a in lists),
                values.reshape(-1, *self.fmt.blocks), packed.shape,
            )  # fmt: skip


class Product(Case):
    """Y = A X."""

    def contenders(self) -> Iterator[Contender]:
        torch, x = require_torch(), self.x
        first, half = torch.empty_like(x), torch.empty_like(x)
        yield Contender("torch mm, dense", lambda: torch.mm(self.dense, x, out=first), lambda y: y)
        if self.name == "bsr":
            bsr = self.bsr()
            call = lambda: triton_kernels().bsr_dense_mm(bsr, x, out=half)  # noqa: E731
            yield from _where_it_runs("torch BSR, Triton", call)
            yield from _where_it_runs("cuSPARSE BSR", lambda: cusparse.bsr_spmm(bsr, x))
        out = torch.full(x.shape, float("nan"), device="cuda")
        fmt = self.fmt
        if self.name == "dbsr":
            fmt = self.lesson["covering_dbsr"](self.fmt.blocks[0])
        packed, kernel = self.pack(fmt), self.kernel("spmm", fmt)
        run = lambda: kernel(packed, x, out=out)  # noqa: E731
        name = f"tilewright {self.name}_spmm"
        yield Contender(name, run, lambda y: y, is_ours=True, is_default=True)

    def check(self) -> Callable[[Any], str]:
        return check(self.dense, self.x)


class Sampled(Case):
    """A ∘ (X Yᵀ): results are compared as dense matrices; those of peers are X Yᵀ alone, and are
    multiplied by A for that."""

    def contenders(self) -> Iterator[Contender]:
        torch, x, y = require_torch(), self.x, self.y
        out = torch.empty_like(x)
        run = lambda: torch.mm(x, y.T, out=out)  # noqa: E731
        yield Contender("torch mm, dense", run, lambda z: z.float() * self.dense.float())
        if self.name == "bsr":
            bsr, numbers = self.bsr(), self.numbers(self.pack(self.fmt))
            held = bsr.clone()
            call = lambda: triton_kernels().sampled_addmm(bsr, x, y.T, beta=0.0, out=held)  # noqa: E731
            for peer in (
                *_where_it_runs("torch BSR, Triton", call),
                *_where_it_runs("cuSPARSE BSR", lambda: cusparse.bsr_sddmm(bsr, x, y)),
            ):
                yield Contender(peer.impl, peer.run, lambda z: self.of_blocks(z, numbers))
        pieces = self.lesson["in_pieces"](self.fmt, 4 if self.fmt.blocks[1] > 1 else 128)
        packed = self.pack(pieces)
        mine, kernel = self.numbers(packed), self.kernel("sddmm", pieces)
        kept = kernel(packed, x, y)
        yield Contender(
            f"tilewright {self.name}_sddmm", lambda: kernel(packed, x, y, out=kept),
            lambda z: self.spread(torch.as_tensor(z.values[0], device="cuda"), mine),
            is_ours=True, is_default=True,
        )  # fmt: skip

    def numbers(self, packed: Any) -> Any:
        """For each stored position the number of its element in the dense matrix; 0 where it is
        padding, which the first element is not checked for."""
        numbers = np.flatnonzero(self.matrix).astype(np.int32)
        values = packed.with_values(numbers).values[0]
        return require_torch().as_tensor(values, device="cuda").long()

    def spread(self, values: Any, numbers: Any) -> Any:
        """Values at stored positions as a dense matrix."""
        out = require_torch().zeros(self.dense.numel(), device="cuda")
        out[numbers] = values.reshape(-1).float()
        out[0] = 0
        return out.reshape(self.dense.shape)

    def of_blocks(self, z: Any, numbers: Any) -> Any:
        """The result of a peer: a BSR tensor of torch, or its blocks."""
        blocks = z if z.ndim == 3 else z.values()
        return self.spread(blocks, numbers) * self.dense.float()

    def check(self) -> Callable[[Any], str]:
        x, y, a = self.x.double(), self.y.double(), self.dense.double()
        expected = (x @ y.T) * a
        magnitudes = (x.abs() @ y.abs().T) * a.abs()
        rounded = require_torch().finfo(self.x.dtype).eps  # the peers' products are 16-bit
        bound = _SUM_ERROR * magnitudes + rounded * expected.abs()
        expected[0, 0] = 0

        def wrong(got: Any) -> str:
            got[0, 0] = 0
            return elements_beyond(got, expected, bound)

        return wrong


def triton_kernels() -> Any:
    """torch's own kernels for BSR. Raises ImportError or AttributeError where Triton is missing."""
    return importlib.import_module("torch.sparse._triton_ops")


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
