"""Find the C++ compiler; resolve the instruction set of this CPU; their flags.

Instruction sets are named and spelled out as flags, never `-march=native`. The flags are part of
the cache key, so that different machines can share a cache on a network disk.
"""

import contextlib
import functools
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tilewright import knobs
from tilewright.errors import BuildError, KnobError
from tilewright.toolchain import disk_cache


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: CPU features as Linux names them, the width of a vector register."""

    name: str
    needs: tuple[str, ...]
    vector_bits: int

    @property
    def flags(self) -> tuple[str, ...]:
        wide = ("-mprefer-vector-width=512",) * (self.vector_bits == 512)
        return (*(f"-m{feature.replace('_', '')}" for feature in self.needs), *wide)


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
# Best first; the last one runs on every CPU of its family (SSE2 on x86-64, NEON on aarch64).
_BY_QUALITY = (
    Isa("avx512bf16", (*_AVX512, "avx512_bf16"), 512), Isa("avx512", _AVX512, 512),
    Isa("avx2", _AVX2, 256), Isa("baseline", (), 128),
)  # fmt: skip
ISAS: dict[str, Isa] = {isa.name: isa for isa in _BY_QUALITY}

# IEEE results, except that a*b+c may be fused, and that errno and traps are not set. Integers wrap
# around, so that the compiler keeps guards against coordinates that overflowed.
COMMON_FLAGS: tuple[str, ...] = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-ffp-contract=fast",
    "-fno-exceptions", "-fno-rtti", "-fPIC", "-shared", "-fvisibility=hidden", "-pipe",
)  # fmt: skip

# A kernel has no constructors and calls no C++ library. Linking a small one without start files and
# libstdc++ takes 30 ms instead of 40. Other linkers and -Wl,-O0 made no difference.
BARE_LINK: tuple[str, ...] = ("-nostdlib", "-lm", "-lc", "-lgcc") if sys.platform == "linux" else ()
FULL_LINK: tuple[str, ...] = ("-pthread",)


@functools.cache
def cpu_field(wanted: bytes) -> str:
    """What Linux says of the first core of this CPU; "" where it cannot be read."""
    # Linux generates this file as it is read: stop at the first core. A text decoder would take
    # 0.1 ms to set up.
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        for line in file:
            name, _, value = line.partition(b":")
            if name.strip() == wanted:
                return value.decode().strip()
    return ""


def cpu_features() -> frozenset[str]:
    """Feature flags of this CPU as Linux names them; empty where they cannot be read."""
    is_x86 = os.uname().machine in ("x86_64", "amd64")
    return frozenset(cpu_field(b"flags").split()) if is_x86 else frozenset()


def runnable(isa: str) -> bool:
    """Whether this CPU executes an instruction set of `ISAS`."""
    return cpu_features().issuperset(ISAS[isa].needs)


def resolve_isa(isa: str = "") -> Isa:
    """The instruction set to compile for: the argument, else the `isa` knob, else this CPU's best.

    Raises KnobError[K101] for a bad knob, BuildError[B103] for an unknown name, or one that this
    CPU cannot run (its kernels would end the process).
    """
    asked = isa or knobs.get("isa")
    if not asked:
        return next(one for one in ISAS.values() if runnable(one.name))
    known = ", ".join(ISAS)
    if asked not in ISAS:
        if not isa:
            where = "environment variable TILEWRIGHT_ISA"
            raise KnobError("K101", f"TILEWRIGHT_ISA={asked!r} is not one of {known}", where=where)
        raise BuildError("B103", f"unknown instruction set {asked!r}", hint=known)
    if not runnable(asked):
        missing = ", ".join(sorted({*ISAS[asked].needs} - cpu_features()))
        hint = "without a name, the best instruction set of this CPU is used"
        raise BuildError("B103", f"this CPU cannot run {asked} code: it lacks {missing}", hint=hint)
    return ISAS[asked]


def cpu_lanes() -> int:
    """float32 lanes of a vector register of the resolved instruction set: 16, 8 or 4."""
    return resolve_isa().vector_bits // 32


@functools.cache
def l2_bytes() -> int:
    """Bytes of the L2 cache of one core; 1 MiB where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_bytes().strip()
        return int(text.rstrip(b"K")) << 10
    except (OSError, ValueError):
        return 1 << 20


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: its command (an absolute path, then arguments), the first line of its
    `--version`, and the setting that chose it (`CXX='ccache g++'`; empty: it was on PATH)."""

    command: tuple[str, ...]
    version: str
    setting: str = ""

    def __str__(self) -> str:
        return self.setting or self.command[0]


class _Unusable(Exception):
    """Why a command is no working C++ compiler."""


DEFAULT_NAMES = ("c++", "g++", "clang++")
_MESSAGE_LINES = 5


def find_compiler() -> Compiler:
    """The compiler of TILEWRIGHT_CXX, else of CXX, else the first of c++, g++, clang++ that works.

    A setting may hold a launcher, arguments and quotes, as in a shell: `ccache g++`.
    Raises BuildError[B102] without a compiler, or for a setting that does not work.
    """
    compiler = _current()
    if compiler is None:
        text = f"no C++ compiler: none of {', '.join(DEFAULT_NAMES)} is on PATH and works"
        hint = "install g++ or clang++, or set TILEWRIGHT_CXX; the interp target needs none"
        raise BuildError("B102", text, hint=hint)
    return compiler


def has_compiler() -> bool:
    """Whether there is a C++ compiler. Raises BuildError[B102] for a setting that does not work:
    kernels must not fall back to the interpreter when the user chose a compiler; BuildError[B105]
    where the cache folder is refused."""
    return _current() is not None


@functools.cache
def warn_of_interpreter() -> None:
    """Warn, once a process, that kernels run on the interpreter for want of a C++ compiler."""
    disk_cache.warn(
        "no C++ compiler was found: kernels run on the NumPy interpreter, slowly. "
        "Install g++ or clang++, or set TILEWRIGHT_CXX"
    )


def _current() -> Compiler | None:
    environ = os.environ
    key = knobs.get("cxx"), environ.get("CXX", ""), environ.get("PATH", os.defpath)
    compiler = _search(*key)
    if compiler is None or not os.access(compiler.command[0], os.X_OK):  # installed or removed
        _search.cache_clear()
        compiler = _search(*key)
    return compiler


@functools.lru_cache(maxsize=16)
def _search(knob: str, cxx: str, path: str) -> Compiler | None:
    for variable, text in (("TILEWRIGHT_CXX", knob), ("CXX", cxx)):
        if text.strip():
            return _configured(variable, text, path)
    for name in DEFAULT_NAMES:
        program = _which(name, path)
        if program is not None:
            with contextlib.suppress(_Unusable):
                return Compiler((program,), _version((program,), path))
    return None


def _configured(variable: str, text: str, path: str) -> Compiler:
    import shlex

    setting = f"{variable}={text!r}"
    try:
        words = [text] if _which(text, path) else shlex.split(text)  # a path may contain blanks
        program = _which(words[0], path)
        if program is None:
            raise _Unusable(_why_not(words[0]))
        command = (program, *words[1:])
        return Compiler(command, _version(command, path), setting)
    except KnobError:  # of the cache's folder
        raise
    except (_Unusable, ValueError) as error:  # ValueError: a quote that is not closed
        text = f"{setting} is no working C++ compiler: {error}"
        hint = "a command, as g++ or 'ccache g++'; unset, another compiler is looked for"
        where = f"environment variable {variable}"
        raise BuildError("B102", text, where=where, hint=hint) from None


def _which(name: str, path: str) -> str | None:
    """The absolute path of a program. Links are not followed: ccache goes by their names."""
    found = shutil.which(name, path=path)
    return found and os.path.abspath(found)


def _why_not(name: str) -> str:
    if os.sep not in name or not os.path.exists(name):
        return f"{name!r} is not found"
    return f"{name!r} is {'a directory' if os.path.isdir(name) else 'not executable'}"


def _version(command: tuple[str, ...], path: str) -> str:
    """The first line of `--version`, cached on disk until one of the programs of the command
    changes. Raises _Unusable with the command's message."""
    programs = [file for word in command if (file := _which(word, path))]
    stamps = [f"{s.st_ino} {s.st_mtime_ns} {s.st_size}" for s in map(os.stat, programs)]
    key = disk_cache.key_of("cxx", *command, *programs, *stamps)
    known = disk_cache.current().get("cxx", key)
    if known is not None:
        return known.decode()
    import subprocess  # 3 ms

    try:
        done = subprocess.run(
            [*command, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
            check=False, env=os.environ | {"LC_ALL": "C"}, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unusable(f"--version failed: {error}") from None
    lines = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode or not lines:
        text = "\n".join((done.stderr or done.stdout).strip().splitlines()[:_MESSAGE_LINES])
        raise _Unusable(f"--version failed with exit status {done.returncode}: {text or 'silent'}")
    disk_cache.put("cxx", key, lines[0].strip().encode())
    return lines[0].strip()
