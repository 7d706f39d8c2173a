"""Each kernel of a GPU again and again: the same bits, and a short program for compute-sanitizer.

    python -m tests.attention.repeats                     # 1000 times each
    compute-sanitizer --tool racecheck python -m tests.attention.repeats --times 2 --only hopper

A call's outputs are poisoned before each run. The first run of a case is compared with float64 by
the tests that have the same cases; here only its bits count. Compile first (any run does): under
compute-sanitizer the compiler would take most of the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from tests.attention import test_decode_cuda, test_flash_tiles
from tests.attention.cases import ALL_VARIANTS, TYPES, paged, queries, values_of
from tests.attention.oracle import attention_of, draw_levels
from tests.attention.test_cascade import cascade, on_gpu
from tests.attention.test_flash_cuda import _bits
from tests.attention.test_hopper_cuda import BATCH, CASES, ragged, to_card
from tests.attention.test_hopper_shapes_cuda import FEW

from tilewright.attention import families
from tilewright.attention.batch import Attention
from tilewright.attention.families import hopper, portable
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.runtime.cuda import DeviceArray

Case = tuple[str, Any, np.ndarray]  # name, what binds it to outputs, and what these hold before
LONG = [(200, 700), (1, 0), (1, 127), (2, 129), (1, 3000), (130, 130), (1, 20011), (0, 5), (40, 40)]
TILES = [(2, 0), (1, 1), (31, 31), (40, 32), (64, 65), (0, 500), (300, 1300), (20, 7)]
SHORT = [(1, n) for n in (0, 1, 15, 16, 17, 64, 127, 1000, 2111, 5)]


def there(x: np.ndarray) -> DeviceArray:
    return DeviceArray.from_numpy(_bits(x), x.dtype.name)


def case_of(rng: np.random.Generator, shape: tuple[Any, ...], batch: list[Any]) -> Any:
    """What binds a batch of (queries, keys) to outputs. `page_size` 0: ragged keys."""
    group, kv_heads, dims, kind, variant, page_size = shape
    dim, dim_vo = dims_of(dims)
    attn = Attention(group * kv_heads, kv_heads, dim, ALL_VARIANTS[variant], head_dim_vo=dim_vo)
    keys, wide = [n for _, n in batch], max(dim, dim_vo)
    if page_size > 0:
        kv = paged(rng, keys, (page_size, kv_heads, wide), TYPES[kind])
    else:
        kv = ragged(rng, keys, kv_heads, wide, TYPES[kind])
    k, v = (
        np.ascontiguousarray(x[..., :n]) for x, n in zip(kv.pool.arrays, dims_of(dims), strict=True)
    )
    kv = to_card(KV(kv.table, Pool(k, v)))
    q, indptr = queries(rng, [n for n, _ in batch], group * kv_heads, dim, TYPES[kind])
    values = values_of(rng, attn.variant, group * kv_heads, kv_heads)
    on_card: dict[str, Any] = {name: there(np.asarray(x)) for name, x in values.items()}
    q_there, plan = there(q), attn.plan(indptr, kv, q_dtype=kind)

    def bind(out: DeviceArray) -> Any:
        return attn.bind(q_there, kv, out, plan=plan, **on_card)

    return bind, np.full((*q.shape[:2], dim_vo), np.nan, q.dtype)


def dims_of(dims: Any) -> tuple[int, int]:
    return dims if isinstance(dims, tuple) else (dims, dims)


def cases(only: list[str], rng: np.random.Generator) -> Iterator[Case]:
    """The kinds of `only`: wide and narrow items of the Hopper family, tiles, decode, and levels of
    shared keys, with the launches in front of theirs."""
    if "hopper" in only:
        for case in CASES:
            yield f"hopper {case}", *case_of(rng, case, BATCH)
    if "narrow" in only:
        for *case, _ in FEW:
            yield f"narrow {case}", *case_of(rng, tuple(case), LONG)
    if "decode" in only:
        for shape in test_decode_cuda.SHAPES:
            yield f"decode {shape}", *case_of(rng, (*shape, 16), SHORT)
    if "tiles" in only:
        for group, *dims, kind, variant in test_flash_tiles.SHAPES:
            shape = (group, 2, tuple(dims), kind, variant, 16)
            with mock.patch.object(families, "FAMILIES", (portable.TILES,)):
                bind, poison = case_of(rng, shape, TILES)
            yield f"tiles {shape}", bind, poison
    if "shared" in only:
        for depth, most, keys in ((1, 2, 900), (2, 2, 900), (1, 60, 900), (1, 2, 9000)):
            yield f"shared {depth} levels, {most} queries", *_shared(rng, depth, most, keys)


def _shared(rng: np.random.Generator, depth: int, most: int, keys: int) -> Any:
    requests = 16
    shared = [x.tolist() for x in draw_levels(rng, requests, depth)]
    nodes = requests + sum(len(x) - 1 for x in shared)
    lengths = [int(n) for n in rng.integers(keys // 2, keys, nodes)]
    counts = [int(n) for n in rng.integers(1, most, requests)]
    shape = (4, 2, 128, TYPES["bfloat16"], "causal", "scores", "")
    case = cascade(rng, shape, counts, shared, lengths)
    kv, q, arrays = on_gpu(case)
    attn = attention_of(case)
    plan = attn.plan(case.qo_indptr, kv)

    def bind(out: DeviceArray) -> Any:
        return attn.bind(q, kv, out, plan=plan, **arrays)

    return bind, np.full(case.q.shape, np.nan, case.q.dtype)


def repeat(case: Case, times: int) -> int:
    """How many of the runs after the first have other bits in o or lse."""
    _, bind, poison = case
    out = there(poison)
    bound = bind(out)
    first, wrong = None, 0
    for _ in range(times):
        out.copy_from(_bits(poison))
        bound()
        found = out.to_numpy().tobytes() + bound.state.lse.to_numpy().tobytes()
        first = found if first is None else first
        wrong += found != first
    return wrong


def main() -> int:
    kinds = ["hopper", "narrow", "decode", "tiles", "shared"]
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.times < 1:
        parser.error("--times: at least 1")
    failed = count = 0
    for case in cases(args.only, np.random.default_rng(args.seed)):
        began = time.perf_counter()
        wrong = repeat(case, args.times)
        failed, count = failed + bool(wrong), count + 1
        print(f"{case[0]}: {wrong} of {args.times} differ, {time.perf_counter() - began:.1f} s")
        sys.stdout.flush()
    print(f"{count} kinds, {failed} with other bits; the family of Hopper: {hopper.ARCH}")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
