"""`python3 dev.py bench gemm`: C = A B on a GPU, beside torch, which calls cuBLAS.

Ours is the call as a user writes it, `ops.gemm(A, B, out)`: 16-bit operands, a float32 result.
torch writes a result of the operands' type and, where it can, one of float32. Results are compared
with float64 before they count. `--relu`: max(A B + b, 0) too, by the same schedule; the peer is
cuBLASLt with the same epilogue. Its row of ours says by what share of the time of A B it is longer.
`--weights N`: N matrices B in turn, so that rows of A times a large B are not read from the L2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import tilewright as tw
from bench.harness import (
    Contender,
    Row,
    base_row,
    compare,
    elements_beyond,
    measure,
    require_torch,
)  # fmt: skip
from tilewright.ops import gemm as ours
from tilewright.ops.gemm import recipe, tile_of

SIZES = (
    (4096, 4096, 4096), (8192, 8192, 8192), (2048, 2048, 2048), (1024, 1024, 1024),
    (512, 4096, 4096), (128, 4096, 4096), (16, 4096, 4096), (1, 4096, 4096),
)  # fmt: skip
_SUM_ERROR = 2.0**-18  # of a sum in float32, relative to that of the magnitudes


@tw.program
def biased_gemm(A=tw.dense("m k"), B=tw.dense("k n"), D=tw.dense("n")):  # noqa: ANN001, ANN201
    i, j, k = tw.indices("i:m j:n k:k")
    y = tw.sum(A[i, k] * B[k, j], over=k) + D[j].cast("float32")
    return tw.out.typed("float32")[i, j](tw.maximum(y, 0.0))


def gemm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=int, nargs=3, action="append", metavar="N", help="m, n and k; several times"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--relu", action="store_true", help="max(A B + b, 0) as well")
    parser.add_argument(
        "--weights", type=int, default=1, metavar="N", help="matrices B that calls take in turn"
    )


def gemm(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for each size: torch's, then ours."""
    torch = require_torch()
    torch.manual_seed(0)
    for m, n, k in args.size or SIZES:
        a, bias, *bs = (
            torch.randn(*shape, device="cuda").to(getattr(torch, args.dtype))
            for shape in ((m, k), (n,), *[(k, n)] * args.weights)
        )
        base = base_row("gemm", "gemm", "cuda") | {
            "input": f"{m} x {n} x {k}", "width": n, "dtype": args.dtype,
        }  # fmt: skip
        work = 2.0 * m * n * k
        yield from compare(base, [*_peers(a, bs), _ours(a, bs)], check(a, bs[0]), work)
        if args.relu:
            base |= {"op": "gemm.relu", "input": f"{base['input']} relu"}
            mine = _relu_ours(a, bs, bias)
            rows = compare(base, [_relu_peer(a, bs, bias), mine], check(a, bs[0], bias), work)
            *peers, row = rows
            if row["impl"] != mine.impl:  # a wrong result is the first row, and is not timed
                yield from rows
                continue
            times = measure([_ours(a, bs), mine], on_gpu=True)  # in turns
            before, after = (t.graph_ms or t.ms for t in times.values())
            yield from (*peers, row | {"longer": after / before - 1})


def _ours(a: Any, bs: list[Any]) -> Contender:
    torch, b = require_torch(), cycle(bs)
    out = torch.full((a.shape[0], bs[0].shape[1]), float("nan"), device="cuda")
    run = lambda: ours(a, next(b), out)  # noqa: E731
    return Contender("tilewright gemm", run, lambda y: y, is_ours=True, is_default=True)


def _relu_ours(a: Any, bs: list[Any], bias: Any) -> Contender:
    torch, b = require_torch(), cycle(bs)
    (k, n), dtype = bs[0].shape, str(a.dtype)[6:]
    kernel = relu_definition(dtype, a.shape[0], n, k).build("cuda")
    out = torch.full((a.shape[0], n), float("nan"), device="cuda")
    run = lambda: kernel(a, next(b), bias, out=out)  # noqa: E731
    return Contender("tilewright bias + ReLU", run, lambda y: y, is_ours=True, is_default=True)


def relu_definition(dtype: str, m: int, n: int, k: int) -> tw.Definition:
    """The program of max(A B + b, 0) with the schedule that `ops.gemm` gives A B."""
    typed = biased_gemm.typed(A=dtype, B=dtype, D=dtype)
    return typed.schedule(recipe.of(n=n, k=k, tile=tile_of(m, n)))


def _relu_peer(a: Any, bs: list[Any], bias: Any) -> Contender:
    torch, b = require_torch(), cycle(bs)
    run = lambda: torch._addmm_activation(bias, a, next(b))  # noqa: E731
    return Contender("torch, cuBLASLt's epilogue", run, lambda y: y)


def _peers(a: Any, bs: list[Any]) -> Iterator[Contender]:
    torch, b = require_torch(), cycle(bs)
    out = torch.empty(a.shape[0], bs[0].shape[1], dtype=a.dtype, device="cuda")
    run = lambda: torch.mm(a, next(b), out=out)  # noqa: E731
    yield Contender(f"torch mm to {str(a.dtype)[6:]}", run, lambda y: y)
    try:
        torch.mm(a[:1], bs[0], out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # older than torch 2.8
        return
    wide = cycle(bs)
    run = lambda: torch.mm(a, next(wide), out_dtype=torch.float32)  # noqa: E731
    yield Contender("torch mm to float32", run, lambda y: y)


def check(a: Any, b: Any, bias: Any = None) -> Callable[[Any], str]:
    """What is wrong with a product, or max(A B + bias, 0): elements further from float64 than
    rounding explains."""
    torch = require_torch()
    expected = a.double() @ b.double()
    magnitudes = a.double().abs() @ b.double().abs()
    if bias is not None:
        expected = (expected + bias.double()).relu()
        magnitudes += bias.double().abs()

    def wrong(got: Any) -> str:
        bound = _SUM_ERROR * magnitudes + torch.finfo(got.dtype).eps * expected.abs()
        return elements_beyond(got, expected, bound)

    return wrong
