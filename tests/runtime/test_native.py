"""C++ source to loaded function: flags, keys, and errors that say what to do."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tilewright import knobs
from tilewright.errors import BuildError, KnobError
from tilewright.runtime import cache, native, toolchain

needs_cxx = pytest.mark.skipif(not toolchain.has_compiler(), reason="no C++ compiler")
EXPORT = 'extern "C" __attribute__((visibility("default"))) '
TRIPLE = EXPORT + "long triple(long x) { return 3 * x; }\n"


@needs_cxx
def test_compile_load_call(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path):
        before = cache.stats.compiled
        path = native.compile_cpp(TRIPLE)
        assert path.parent == tmp_path
        triple = native.load(path).triple
        triple.argtypes, triple.restype = [ctypes.c_long], ctypes.c_long
        assert triple(14) == 42
        assert native.compile_cpp(TRIPLE) == path
        assert cache.stats.compiled == before + 1
        assert native.load(path) is native.load(path)
        assert "so" in {e.kind for e in cache.entries()}


@needs_cxx
def test_truncated_library_is_compiled_again(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path):
        path = native.compile_cpp(TRIPLE)
        whole = path.read_bytes()
        path.write_bytes(whole[:1000])
        assert native.compile_cpp(TRIPLE) == path
        native.load(path)
        assert len(path.read_bytes()) == len(whole)


@needs_cxx
def test_refused_source_is_kept(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path), pytest.raises(BuildError) as caught:
        native.compile_cpp("int x = nonsense;\n")
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


@pytest.mark.parametrize(
    ("text", "message", "is_ours"),
    [
        ("kill -9 $$", "was ended by signal 9 (Killed), without a word", False),
        ("echo 'fatal: Killed signal terminated program cc1plus' >&2; exit 1", "cc1plus", False),
        ("exit 3", "refused generated code (exit status 3), without a word", True),
        ("echo no such flag >&2; exit 1", "(exit status 1):\nno such flag", True),
    ],
)
def test_how_a_compiler_failed_is_told(tmp_path: Path, text: str, message: str, is_ours: bool):
    compiler = script(tmp_path / "mycxx", text)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=compiler), pytest.raises(BuildError) as e:
        native.compile_cpp(TRIPLE)
    assert e.value.code == "B101" and message in e.value.message
    assert ("bug of Tilewright" in e.value.hint) == is_ours
    assert Path(e.value.where).read_text(encoding="utf-8").startswith(TRIPLE)


NOTHING, TEXT, OBJECT = (
    "exit 0",
    'while [ "$1" != -o ]; do shift; done; echo library > "$2"',
    'shift; while [ "$1" != -o ]; do shift; done; exec g++ -c -x c++ - -o "$2"',
)


@needs_cxx
@pytest.mark.parametrize("text", [NOTHING, TEXT, OBJECT])
def test_what_is_no_library_is_not_kept(tmp_path: Path, text: str) -> None:
    compiler = script(tmp_path / "mycxx", text)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=compiler):
        with pytest.raises(BuildError, match=r"B102.*no shared library"):
            native.compile_cpp(TRIPLE)
        assert {e.kind for e in cache.entries()} == {"cxx"}


@needs_cxx
def test_undefined_symbol_is_an_error_at_load() -> None:
    path = native.compile_cpp("void tw_nowhere();\n" + EXPORT + "void f() { tw_nowhere(); }\n")
    with pytest.raises(BuildError, match="tw_nowhere"):
        native.load(path)


@needs_cxx
def test_mathematics_without_the_cpp_library(rng: np.random.Generator) -> None:
    """The bare link still finds libm, libc and libgcc."""
    source = "#include <stdint.h>\n" + EXPORT + (
        "void f(const float* x, float* y, int64_t n) {\n"
        "  for (int64_t i = 0; i < n; ++i) y[i] = __builtin_expf(x[i]) + __builtin_tanhf(x[i]);\n"
        "  __builtin_memmove(y, y, (unsigned long)n * 4);\n}\n"
    )  # fmt: skip
    library = native.load(native.compile_cpp(source))
    x = rng.standard_normal(100).astype(np.float32)
    y = np.empty_like(x)
    library.f(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(100))
    assert np.allclose(y, np.exp(x) + np.tanh(x), rtol=1e-5, atol=1e-6)  # the sum may cancel


@needs_cxx
def test_special_values_survive() -> None:
    """No -ffast-math: NaN and infinities mean what they mean."""
    source = EXPORT + "int f(double x) { return (x != x) * 2 + (x > 1.7e308); }\n"
    f = native.load(native.compile_cpp(source)).f
    f.argtypes = [ctypes.c_double]
    assert [f(float("nan")), f(float("inf")), f(1.0)] == [2, 1, 0]


@needs_cxx
@pytest.mark.parametrize("isa", list(toolchain.ISAS))
def test_each_instruction_set(isa: str) -> None:
    if not toolchain.runnable(isa):
        with pytest.raises(BuildError, match="B103"):
            native.compile_cpp(TRIPLE, isa=isa)
        return
    assert native.load(native.compile_cpp(TRIPLE, isa=isa)).triple(5) == 15


def test_isa_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*features: str) -> str:
        monkeypatch.setattr(toolchain, "cpu_features", lambda: frozenset(features))
        return toolchain.resolve_isa().name

    monkeypatch.delenv("TILEWRIGHT_ISA", raising=False)
    assert of() == "baseline"
    assert of("avx2", "fma") == "baseline"
    assert of("avx2", "fma", "f16c") == "avx2"
    assert of(*toolchain.ISAS["avx512"].needs) == "avx512"
    assert toolchain.vector_bits() == 512
    with knobs.scope(isa="avx2"):
        assert toolchain.vector_bits() == 256
    assert toolchain.vector_bits("baseline") == 128


def test_bad_isa_is_refused() -> None:
    with pytest.raises(BuildError, match="B103"):
        toolchain.resolve_isa("mmx")
    with knobs.scope(isa="mmx"), pytest.raises(KnobError, match="K101"):
        toolchain.resolve_isa()


def test_no_other_family_reads_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.uname_result(("Linux", "host", "6.1", "#1", "aarch64"))
    monkeypatch.setattr(toolchain.os, "uname", lambda: other)
    assert toolchain.cpu_features.__wrapped__() == frozenset()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with knobs.scope(cxx=""):
        assert not toolchain.has_compiler()
        with pytest.raises(BuildError, match="B102"):
            native.compile_cpp(TRIPLE)
    with knobs.scope(cxx="no-such-compiler"), pytest.raises(BuildError, match="no-such-compiler"):
        toolchain.find_compiler()


def test_a_refused_cache_is_no_missing_compiler(tmp_path: Path) -> None:
    compiler = script(tmp_path / "mycxx", "exit 0")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=compiler), pytest.raises(BuildError) as e:
        toolchain.has_compiler()
    assert e.value.code == "B105"


def test_the_warning_names_the_user_s_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import tilewright as tw

    @tw.program
    def double(X=tw.dense("n")):
        i = tw.indices("n")
        return tw.out[i](X[i] * 2)

    toolchain.warn_of_interpreter.cache_clear()
    with knobs.scope(cxx="no-such-compiler"), pytest.warns(RuntimeWarning) as caught:
        double.build("cpp")
        double.build("cpp")
    assert [(w.filename, "no C++ compiler" in str(w.message)) for w in caught] == [(__file__, True)]


@needs_cxx
def test_compiler_version_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept on disk until the compiler's file changes."""
    script = tmp_path / "mycxx"
    script.write_text("#!/bin/sh\necho mycxx 1.0\n", encoding="utf-8")
    script.chmod(0o755)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=str(script)):
        assert toolchain.find_compiler().version == "mycxx 1.0"
        toolchain._describe.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked again"))
            assert toolchain.find_compiler().version == "mycxx 1.0"
        script.write_text("#!/bin/sh\necho mycxx 2.0 \n", encoding="utf-8")
        os.utime(script, ns=(1, 1))
        toolchain._describe.cache_clear()
        assert toolchain.find_compiler().version == "mycxx 2.0"
