"""Finding the C++ compiler: settings with launchers and arguments, and what is wrong with them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tilewright import knobs
from tilewright.errors import BuildError, KnobError
from tilewright.toolchain import compilers, cxx

EXPORT = 'extern "C" __attribute__((visibility("default"))) '
TRIPLE = EXPORT + "long triple(long x) { return 3 * x; }\n"
GXX = shutil.which("g++") or ""
needs_gxx = pytest.mark.skipif(not GXX, reason="no g++")


def script(path: Path, text: str) -> str:
    """A program of this name that runs `text`."""
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=""):
        yield


@needs_gxx
@pytest.mark.parametrize("variable", ["TILEWRIGHT_CXX", "CXX"])
@pytest.mark.parametrize(
    "text",
    [
        "{launcher} g++",
        "{launcher} -x 'two words' -- g++ -DNUMBER=3",
        "  g++\t-DNUMBER=3 ",
        "{blank}",
        "'{blank}' -DNUMBER=3",
        "env LANG=C g++",
    ],
)
def test_a_setting_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    """As make and every build tool read CXX: a launcher, arguments, quotes."""
    launcher = script(
        tmp_path / "launch",
        f'echo run >> {tmp_path}/log\nif [ "$1" = -x ]; then shift 3; fi\nexec "$@"',
    )
    (tmp_path / "with blank").mkdir()
    blank = script(tmp_path / "with blank" / "g++", f'echo run >> {tmp_path}/log\nexec {GXX} "$@"')
    text = text.format(launcher=launcher, blank=blank)
    if variable == "TILEWRIGHT_CXX":
        context = knobs.scope(cxx=text)
        monkeypatch.setenv("CXX", "no-such-compiler")  # not reached
    else:
        context = knobs.scope(cxx="")
        monkeypatch.setenv("CXX", text)
    number = "NUMBER" if "NUMBER" in text else "3"
    with context:
        assert compilers.has_compiler()
        assert compilers.find_compiler().setting == f"{variable}={text!r}"
        assert cxx.load_cpp(TRIPLE.replace("3 *", f"{number} *")).triple(14) == 42
    if launcher in text or blank in text:
        assert (tmp_path / "log").read_text(
            encoding="utf-8"
        ) == "run\nrun\n"  # --version, then the kernel


@pytest.mark.parametrize("variable", ["TILEWRIGHT_CXX", "CXX"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no-such-compiler", "'no-such-compiler' is not found"),
        ("no-such-launcher g++", "'no-such-launcher' is not found"),
        ("/no/such/g++ -O1", "'/no/such/g++' is not found"),
        ("{folder}", "is a directory"),
        ("{folder}/", "is a directory"),
        ("{plain}", "is not executable"),
        ("{plain} -O2", "is not executable"),
        ("{text}", "Exec format error"),
        ("{failing}", "exit status 3: no licence"),
        ("{silent}", "exit status 0: silent"),
        ("{launcher} no-such-compiler", "no-such-compiler"),
        ("'g++", "No closing quotation"),
        ("''", "'' is not found"),
    ],
)
def test_a_setting_that_does_not_work_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, said: str
) -> None:
    """Never the interpreter, and never another compiler, in place of the one that was chosen."""
    import tilewright as tw

    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "text").write_bytes(b"\x7fnot a program")
    (tmp_path / "text").chmod(0o755)
    script(tmp_path / "failing", "echo no licence >&2; exit 3")
    script(tmp_path / "silent", "exit 0")
    script(tmp_path / "launcher", 'exec "$@"')
    names = ("folder", "plain", "text", "failing", "silent", "launcher")
    text = text.format(**{name: tmp_path / name for name in names})
    monkeypatch.setenv("CXX", "c++" if variable == "TILEWRIGHT_CXX" else text)

    @tw.program
    def double(X=tw.dense("n")):
        i = tw.indices("n")
        return tw.out[i](X[i] * 2)

    with knobs.scope(cxx=text if variable == "TILEWRIGHT_CXX" else ""):
        for ask in (compilers.find_compiler, compilers.has_compiler, lambda: double.build("cpp")):
            with pytest.raises(BuildError) as caught:
                ask()
            assert caught.value.code == "B102" and caught.value.hint
            assert f"{variable}={text!r}" in caught.value.message
            assert said in caught.value.message
            assert caught.value.where == f"environment variable {variable}"
        y = double.build("interp")(np.arange(5, dtype=np.float32))
        assert np.array_equal(y, np.arange(5) * 2)


def test_the_order_of_settings_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> str:
        return compilers.find_compiler().version

    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compilers.has_compiler()
    script(tmp_path / "clang++", "echo I am clang++")
    assert version() == "I am clang++"
    gxx = script(tmp_path / "g++", "echo I am g++")
    assert version() == "I am clang++"  # the choice holds while its program exists
    compilers._search.cache_clear()
    assert version() == "I am g++"
    script(tmp_path / "c++", "exit 1")  # broken, and nobody asked for it: the next one
    compilers._search.cache_clear()
    assert version() == "I am g++"
    os.remove(gxx)
    assert version() == "I am clang++"
    script(tmp_path / "other", "echo I am $1")
    monkeypatch.setenv("CXX", "other")
    assert version() == "I am --version"
    with knobs.scope(cxx="other 1"):
        assert version() == "I am 1"
    with knobs.scope(cxx="  "):
        assert version() == "I am --version"
    monkeypatch.setenv("CXX", "")
    assert version() == "I am clang++"


@needs_gxx
def test_the_key_covers_the_command_and_the_version(tmp_path: Path) -> None:
    """Flags of the setting decide the code; so does a compiler updated behind a launcher."""
    launcher = script(tmp_path / "launch", 'exec "$@"')
    mycxx = script(tmp_path / "mycxx", f'echo 1 >/dev/null; exec {GXX} "$@"')
    source = EXPORT + "int f() { return NUMBER; }\n"
    keys = set()
    for command in (f"{mycxx} -DNUMBER=1", f"{mycxx} -DNUMBER=2", f"{launcher} {mycxx} -DNUMBER=1"):
        with knobs.scope(cxx=command):
            path = cxx.compile_cpp(source)
            assert cxx.load(path).f() == int(command[-1])
            keys.add(path)
    script(tmp_path / "mycxx", f'[ $2 = --version ] && echo mycxx 2 && exit; exec {GXX} "$@"')
    os.utime(mycxx, ns=(1, 1))
    compilers._search.cache_clear()
    with knobs.scope(cxx=f"{launcher} {mycxx} -DNUMBER=1"):
        assert compilers.find_compiler().version == "mycxx 2"
        keys.add(cxx.compile_cpp(source))
    assert len(keys) == 4


def test_a_bad_cache_folder_is_not_a_bad_compiler(tmp_path: Path) -> None:
    compiler = script(tmp_path / "mycxx", "echo mycxx")
    with knobs.scope(cxx=compiler, cache_dir="~no-such-user/x"), pytest.raises(KnobError):
        compilers.has_compiler()


def test_isa_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*features: str) -> str:
        monkeypatch.setattr(compilers, "cpu_features", lambda: frozenset(features))
        return compilers.resolve_isa().name

    monkeypatch.delenv("TILEWRIGHT_ISA", raising=False)
    assert of() == "baseline"
    assert of("avx2", "fma") == "baseline"
    assert of("avx2", "fma", "f16c") == "avx2"
    assert of(*compilers.ISAS["avx512"].needs) == "avx512"
    assert compilers.cpu_lanes() == 16
    with knobs.scope(isa="avx2"):
        assert compilers.cpu_lanes() == 8
    assert compilers.resolve_isa("baseline").vector_bits == 128


def test_bad_isa_is_refused() -> None:
    with pytest.raises(BuildError, match="B103"):
        compilers.resolve_isa("mmx")
    with knobs.scope(isa="mmx"), pytest.raises(KnobError, match="K101"):
        compilers.resolve_isa()


def test_no_other_family_reads_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.uname_result(("Linux", "host", "6.1", "#1", "aarch64"))
    monkeypatch.setattr(compilers.os, "uname", lambda: other)
    assert compilers.cpu_features() == frozenset()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with knobs.scope(cxx=""):
        assert not compilers.has_compiler()
        with pytest.raises(BuildError, match="B102"):
            compilers.find_compiler()


def test_a_refused_cache_is_no_missing_compiler(tmp_path: Path) -> None:
    compiler = script(tmp_path / "mycxx", "exit 0")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=compiler), pytest.raises(BuildError) as e:
        compilers.has_compiler()
    assert e.value.code == "B105"


def test_the_warning_names_the_user_s_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import tilewright as tw

    @tw.program
    def double(X=tw.dense("n")):
        i = tw.indices("n")
        return tw.out[i](X[i] * 2)

    compilers.warn_of_interpreter.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with knobs.scope(cxx=""), pytest.warns(RuntimeWarning) as caught:
        double.build("cpp")
        double.build("cpp")
    assert [(w.filename, "no C++ compiler" in str(w.message)) for w in caught] == [(__file__, True)]


def test_compiler_version_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept on disk until the compiler's file changes."""
    script = tmp_path / "mycxx"
    script.write_text("#!/bin/sh\necho mycxx 1.0\n", encoding="utf-8")
    script.chmod(0o755)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=str(script)):
        assert compilers.find_compiler().version == "mycxx 1.0"
        compilers._search.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked again"))
            assert compilers.find_compiler().version == "mycxx 1.0"
        script.write_text("#!/bin/sh\necho mycxx 2.0 \n", encoding="utf-8")
        os.utime(script, ns=(1, 1))
        compilers._search.cache_clear()
        assert compilers.find_compiler().version == "mycxx 2.0"
