"""`python3 dev.py bench gemm`: C = A B on a GPU, beside torch, which calls cuBLAS.

Ours is the call as a user writes it, `ops.gemm(A, B, out)`: 16-bit operands, a float32 result.
torch writes a result of the operands' type and, where it can, one of float32. Results are compared
with float64 before they count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from bench.harness import Contender, Row, base_row, compare, elements_beyond, require_torch
from tilewright.ops import gemm as ours

SIZES = (
    (4096, 4096, 4096), (8192, 8192, 8192), (2048, 2048, 2048), (1024, 1024, 1024),
    (512, 4096, 4096), (128, 4096, 4096), (16, 4096, 4096), (1, 4096, 4096),
)  # fmt: skip
_SUM_ERROR = 2.0**-18  # of a sum in float32, relative to that of the magnitudes


def gemm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=int, nargs=3, action="append", metavar="N", help="m, n and k; several times"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")


def gemm(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for each size: torch's, then ours."""
    torch = require_torch()
    torch.manual_seed(0)
    for m, n, k in args.size or SIZES:
        a, b = (
            torch.randn(*shape, device="cuda").to(getattr(torch, args.dtype))
            for shape in ((m, k), (k, n))
        )
        base = base_row("gemm", "gemm", "cuda") | {
            "input": f"{m} x {n} x {k}", "width": n, "dtype": args.dtype,
        }  # fmt: skip
        contenders = [*_peers(a, b), _ours(a, b)]
        yield from compare(base, contenders, check(a, b), 2.0 * m * n * k)


def _ours(a: Any, b: Any) -> Contender:
    torch = require_torch()
    out = torch.full((a.shape[0], b.shape[1]), float("nan"), device="cuda")
    run = lambda: ours(a, b, out)  # noqa: E731
    return Contender("tilewright gemm", run, lambda y: y, is_ours=True, is_default=True)


def _peers(a: Any, b: Any) -> Iterator[Contender]:
    torch = require_torch()
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device="cuda")
    yield Contender(f"torch mm to {str(a.dtype)[6:]}", lambda: torch.mm(a, b, out=out), lambda y: y)
    try:
        torch.mm(a[:1], b, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # older than torch 2.8
        return
    run = lambda: torch.mm(a, b, out_dtype=torch.float32)  # noqa: E731
    yield Contender("torch mm to float32", run, lambda y: y)


def check(a: Any, b: Any) -> Callable[[Any], str]:
    """What is wrong with a product: elements further from float64 than rounding explains."""
    torch = require_torch()
    expected = a.double() @ b.double()
    magnitudes = a.double().abs() @ b.double().abs()

    def wrong(got: Any) -> str:
        bound = _SUM_ERROR * magnitudes + torch.finfo(got.dtype).eps * expected.abs()
        return elements_beyond(got, expected, bound)

    return wrong
