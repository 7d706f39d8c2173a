"""`python3 dev.py bench blocks`: Y = A X, A in blocks (BSR), beside the dense product of cuBLAS.

Blocks are chosen at random, their elements are N(0, 1); 16-bit operands, a float32 result. The peer
multiplies the same matrix, zeros included: its time says from which sparsity on blocks pay. Results
are compared with float64 before they count.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

import tilewright as tw
from bench.gemm import check
from bench.harness import Contender, Row, base_row, compare, require_torch
from tilewright.errors import ArgumentError
from tilewright.ops import bsr_spmm


def blocks_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=4096, metavar="N", help="of A and X, square")
    parser.add_argument("--block", type=int, nargs="+", default=[32], metavar="N")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95], metavar="S")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")


def blocks(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for each block size and sparsity: the dense product, then ours."""
    if odd := [b for b in args.block if args.size % b]:
        rule = f"size {args.size} is no multiple of {odd}"
        raise ArgumentError("A109", rule, where="--size", hint="choose a multiple of each block")
    torch = require_torch()
    torch.manual_seed(0)
    x = torch.randn(args.size, args.size, device="cuda").to(getattr(torch, args.dtype))
    for block in args.block:
        for sparsity in args.sparsity:
            matrix = random_blocks(args.size, block, sparsity)
            packed = tw.bsr(block).pack(matrix, dtype=args.dtype).to("cuda")
            dense = torch.from_numpy(matrix).cuda().to(x.dtype)
            base = base_row("blocks", "spmm.bsr", "cuda") | {
                "input": f"{args.size} bsr({block}) {sparsity:g}", "width": args.size,
                "dtype": args.dtype, "sparsity": float((matrix == 0).mean()),
            }  # fmt: skip
            work = 2.0 * np.count_nonzero(matrix) * args.size
            yield from compare(base, [_dense(dense, x), _ours(packed, x)], check(dense, x), work)


def random_blocks(size: int, block: int, sparsity: float) -> np.ndarray:
    """A float32 matrix with the nearest number of random blocks that are not 0."""
    rng = np.random.default_rng(11)
    across = size // block
    kept = np.zeros(across * across, bool)
    kept[rng.permutation(len(kept))[: round(len(kept) * (1 - sparsity))]] = True
    mask = np.repeat(np.repeat(kept.reshape(across, across), block, 0), block, 1)
    return np.where(mask, rng.standard_normal((size, size), np.float32), np.float32(0))


def _ours(packed: Any, x: Any) -> Contender:
    torch = require_torch()
    out = torch.full(x.shape, float("nan"), device="cuda")
    run = lambda: bsr_spmm(packed, x, out)  # noqa: E731
    return Contender("tilewright bsr_spmm", run, lambda y: y, is_ours=True, is_default=True)


def _dense(dense: Any, x: Any) -> Contender:
    torch = require_torch()
    out = torch.empty_like(x)
    return Contender("torch mm, dense", lambda: torch.mm(dense, x, out=out), lambda y: y)
