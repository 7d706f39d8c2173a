"""Host time of attention, a part of `bench host`.

A bound run, plans of 256 requests, and the kernels that a Llama configuration needs, compiled
(cold) and taken from the cache (cached). Calls and plans are those of one query a request; the
caches are small, so that on a GPU the queue does not fill, and on a CPU little but the call is
left. The kernels are those of a server: decode with its planner, prefill, and the merge of states;
bfloat16, 32/8 heads × 128, pages of 16, causal.
"""

from __future__ import annotations

import statistics
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import tilewright as tw
from bench.harness import Row

_REPEATS, _BUILDS = 7, 3

# The first argument is the device. What is compiled is counted: cubins, or shared libraries.
_LLAMA = """
import json, sys, time
import numpy as np
import tilewright as tw
from tilewright.toolchain import disk_cache
device, requests, page = sys.argv[1], 4, 16
lengths = np.full(requests, 512, np.int32)
indptr = np.arange(requests + 1, dtype=np.int32) * 32
pages = np.arange(requests * 32, dtype=np.int32)
if device == "cuda":
    import torch
    to = lambda x: torch.from_numpy(x).cuda()
    empty = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
else:
    import ml_dtypes
    to, empty = lambda x: x, lambda *shape: np.zeros(shape, ml_dtypes.bfloat16)
table = tw.Table.csr(to(lengths), to(indptr), to(pages))
kv = tw.KV(table, tw.Pool(empty(requests * 32, 2, page, 8, 128)))
attn = tw.Attention(32, 8, 128)
q = empty(requests * 32, 32, 128)
disk_cache.stats.compiled = 0
began = time.perf_counter()
rows = np.arange(requests + 1, dtype=np.int32)
if device == "cuda":
    room = attn.reserve(requests, kv=kv)
    room.plan(table)
    one = attn.bind(q[:requests], kv, plan=room)()
else:
    one = attn.run(q[:requests], kv, attn.plan(rows, kv))
states = [attn.run(q, kv, attn.plan(rows * 32, kv)) for _ in range(2)]
tw.merge(states)
if device == "cuda":
    torch.cuda.synchronize()
print(json.dumps({"time": time.perf_counter() - began, "compiled": disk_cache.stats.compiled}))
"""


def attention(targets: tuple[str, ...], folder: Path, child: Any, row: Any) -> Iterator[Row]:
    """Rows in µs and ms. `child` and `row` are those of `bench.host`."""
    for target in targets:
        yield from _calls(target, row)
        results: dict[str, list[float]] = {"cold": [], "cached": []}
        for turn in range(_BUILDS):
            device = "cuda" if target == "cuda" else "cpu"
            cold, cached = (
                child(_LLAMA, folder, f"llama-{device}-{turn}", device) for _ in range(2)
            )
            if not cold["compiled"] or cached["compiled"]:
                raise SystemExit(f"{cold['compiled']} and {cached['compiled']} kernels compiled")
            results["cold"].append(cold["time"])
            results["cached"].append(cached["time"])
        for state, times in results.items():
            ms = 1e3 * statistics.median(times)
            yield row("attention.llama", target, f"tilewright {state}", ms, "ms", 128)


def _calls(target: str, row: Any) -> Iterator[Row]:
    from bench.host import _per_call

    rng = np.random.default_rng(0)
    kv, q, plan = _small(target, 4)
    attn = tw.Attention(32, 8, 128)
    bound = attn.bind(q, kv, plan=plan(attn))
    many, _, _ = _small(target, 256)
    rows, lengths = np.arange(257, dtype=np.int32), rng.integers(1, 4096, 256).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(-(-lengths // 16))]).astype(np.int32)
    pages = np.arange(indptr[-1], dtype=np.int32) % 256  # nothing reads them

    def host_plan() -> None:
        attn.plan(rows, tw.KV(tw.Table.csr(lengths, indptr, pages), many.pool))

    ways: dict[str, Callable[[], Any]] = {"bound run, 4 requests": bound}
    if target == "cpp":
        kv256 = tw.KV(tw.Table.csr(lengths, indptr, pages), many.pool)
        ways |= {
            "plan, 256 requests": lambda: attn.plan(rows, kv256),
            "table, KV and plan, 256 requests": host_plan,
        }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, run in ways.items():
            samples[name].append(_per_call(run, target))
    for name, times in samples.items():
        yield row("attention.host", target, name, 1e6 * statistics.median(times), "us", 128)
    yield row("attention.host", target, "bytes kept by 100 bound runs", _kept(bound), "bytes", 128)


def _kept(run: Callable[[], Any]) -> int:
    """Bytes of Python's heap that 100 calls leave behind, after some that fill caches: the least of
    three times, since other threads may allocate meanwhile."""
    for _ in range(10):
        run()
    tracemalloc.start()
    kept = []
    for _ in range(3):
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            run()
        kept.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    return max(0, min(kept))


def _small(target: str, requests: int) -> tuple[Any, Any, Callable[[Any], Any]]:
    """A cache of one page a request with one key, queries, and what makes a plan or workspace."""
    lengths, rows = np.ones(requests, np.int32), np.arange(requests + 1, dtype=np.int32)
    pages = np.arange(requests, dtype=np.int32)
    if target == "cuda":
        import torch

        cache = torch.randn(requests, 2, 16, 8, 128, device="cuda").bfloat16()
        q: Any = torch.randn(requests, 32, 128, device="cuda").bfloat16()
        table = tw.Table.csr(*(torch.from_numpy(x).cuda() for x in (lengths, rows, pages)))
    else:
        import ml_dtypes

        rng = np.random.default_rng(0)
        cache = rng.standard_normal((requests, 2, 16, 8, 128)).astype(ml_dtypes.bfloat16)
        q = rng.standard_normal((requests, 32, 128)).astype(ml_dtypes.bfloat16)
        table = tw.Table.csr(lengths, rows, pages)
    kv = tw.KV(table, tw.Pool(cache))

    def plan(attn: Any) -> Any:
        if target != "cuda":
            return attn.plan(rows, kv)
        room = attn.reserve(requests, kv=kv)
        room.plan(table)
        return room

    return kv, q, plan
