"""The CPU's thread pool, seen from Python: a list of launches runs as one native call."""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tilewright import knobs
from tilewright.runtime.layout import Struct
from tilewright.toolchain import cxx

LAUNCH = Struct(
    "tw_launch",
    [
        ("body", "ptr"), ("params", "ptr", "const void*"),
        ("units", "int64"), ("grain", "int64"), ("guided", "int64"),
    ],
)  # fmt: skip
"""One launch: `body(params, begin, end)` over `units` parallel units, `grain` of them at a time. A
`guided` launch, for units of about equal work, takes more at first and fewer towards the end."""

Launch = tuple[int, int, int, int, bool]
"""The address of a body, that of its parameters, units, grain, and whether it is guided."""

SPIN_US = 100
"""How long an idle thread spins before it sleeps: as long as the gap between two decode steps of a
small model. A shorter time would cost a wake-up (5–50 µs) in each gap, a longer one electricity."""

_MAX_THREADS = 4096
_lock = threading.Lock()
_pools: list["Pool"] = []


class Pool:
    """The pool of this process. `run(address, n)` runs `n` consecutive `tw_launch` at `address`.

    Calls release the GIL; calls from several threads take turns. Threads start at the first large
    launch, also in a forked child.
    """

    __slots__ = ("_configure", "_threads", "library", "run")

    def __init__(self) -> None:
        source = LAUNCH.c_decl + Path(__file__).with_name("pool.cpp").read_text(encoding="utf-8")
        # The pool gains nothing from wide vectors, so one build serves every CPU of the family.
        self.library = cxx.load_cpp(
            "#include <stdint.h>\n" + source, name="thread pool", isa="baseline", full_link=True
        )
        self.run = self.library.tw_pool_run
        self.run.argtypes, self.run.restype = [ctypes.c_void_p, ctypes.c_int64], None
        self._configure = self.library.tw_pool_configure
        self._configure.argtypes, self._configure.restype = [ctypes.c_int64] * 3, None
        self.library.tw_pool_threads.restype = ctypes.c_int64
        self._threads = 0
        self.configure(wanted_threads())

    @property
    def threads(self) -> int:
        """Threads in all, the calling one included."""
        return int(self.library.tw_pool_threads())

    def configure(self, threads: int, spin_us: float = SPIN_US) -> None:
        """Set the number of threads and how long idle ones spin before they sleep."""
        self._configure(threads, int(spin_us * 1000), threads > available_cores())
        self._threads = threads

    def prepare(self, launches: list[Launch]) -> Callable[[], None]:
        """A function that runs the launches in order, with a barrier after each."""
        array = np.array(launches, LAUNCH.numpy)
        run, address, count = self.run, array.ctypes.data, len(launches)
        return lambda _owner=array: run(address, count)


def pool() -> Pool:
    """The pool, compiled at the first call, with as many threads as the `threads` knob says.

    Raises BuildError[B102] without a C++ compiler.
    """
    with _lock:
        if not _pools:
            _pools.append(Pool())
        if _pools[0]._threads != wanted_threads():
            _pools[0].configure(wanted_threads())
        return _pools[0]


def wanted_threads() -> int:
    """The `threads` knob; where it is 0, the cores this process may use."""
    return min(knobs.get("threads") or available_cores(), _MAX_THREADS)


def available_cores() -> int:
    """Cores in the affinity mask of this process."""
    return len(os.sched_getaffinity(0))


def address_of(function: Any) -> int:
    """The machine address of a loaded function, for `tw_launch.body`."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
