"""What tests stand on: their own kernel cache, verifiers on, seeded values, data and GPU skips."""

from __future__ import annotations

import ctypes
import difflib
import gc
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
DIFF_LINES = 40  # shown where a golden text differs
_cache = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing"
    )
    parser.addoption(
        "--random-programs", type=int, default=500, help="how many test_random_programs.py runs"
    )
    parser.addoption(
        "--all-mutants", action="store_true", help="all mutants of hand-written kernels"
    )
    parser.addoption("--random-seed", type=int, default=0, help="the first seed of these programs")


def pytest_configure(config: pytest.Config) -> None:
    """Before Tilewright is imported: a fresh kernel cache, and verifiers between all passes."""
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist share one cache
        config.stash[_cache] = tempfile.mkdtemp(prefix="tilewright-tests-")
        os.environ["TILEWRIGHT_CACHE_DIR"] = config.stash[_cache]
    os.environ["TILEWRIGHT_VERIFY"] = "1"
    try:
        import hypothesis
    except ImportError:
        return
    # No deadline: the first call of a kernel compiles it. Nor one for drawing values: others may
    # have the processor.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile(
        "tilewright", deadline=None, database=None, max_examples=50, print_blob=True,
        suppress_health_check=slow,
    )  # fmt: skip
    hypothesis.settings.load_profile("tilewright")


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(_cache, ""):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: tests call gc.collect(), 0.4 s each."""
    gc.collect()
    gc.freeze()


def has_gpu() -> bool:
    """Whether a CUDA driver answers and shows at least one device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not has_gpu():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU or driver on this machine"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of small real data: TILEWRIGHT_DATA, else ../shared/data beside the checkout."""
    named = os.environ.get("TILEWRIGHT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set TILEWRIGHT_DATA to a folder that has it")
    return folder


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random values that differ per test and per run, and repeat with `--randomly-seed=N`."""
    seed = request.config.getoption("randomly_seed", default=0)
    seed = seed if isinstance(seed, int) else 0
    return np.random.default_rng([seed, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture
def small_heap() -> None:
    """For tests that collect garbage often: what lives before them is left out, 0.2 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the file of a name under tests/golden, or writes the file."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("update_golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        kept = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text != kept:
            lines = difflib.unified_diff(
                kept.splitlines(), text.splitlines(), f"golden/{name}", "now", n=1, lineterm=""
            )
            shown = "\n".join(islice(lines, DIFF_LINES))
            pytest.fail(f"{shown}\n… `pytest --update-golden` accepts the change", pytrace=False)

    return compare
