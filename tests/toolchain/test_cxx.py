"""C++ source to loaded function: flags, errors that say what to do, caches that others change."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tilewright as tw
from tilewright import compiler, knobs
from tilewright.errors import BuildError
from tilewright.ir.nodes import Program
from tilewright.runtime.manifest import Built
from tilewright.target import Target
from tilewright.toolchain import compilers, cxx, disk_cache, nvrtc

needs_cxx = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
EXPORT = 'extern "C" __attribute__((visibility("default"))) '
TRIPLE = EXPORT + "long triple(long x) { return 3 * x; }\n"


@tw.program
def tripled(X=tw.dense("n")):
    i = tw.indices("n")
    return tw.out[i](X[i] * 3)


@needs_cxx
def test_compile_load_call(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path):
        before = disk_cache.stats.compiled
        path = cxx.compile_cpp(TRIPLE)
        assert path.parent == tmp_path
        triple = cxx.load(path).triple
        triple.argtypes, triple.restype = [ctypes.c_long], ctypes.c_long
        assert triple(14) == 42
        assert cxx.compile_cpp(TRIPLE) == path
        assert disk_cache.stats.compiled == before + 1
        assert cxx.load(path) is cxx.load(path)
        assert ".so" in {path.suffix for path, _ in disk_cache.current().entries()}


@needs_cxx
def test_truncated_library_is_compiled_again(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path):
        path = cxx.compile_cpp(TRIPLE)
        whole = path.read_bytes()
        path.write_bytes(whole[:1000])
        assert cxx.compile_cpp(TRIPLE) == path
        cxx.load(path)
        assert len(path.read_bytes()) == len(whole)


@needs_cxx
def test_refused_source_is_kept(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path), pytest.raises(BuildError) as caught:
        cxx.compile_cpp("int x = nonsense;\n")
    assert caught.value.code == "B101"
    assert "nonsense" in caught.value.message
    assert Path(caught.value.where).read_text(encoding="utf-8").startswith("int x = nonsense;\n")
    assert not list(tmp_path.glob(".tmp-*"))
    assert not list(tmp_path.glob("*.so"))


def script(path: Path, text: str) -> str:
    """A compiler that answers to --version, and does what `text` says."""
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\n{text}\n', encoding="utf-8"
    )
    path.chmod(0o755)
    return str(path)


REFUSE = 'cat > $0.cpp; grep -q triple $0.cpp || exec g++ "$@" < $0.cpp; '
"""Compiles everything with g++, except TRIPLE."""


@needs_cxx
@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("kill -9 $$", "was ended by signal 9 (Killed): no message", "memory"),
        ("echo 'fatal: Killed signal terminated program cc1plus' >&2; exit 1", "cc1plus", "memory"),
        ("echo 'x.o: No space left on device' >&2; exit 1", "x.o: No space left", "TMPDIR"),
        (REFUSE + "exit 3", "refused the code generated for kernel tripled: no message", "VERIFY"),
        (REFUSE + "echo no such type >&2; exit 1", "tripled: no such type", "VERIFY"),
        (
            REFUSE + "echo In function f: >&2; echo '<stdin>:7:1: error: odd' >&2; exit 1",
            "tripled: <stdin>:7:1: error: odd\nIn function f:\n<stdin>:7:1: error: odd",
            "VERIFY",
        ),
    ],
)
def test_how_a_compiler_failed_is_told(tmp_path: Path, text: str, message: str, hint: str):
    mycxx = script(tmp_path / "mycxx", text)
    with (
        knobs.scope(cache_dir=tmp_path / "cache", cxx=mycxx, verify=False),
        pytest.raises(BuildError) as e,
    ):
        cxx.compile_cpp(TRIPLE, name="tripled")
    assert e.value.code == "B101" and message in e.value.message
    assert f"TILEWRIGHT_CXX={mycxx!r}" in e.value.message
    assert hint in e.value.hint
    assert Path(e.value.where).read_text(encoding="utf-8").startswith(TRIPLE)


@needs_cxx
def test_the_error_of_a_program_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a pass had left a name undeclared in the generated code."""
    rendered = compiler.rendered

    def broken(program: Program, target: Target) -> Built:
        built = rendered(program, target)
        return replace(built, source=built.source + "\nint later = undeclared_name;\n")

    monkeypatch.setattr(compiler, "rendered", broken)
    with knobs.scope(cache_dir=tmp_path / "cache", verify=False):
        for target in ("cpp", "cuda:sm_90a") if nvrtc.available() else ("cpp",):
            with pytest.raises(BuildError, match="B101") as e:
                tripled.build(target)
            first = e.value.message.splitlines()[0]
            assert "kernel tripled: " in first and "undeclared_name" in first and "error" in first
            assert "TILEWRIGHT_VERIFY=1" in e.value.hint
            assert "undeclared_name" in Path(e.value.where).read_text(encoding="utf-8")


@needs_cxx
def test_the_verifier_is_not_suggested_when_it_ran(tmp_path: Path) -> None:
    with (
        knobs.scope(cache_dir=tmp_path / "cache", verify=True),
        pytest.raises(BuildError, match="B101") as e,
    ):
        cxx.compile_cpp("int x = nonsense;\n")
    assert "VERIFY" not in e.value.hint and "bug of Tilewright" in e.value.hint


@needs_cxx
@pytest.mark.parametrize(
    ("command", "said"),
    [("{mycxx}", "no licence"), ("g++ -no-such-flag", "-no-such-flag"), ("ld", "ld")],
)
def test_a_setting_that_cannot_compile_anything_is_not_our_bug(
    tmp_path: Path, command: str, said: str
) -> None:
    """It answers to --version, and refuses even an empty kernel: B102, with what it said."""
    mycxx = script(tmp_path / "mycxx", "echo error: no licence >&2; exit 1")
    command = command.format(mycxx=mycxx)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=command), pytest.raises(BuildError) as e:
        cxx.compile_cpp(TRIPLE)
    assert e.value.code == "B102" and f"TILEWRIGHT_CXX={command!r}" in e.value.message
    assert said in e.value.message


NOTHING, TEXT, OBJECT = (
    "exit 0",
    'while [ "$1" != -o ]; do shift; done; echo library > "$2"',
    'shift; while [ "$1" != -o ]; do shift; done; exec g++ -c -x c++ - -o "$2"',
)


@needs_cxx
@pytest.mark.parametrize("text", [NOTHING, TEXT, OBJECT])
def test_what_is_no_library_is_not_kept(tmp_path: Path, text: str) -> None:
    mycxx = script(tmp_path / "mycxx", text)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=mycxx):
        with pytest.raises(BuildError, match=r"B102.*no shared library"):
            cxx.compile_cpp(TRIPLE)
        assert {path.suffix for path, _ in disk_cache.current().entries()} == {".cxx"}


@needs_cxx
def test_undefined_symbol_is_an_error_at_load() -> None:
    path = cxx.compile_cpp("void tw_nowhere();\n" + EXPORT + "void f() { tw_nowhere(); }\n")
    with pytest.raises(BuildError, match="tw_nowhere"):
        cxx.load(path)


@needs_cxx
def test_mathematics_without_the_cpp_library(rng: np.random.Generator) -> None:
    """The bare link still finds libm, libc and libgcc."""
    source = "#include <stdint.h>\n" + EXPORT + (
        "void f(const float* x, float* y, int64_t n) {\n"
        "  for (int64_t i = 0; i < n; ++i) y[i] = __builtin_expf(x[i]) + __builtin_tanhf(x[i]);\n"
        "  __builtin_memmove(y, y, (unsigned long)n * 4);\n}\n"
    )  # fmt: skip
    library = cxx.load(cxx.compile_cpp(source))
    x = rng.standard_normal(100).astype(np.float32)
    y = np.empty_like(x)
    library.f(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(100))
    assert np.allclose(y, np.exp(x) + np.tanh(x), rtol=1e-5, atol=1e-6)  # the sum may cancel


@needs_cxx
def test_special_values_survive() -> None:
    """No -ffast-math: NaN and infinities mean what they mean."""
    source = EXPORT + "int f(double x) { return (x != x) * 2 + (x > 1.7e308); }\n"
    f = cxx.load(cxx.compile_cpp(source)).f
    f.argtypes = [ctypes.c_double]
    assert [f(float("nan")), f(float("inf")), f(1.0)] == [2, 1, 0]


@needs_cxx
@pytest.mark.parametrize("isa", list(compilers.ISAS))
def test_each_instruction_set(isa: str) -> None:
    if not compilers.runnable(isa):
        with pytest.raises(BuildError, match="B103"):
            cxx.compile_cpp(TRIPLE, isa=isa)
        return
    assert cxx.load(cxx.compile_cpp(TRIPLE, isa=isa)).triple(5) == 15


def forget(library: Path) -> None:
    """Libraries opened before are found in memory: this one must be opened from its file."""
    cxx._loaded.pop(library, None)


@needs_cxx
@pytest.mark.parametrize("damage", ["emptied", "folder removed", "not executable", "truncated"])
def test_a_library_lost_after_it_was_stored_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, damage: str
) -> None:
    """Another process may empty the cache between compiling and loading."""
    put, number = disk_cache.put, int(rng.integers(1 << 30))
    source = TRIPLE.replace("3 *", f"{number} *")

    def put_and_damage(kind: str, key: str, data: bytes) -> Path:
        path = put(kind, key, data)
        if kind == "so":
            if damage == "emptied":
                assert disk_cache.current().clear() > 0
            elif damage == "folder removed":
                shutil.rmtree(tmp_path / "cache")
            elif damage == "truncated":
                path.write_bytes(data[:100])
            else:
                path.unlink()
                path.mkdir()
        return path

    monkeypatch.setattr(disk_cache, "put", put_and_damage)
    with knobs.scope(cache_dir=tmp_path / "cache"):
        triple = cxx.load_cpp(source).triple
        triple.argtypes, triple.restype = [ctypes.c_long], ctypes.c_long
        assert triple(5) == 5 * number


@needs_cxx
@pytest.mark.parametrize("door", ["library", "program"])
def test_a_cache_deleted_while_the_compiler_runs(tmp_path: Path, door: str) -> None:
    folder = tmp_path / "cache"
    mycxx = script(tmp_path / "mycxx", f'rm -rf {folder}; exec g++ "$@"')
    with knobs.scope(cache_dir=folder, cxx=mycxx):
        if door == "library":
            assert cxx.load_cpp(TRIPLE).triple(7) == 21
            assert cxx.compile_cpp(TRIPLE).parent == folder
        else:
            x = np.arange(7, dtype=np.float32)
            assert np.array_equal(tripled.build("cpp")(x), 3 * np.arange(7))


@needs_cxx
def test_a_damaged_library_is_compiled_again(tmp_path: Path, rng: np.random.Generator) -> None:
    with knobs.scope(cache_dir=tmp_path):
        path = cxx.compile_cpp(TRIPLE)
        intact, compiled = path.read_bytes(), disk_cache.stats.compiled
        for damaged in (intact[:100], intact[:-1], b"", intact + b"x", rng.bytes(len(intact))):
            path.unlink()
            path.write_bytes(damaged)
            assert cxx.load_cpp(TRIPLE).triple(7) == 21
            assert path.read_bytes() == intact
            forget(path)
        at = int(rng.integers(len(intact)))
        path.unlink()
        path.write_bytes(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
        assert cxx.load_cpp(TRIPLE).triple(7) == 21
        assert path.read_bytes() == intact and disk_cache.stats.compiled == compiled + 6


@needs_cxx
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_full_or_read_only_disk_does_not_stop_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    replace_file = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).parent == tmp_path:
            raise OSError(number, os.strerror(number))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with knobs.scope(cache_dir=tmp_path), pytest.warns(RuntimeWarning, match=os.strerror(number)):
        assert cxx.load_cpp(TRIPLE).triple(7) == 21
    assert list(tmp_path.iterdir()) == []


@needs_cxx
def test_without_any_folder_to_write_the_error_is_coded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    compilers.find_compiler()
    monkeypatch.setattr(os, "replace", full)
    with (
        knobs.scope(cache_dir=tmp_path),
        pytest.warns(RuntimeWarning, match="No space left"),
        pytest.raises(BuildError, match=r"B105.*No space left"),
    ):
        cxx.load_cpp(TRIPLE)


@needs_cxx
def test_the_temporary_folder_may_be_deleted(tmp_path: Path) -> None:
    """As a daemon that cleans /tmp does to a server that has run for weeks."""
    with knobs.scope(cache_dir=tmp_path / "cache"):
        shutil.rmtree(disk_cache.temporary().folder)
        assert cxx.load_cpp(TRIPLE).triple(7) == 21


BUILDS = 6


def _build(folder: str, numbers: list[int]) -> list[int]:
    """Compile, load and call, while others empty the cache."""
    results = []
    with knobs.scope(cache_dir=Path(folder)):
        for number in numbers:
            library = cxx.load_cpp(TRIPLE.replace("3 *", f"{number} *"))
            results.append(library.triple(7))
    return results


def _empty(folder: str, stop: str) -> int:
    """Empty the cache again and again until the file `stop` exists."""
    removed, end = 0, time.monotonic() + 600
    with knobs.scope(cache_dir=Path(folder)):
        while time.monotonic() < end:
            stopped = os.path.exists(stop)
            removed += disk_cache.current().clear()
            if stopped:
                break
    return removed


@needs_cxx
def test_processes_that_build_while_one_empties_the_cache(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    numbers = [int(n) for n in rng.integers(1, 1 << 20, BUILDS)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as workers:
        folder, stop = str(tmp_path / "cache"), tmp_path / "stop"
        removed = workers.apply_async(_empty, (folder, str(stop)))
        built = [workers.apply_async(_build, (folder, numbers)) for _ in range(2)]
        for results in built:
            assert results.get(timeout=600) == [7 * n for n in numbers]
        stop.touch()
        assert removed.get(timeout=600) > 0
