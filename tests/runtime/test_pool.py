"""The thread pool: every unit once, launches in order, any caller, any number of threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tilewright import knobs
from tilewright.runtime import pool as pools
from tilewright.toolchain import compilers, cxx

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")

BODIES = """
#include <stdint.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
struct Params { int64_t* a; int64_t* b; int64_t n; };
EXPORT void add_one(const void* p, int64_t begin, int64_t end) {
  const Params& s = *(const Params*)p;
  for (int64_t i = begin; i < end; ++i) s.a[i] += 1;
}
// Reads what the launch before wrote, at another unit's place: wrong if launches overlap.
EXPORT void shift_a_to_b(const void* p, int64_t begin, int64_t end) {
  const Params& s = *(const Params*)p;
  for (int64_t i = begin; i < end; ++i) s.b[i] = s.a[(i + s.n / 2 + 1) % s.n] + 1;
}
EXPORT void shift_b_to_a(const void* p, int64_t begin, int64_t end) {
  const Params& s = *(const Params*)p;
  for (int64_t i = begin; i < end; ++i) s.a[i] = s.b[(i + s.n / 3 + 1) % s.n] + 1;
}
EXPORT void sleep_a_little(const void* p, int64_t begin, int64_t end) {
  volatile int64_t spin = 0;
  for (int64_t i = begin; i < end; ++i) while (spin < 2000000) spin = spin + 1;
}
struct Chunks { int64_t count; int64_t largest; };
EXPORT void note_chunks(const void* p, int64_t begin, int64_t end) {
  Chunks& s = *(Chunks*)p;
  __atomic_fetch_add(&s.count, 1, __ATOMIC_RELAXED);
  int64_t largest = __atomic_load_n(&s.largest, __ATOMIC_RELAXED);
  while (end - begin > largest && !__atomic_compare_exchange_n(
             &s.largest, &largest, end - begin, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}
"""
PARAMS = pools.Struct("Params", [("a", "ptr"), ("b", "ptr"), ("n", "int64")])


class Bench:
    """Two arrays of `n`, and launches over them."""

    def __init__(self, n: int) -> None:
        self.library = cxx.load(cxx.compile_cpp(BODIES))
        self.a, self.b = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.params = PARAMS.pack(a=self.a.ctypes.data, b=self.b.ctypes.data, n=n)

    def launch(self, name: str, units: int, grain: int, guided: bool = False) -> pools.Launch:
        body = pools.address_of(getattr(self.library, name))
        return body, ctypes.addressof(self.params), units, grain, guided


def run(launches: list[pools.Launch]) -> None:
    pools.pool().prepare(launches)()


@pytest.fixture(params=[1, 2, 5], autouse=True)
def threads(request: pytest.FixtureRequest):
    with knobs.scope(threads=request.param):
        assert pools.pool().threads == request.param
        yield request.param


def test_every_unit_once(rng: np.random.Generator) -> None:
    bench = Bench(1000)
    expected = np.zeros(1000, np.int64)
    launches = []
    for _ in range(200):
        units, grain = int(rng.integers(0, 1001)), int(rng.integers(1, 300))
        launches.append(bench.launch("add_one", units, grain, bool(rng.integers(2))))
        expected[:units] += 1
    run(launches)
    assert np.array_equal(bench.a, expected)


def test_launches_do_not_overlap() -> None:
    n, rounds = 97, 150
    bench = Bench(n)
    pair = [bench.launch("shift_a_to_b", n, 3), bench.launch("shift_b_to_a", n, 5)]
    guided = [bench.launch("shift_a_to_b", n, 1, True), bench.launch("shift_b_to_a", n, 2, True)]
    run((pair + guided) * rounds)
    assert np.array_equal(bench.a, np.full(n, 4 * rounds))


def test_small_and_large_launches_mix() -> None:
    n, rounds = 64, 50
    bench = Bench(n)
    run([bench.launch("shift_a_to_b", n, n), bench.launch("shift_b_to_a", n, 1)] * rounds)
    assert np.array_equal(bench.a, np.full(n, 2 * rounds))


def test_chunks_have_the_grain(threads: int) -> None:
    library = cxx.load(cxx.compile_cpp(BODIES))
    chunks = np.zeros(2, np.int64)
    run([(pools.address_of(library.note_chunks), chunks.ctypes.data, 1003, 10, False)])
    assert chunks.tolist() == ([1, 1003] if threads == 1 else [101, 10])
    chunks[:] = 0
    run([(pools.address_of(library.note_chunks), chunks.ctypes.data, 10, 10, False)])
    assert chunks.tolist() == [1, 10]


def test_guided_chunks_shrink(threads: int) -> None:
    """The first is a thread's share of all; then there are fewer and fewer, down to the grain."""
    library = cxx.load(cxx.compile_cpp(BODIES))
    chunks = np.zeros(2, np.int64)
    run([(pools.address_of(library.note_chunks), chunks.ctypes.data, 1000, 1, True)])
    count, largest = chunks.tolist()
    assert largest == 1000 // threads
    assert count == 1 if threads == 1 else threads < count <= threads * 10


def test_odd_sizes(threads: int) -> None:
    """No units, a grain of nothing, and units that 32 bits cannot count."""
    bench = Bench(8)
    run([])
    run([bench.launch("add_one", 0, 0), bench.launch("add_one", -3, 1)])
    assert not bench.a.any()
    run([bench.launch("add_one", 8, 0)])
    assert np.array_equal(bench.a, np.ones(8))
    body = cxx.load(cxx.compile_cpp(BODIES)).note_chunks
    chunks = np.zeros(2, np.int64)
    run([(pools.address_of(body), chunks.ctypes.data, 2**62, 2**45, False)])
    assert chunks.sum() in (2**17 + 2**45, 1 + 2**62)
    chunks[:] = 0
    run([(pools.address_of(body), chunks.ctypes.data, 2**62, 1, True)])  # more than there are bits
    assert chunks[1] >= 2**62 // threads - 2**34


def test_many_callers_at_once() -> None:
    benches = [Bench(500) for _ in range(4)]

    def work(bench: Bench) -> None:
        for _ in range(20):
            run([bench.launch("add_one", 500, 7)] * 10)

    callers = [threading.Thread(target=work, args=(b,)) for b in benches]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(np.array_equal(b.a, np.full(500, 200)) for b in benches)


def test_threads_sleep_and_wake() -> None:
    bench = Bench(100)
    for _ in range(5):
        time.sleep(0.003)  # longer than they spin
        run([bench.launch("add_one", 100, 1), bench.launch("sleep_a_little", 2, 1)] * 3)
    assert np.array_equal(bench.a, np.full(100, 15))


IDLE = """
import sys, time
from tilewright import knobs
from tests.runtime.test_pool import Bench, run
with knobs.scope(threads=int(sys.argv[1])):
    bench = Bench(100)
    run([bench.launch("add_one", 100, 1)])
    time.sleep(0.01)  # longer than they spin
    before = time.process_time()
    time.sleep(0.1)
    print(time.process_time() - before)
"""


def test_idle_pool_uses_no_processor(threads: int) -> None:
    """Seconds of processor in 0.1 s of rest, in a process in which no other library has threads."""
    command = [sys.executable, "-c", IDLE, str(threads)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    assert float(done.stdout) < 0.05


def test_reconfigured_while_alive() -> None:
    bench = Bench(300)
    for i in range(12):
        pools.pool().configure(1 + i % 4, spin_us=(0, 20, 100)[i % 3])
        run([bench.launch("add_one", 300, 4)] * 5)
    assert np.array_equal(bench.a, np.full(300, 60))


def test_zero_means_the_affinity_mask() -> None:
    with knobs.scope(threads=0):
        assert pools.pool().threads == len(os.sched_getaffinity(0))
