"""The thread pool in processes of its own: after a fork, and under the thread sanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.runtime import pool as pools
from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")

FORK = """
import ctypes, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
sys.path.insert(0, {tests!r})
from test_pool import Bench, pools, run, knobs, np
with knobs.scope(threads=3):
    bench = Bench(200)
    run([bench.launch("add_one", 200, 1)] * 10)
    child = os.fork()
    run([bench.launch("add_one", 200, 1)] * 10)
    good = np.array_equal(bench.a, np.full(200, 20))
    if child == 0:
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert good
print("both ran")
"""


def test_forked_child_has_its_own_threads() -> None:
    script = FORK.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.stdout == "both ran\n", done.stderr


STRESS = """
#include <stdio.h>
namespace stress {
constexpr int kUnits = 64, kCallers = 3, kRounds = 60;
struct Data { int64_t a[kUnits], b[kUnits]; };
void forth(const void* p, int64_t begin, int64_t end) {
  Data& d = *(Data*)p;
  for (int64_t i = begin; i < end; ++i) d.b[i] = d.a[(i + 21) % kUnits] + 1;
}
void back(const void* p, int64_t begin, int64_t end) {
  Data& d = *(Data*)p;
  for (int64_t i = begin; i < end; ++i) d.a[i] = d.b[(i + 5) % kUnits] + 1;
}
void* call(void* p) {
  Data& d = *(Data*)p;
  tw_launch list[8];
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < 8; ++i) {
      int64_t grain = (i + round) % 5 == 0 ? kUnits : 1 + (i + round) % 7;
      list[i] = {(void*)(i % 2 ? back : forth), &d, kUnits, grain, (i + round) % 3 == 0};
    }
    tw_pool_run(list, 8);
    if (round % 16 == 15) { timespec t = {0, 500000}; nanosleep(&t, nullptr); }
  }
  return nullptr;
}
}  // namespace stress
int main() {
  using namespace stress;
  for (int threads = 1; threads < 6; ++threads) {
    tw_pool_configure(threads, threads * 5000, threads > 2);
    static Data data[kCallers];
    pthread_t callers[kCallers];
    for (Data& d : data) d = Data();
    for (int i = 0; i < kCallers; ++i) pthread_create(&callers[i], nullptr, call, &data[i]);
    for (pthread_t caller : callers) pthread_join(caller, nullptr);
    for (Data& d : data) for (int64_t v : d.a) if (v != kRounds * 8) { puts("wrong"); return 1; }
  }
  tw_pool_configure(1, 0, 0);
  puts("right");
}
"""


def _build(tmp_path: Path, source: str, *flags: str) -> str | None:
    """Build and run a program; its output, or None where that cannot be done here."""
    program = tmp_path / "program"
    command = [*compilers.find_compiler().command, "-std=c++17", "-O1", "-g", "-pthread", *flags]
    built = subprocess.run(
        [*command, "-x", "c++", "-", "-o", str(program)],
        input=source, capture_output=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    if built.returncode:
        return None
    ran = subprocess.run([program], capture_output=True, encoding="utf-8", timeout=300, check=False)
    return ran.stdout + ran.stderr


def test_thread_sanitizer_finds_nothing(tmp_path: Path) -> None:
    trial = '#include <stdio.h>\nint main() { puts("right"); }\n'
    if _build(tmp_path, trial, "-fsanitize=thread") != "right\n":
        pytest.skip("the thread sanitizer does not work on this machine")
    source = Path(pools.__file__).with_name("pool.cpp").read_text(encoding="utf-8")
    whole = "#include <stdint.h>\n" + pools.LAUNCH.c_decl + source + STRESS
    assert _build(tmp_path, whole, "-fsanitize=thread", "-Wall", "-Wextra", "-Werror",
                  "-Wno-unused-parameter") == "right\n"  # fmt: skip
