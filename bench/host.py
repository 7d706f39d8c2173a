"""`bench host`: the cost of a call, an import and a build, without the kernel's work.

Calls run on a matrix so small that its kernel takes next to nothing. Imports and builds run in
processes of their own, with Tilewright's byte code in place as an installation leaves it, and in
cache folders of their own, so that nothing touches the user's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import host_attention
from bench.harness import Row, base_row, note
from tilewright.runtime import cuda
from tilewright.sparse import formats
from tilewright.toolchain import nvrtc

_CALLS, _REPEATS, _IMPORTS, _BUILDS = 2000, 7, 5, 3
_WIDTH = 32

_SIZES = {"csr": ("csr", _WIDTH), "hyb": ("hyb", _WIDTH), "hyb.any": ("hyb", 0)}  # 0: any width
_TILES = {"flash": ("flash", 128)}  # tile programs, built for a GPU; the width is head_dim
_LESSON = Path(__file__).resolve().parents[1] / "examples" / "09_flash_attention.py"
_PARTS = ("import", "call", "build", "attention")

_IMPORT = """
import json, time
import numpy
began = time.perf_counter()
import tilewright
print(json.dumps(time.perf_counter() - began))
"""

# Cached once a machine: the version of the C++ compiler.
_ONCE = """
import json
from tilewright.toolchain import compilers
print(json.dumps(compilers.has_compiler()))
"""

# The operator's own program and recipe, or lesson 9's, built, and built again.
_BUILD = """
import json, runpy, sys, time
import tilewright as tw
from tilewright.ops.spmm import recipe, spmm_program
from tilewright.toolchain import disk_cache
target, fmt, width, lesson = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
times = []
for _ in range(2):
    if fmt == "flash":
        flash = runpy.run_path(lesson, run_name="lesson")
        scheduled = flash["attention"](4, True).typed(Q="bfloat16", K="bfloat16", V="bfloat16")
        scheduled = scheduled.schedule(lambda s: flash["tiles"](s, 32, 4, width))
    else:
        scheduled = spmm_program.decompose(A=getattr(tw, fmt)())
        scheduled = scheduled.schedule(recipe.of(width=width))
    began = time.perf_counter()
    scheduled.build(target)
    times.append(time.perf_counter() - began)
print(json.dumps({"times": times, "compiled": disk_cache.stats.compiled}))
"""


def host_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        default="",
        metavar="SM",
        help="CUDA architecture to build for (default: this GPU's, else sm_90a)",
    )
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS, help="what to measure")
    parser.add_argument("--target", choices=("cpp", "cuda"), help="calls and builds of one target")


def host(args: argparse.Namespace) -> Iterator[Row]:
    """Rows in µs (calls) and ms (import, builds)."""
    targets = ("cpp", "cuda") if args.target is None else (args.target,)
    with tempfile.TemporaryDirectory() as folder:
        if "import" in args.only:
            yield from _imports(Path(folder))
    if "call" in args.only and "cpp" in targets:
        yield from _calls("cpp")
    if "call" in args.only and "cuda" in targets and cuda.available():
        yield from _calls("cuda")
    with tempfile.TemporaryDirectory() as folder:
        if "attention" in args.only:
            here = tuple(t for t in targets if t == "cpp" or cuda.available())
            yield from host_attention.attention(here, Path(folder), _child, _row)
    with tempfile.TemporaryDirectory() as folder:
        if "build" in args.only and "cpp" in targets:
            yield from _builds("cpp", Path(folder))
        if "build" not in args.only or "cuda" not in targets:
            return
        if nvrtc.available():
            arch = args.arch or (cuda.device().arch if cuda.available() else "sm_90a")
            yield from _builds(f"cuda:{arch}", Path(folder))
        else:
            note("CUDA builds left out: NVRTC is not installed (pip install 'tilewright[cuda]')")


def _row(op: str, target: str, impl: str, value: float, metric: str, width: int = _WIDTH) -> Row:
    ms = value if metric == "ms" else value / 1e3
    base = base_row("host", op, "cpp" if target.startswith("cuda:") else target)
    return base | {
        "target": target, "input": op, "width": width, "dtype": "float32", "impl": impl,
        "ms": ms, "metric": metric, "value": value, "ratio": None,
    }  # fmt: skip


def _child(code: str, folder: Path, cache_dir: str, *args: str) -> Any:
    """The JSON that a fresh process prints. `folder` keeps byte code for the later processes, also
    where none is written beside the sources."""
    own = {
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        "TILEWRIGHT_CACHE_DIR": str(folder / cache_dir),
        "TILEWRIGHT_CACHE": "1", "TILEWRIGHT_VERIFY": "0", "TILEWRIGHT_DEBUG": "0",
    }  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | own
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True, encoding="utf-8", check=True, timeout=300, env=env,
    )  # fmt: skip
    return json.loads(done.stdout)


def _imports(folder: Path) -> Iterator[Row]:
    _child(_IMPORT, folder, "cache")  # writes the byte code
    times = [_child(_IMPORT, folder, "cache") * 1e3 for _ in range(_IMPORTS)]
    yield _row("import", "cpp", "tilewright, after numpy", statistics.median(times), "ms")


# ---------------------------------------------------------------------------- calls


def _calls(target: str) -> Iterator[Row]:
    """Host time of one call: that of the calling thread."""
    from bench.peers import to_target
    from tilewright import ops
    from tilewright.ops.spmm import spmm_program

    rng = np.random.default_rng(3)
    dense = rng.standard_normal((16, 16), np.float32) * (rng.random((16, 16)) < 0.2)
    a = formats.csr().pack(dense)
    x = to_target(rng.standard_normal((16, _WIDTH), np.float32), "float32", target)
    out = to_target(np.zeros((16, _WIDTH), np.float32), "float32", target)
    if target == "cuda":
        a = a.to("cuda")
    kernel = spmm_program.build(target)
    bound = kernel.bind(a, x, out=out)
    ways: dict[str, Callable[[], Any]] = {
        "tilewright bound": bound,
        "tilewright kernel, out=": lambda: kernel(a, x, out=out),
        "tilewright kernel": lambda: kernel(a, x),
        "tilewright ops.spmm": lambda: ops.spmm(a, x),
    }
    ways |= _peer_calls(dense, x, target)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, run in ways.items():
            samples[name].append(_per_call(run, target))
    for name, times in samples.items():
        yield _row("host.call", target, name, 1e6 * statistics.median(times), "us")


def _peer_calls(dense: np.ndarray, x: Any, target: str) -> dict[str, Callable[[], Any]]:
    try:
        if target == "cpp":
            import scipy.sparse

            a = scipy.sparse.csr_matrix(dense)
            return {"scipy csr @ X": lambda: a @ x}
        import warnings

        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its own CSR a beta
            sparse = torch.from_numpy(dense).cuda().to_sparse_csr()
        return {"torch csr @ X": lambda: torch.sparse.mm(sparse, x)}
    except ImportError:
        return {}


def _per_call(run: Callable[[], Any], target: str) -> float:
    """Seconds of host time of a call; on a GPU the queue is emptied before it can fill."""
    run()
    if target != "cuda":
        began = time.perf_counter()
        for _ in range(_CALLS):
            run()
        return (time.perf_counter() - began) / _CALLS
    import torch

    total, batch = 0.0, 100
    for _ in range(_CALLS // batch):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(batch):
            run()
        total += time.perf_counter() - began
    torch.cuda.synchronize()
    return total / (_CALLS // batch * batch)


# ---------------------------------------------------------------------------- builds


def _builds(target: str, folder: Path) -> Iterator[Row]:
    """SpMM, and on a GPU flash attention, in processes of their own: compiled (cold, with the time
    to load the compiler), taken from the cache by the next process (cached), and once more there
    (again)."""
    kind = target.partition(":")[0]
    _child(_ONCE, folder, f"{kind}-once")
    lesson = str(_LESSON)
    _child(
        _BUILD, folder, f"{kind}-first", target, "csr", "0", lesson
    )  # byte code; NVRTC in memory
    for name, (fmt, width) in (_SIZES | (_TILES if kind == "cuda" else {})).items():
        results: dict[str, list[float]] = {"cold": [], "cached": [], "again": []}
        for turn in range(_BUILDS):
            cache_dir = f"{kind}-{name}-{turn}"
            shutil.copytree(folder / f"{kind}-once", folder / cache_dir)
            cold, cached = (
                _child(_BUILD, folder, cache_dir, target, fmt, str(width), lesson) for _ in range(2)
            )
            if cold["compiled"] != 1 or cached["compiled"] != 0:
                note(f"builds of {name} for {target} had another kind of cache")
            results["cold"].append(cold["times"][0])
            results["cached"].append(cached["times"][0])
            results["again"].append(cached["times"][1])
        for state, times in results.items():
            ms = 1e3 * statistics.median(times)
            yield _row(f"build.{name}", target, f"tilewright {state}", ms, "ms", width)
