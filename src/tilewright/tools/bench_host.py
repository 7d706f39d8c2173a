"""`tilewright bench host`: what a call, an import and a build cost apart from the kernel's work.

Calls run on a matrix so small that its kernel takes next to nothing; builds run in a cache folder
of their own, empty (cold), then filled (cached), so that neither touches the user's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tilewright import knobs
from tilewright.errors import TilewrightError
from tilewright.runtime import cache, cuda, native, nvrtc
from tilewright.sparse import formats
from tilewright.tools.bench import Row, base_row, note

_CALLS, _REPEATS, _IMPORTS, _BUILDS = 2000, 7, 5, 3
_WIDTH = 32

_IMPORT = """
import time
import numpy
began = time.perf_counter()
import tilewright
print(time.perf_counter() - began)
"""


def host_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        default="",
        metavar="SM",
        help="CUDA architecture to build for (default: this GPU's, else sm_90a)",
    )


def host(args: argparse.Namespace) -> Iterator[Row]:
    """Rows in µs (calls) and ms (import, builds)."""
    yield from _imports()
    yield from _calls("cpp")
    if cuda.available():
        yield from _calls("cuda")
    yield from _builds("cpp")
    if nvrtc.available():
        arch = args.arch or (cuda.device_arch() if cuda.available() else "sm_90a")
        yield from _builds(f"cuda:{arch}")
    else:
        note("CUDA builds left out: NVRTC is not installed (pip install 'tilewright[cuda]')")


def _row(op: str, target: str, impl: str, value: float, metric: str) -> Row:
    ms = value if metric == "ms" else value / 1e3
    base = base_row("host", op, "cpp" if target.startswith("cuda:") else target)
    return base | {
        "target": target, "input": op, "width": _WIDTH, "dtype": "float32", "impl": impl,
        "ms": ms, "metric": metric, "value": value, "ratio": None,
    }  # fmt: skip


def _imports() -> Iterator[Row]:
    times = []
    for _ in range(_IMPORTS):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True, timeout=120
        )
        times.append(float(done.stdout) * 1e3)
    yield _row("import", "cpp", "tilewright, after numpy", statistics.median(times), "ms")


# ---------------------------------------------------------------------------- calls


def _calls(target: str) -> Iterator[Row]:
    """Host time of one call: what the thread that calls is busy with."""
    from tilewright import ops
    from tilewright.ops.spmm import spmm_program
    from tilewright.tools.bench_peers import place

    rng = np.random.default_rng(3)
    dense = rng.standard_normal((16, 16), np.float32) * (rng.random((16, 16)) < 0.2)
    a = formats.csr().pack(dense)
    x = place(rng.standard_normal((16, _WIDTH), np.float32), "float32", target)
    out = place(np.zeros((16, _WIDTH), np.float32), "float32", target)
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
    for name, found in samples.items():
        yield _row("host.call", target, name, 1e6 * statistics.median(found), "us")


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


def _builds(target: str) -> Iterator[Row]:
    """SpMM on CSR and on hyb: compiled anew, and found in the cache. The compilers are warm."""
    from tilewright.ops import spmm as operator

    made = {"csr": formats.csr(), "hyb": formats.hyb()}
    scheduled = getattr(operator, "recipe", None)
    with tempfile.TemporaryDirectory() as folder:
        with knobs.scope(cache_dir=Path(folder) / "warm"):
            _warm(target)
        for name, fmt in made.items():
            found: dict[str, list[float]] = {"cold": [], "cached": []}
            for turn in range(_BUILDS):
                with knobs.scope(cache_dir=Path(folder) / f"{name}{turn}"):
                    for state, times in found.items():
                        times.append(
                            _build_ms(_definition(fmt, scheduled), target, state == "cold")
                        )
            for state, times in found.items():
                yield _row(
                    f"build.{name}", target, f"tilewright {state}", statistics.median(times), "ms"
                )


def _definition(fmt: Any, scheduled: Callable[[Any], Any] | None) -> Any:
    """The operator's own program with its own recipe, for one width."""
    from tilewright.ops.spmm import spmm_program

    made = spmm_program.decompose(A=fmt)
    if scheduled is None:
        return made
    return made.schedule(lambda s: scheduled(s.specialize("d", _WIDTH)))


def _build_ms(definition: Any, target: str, is_cold: bool) -> float:
    compiled = cache.stats.compiled
    began = time.perf_counter()
    definition.build(target)
    elapsed = 1e3 * (time.perf_counter() - began)
    if (cache.stats.compiled > compiled) != is_cold:
        note(f"a {'cold' if is_cold else 'cached'} build for {target} met the other kind of cache")
    return elapsed


def _warm(target: str) -> None:
    """Load what a first compilation loads: NVRTC, or the version of the C++ compiler."""
    try:
        if target.startswith("cuda"):
            nvrtc.compile_cuda('extern "C" __global__ void k() {}', arch=target.partition(":")[2])
        else:
            native.compile_cpp('extern "C" void k() {}')
    except TilewrightError as error:
        note(f"{target}: {error.message}")
