"""The C++ compiler of this machine, the instruction sets of its CPU, and the flags for both.

Nothing here is left to `-march=native`: an instruction set has a name, an explicit list of flags
and a place in the cache key, so a cache on a network disk serves different machines.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tilewright import knobs
from tilewright.errors import BuildError, KnobError
from tilewright.runtime import cache


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: CPU features it needs, compiler flags, width of a vector register."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    vector_bits: int


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_AVX2_NEEDS = frozenset({"avx2", "fma", "f16c"})
_AVX512_NEEDS = _AVX2_NEEDS | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# Best first; the last one runs on every CPU of its family (SSE2 on x86-64, NEON on aarch64).
ISAS: dict[str, Isa] = {
    "avx512": Isa("avx512", _AVX512_NEEDS, _AVX2 + _AVX512, 512),
    "avx2": Isa("avx2", _AVX2_NEEDS, _AVX2, 256),
    "baseline": Isa("baseline", frozenset(), (), 128),
}

# IEEE results except that a*b+c may be fused; errno and traps are given up, which costs nothing.
# Whole numbers wrap around: a guard must see a coordinate that did, and not be taken for granted.
COMMON_FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-ffp-contract=fast",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pipe",
)

# A kernel has no constructors and uses no C++ library, so the start files and libstdc++ are left
# out: 30 ms instead of 40 ms for a small kernel. gold against bfd, and -Wl,-O0, made no difference.
BARE_LINK: tuple[str, ...] = ("-nostdlib", "-lm", "-lc", "-lgcc") if sys.platform == "linux" else ()
FULL_LINK: tuple[str, ...] = ("-pthread",)


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: its path and what `--version` says in its first line."""

    path: str
    version: str


@functools.cache
def cpu_features() -> frozenset[str]:
    """Feature flags of this CPU as Linux names them; empty where they cannot be read."""
    if os.uname().machine not in ("x86_64", "amd64"):
        return frozenset()
    try:
        # Made as it is read: the first core is enough. As bytes: a decoder costs 0.1 ms to set up.
        with open("/proc/cpuinfo", "rb") as file:
            for line in file:
                name, _, value = line.partition(b":")
                if name.strip() == b"flags":
                    return frozenset(value.decode().split())
    except OSError:
        pass
    return frozenset()


def runnable(isa: str) -> bool:
    """Whether this CPU executes an instruction set of `ISAS`."""
    return ISAS[isa].needs <= cpu_features()


def resolve_isa(isa: str | None = None) -> Isa:
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
        missing = ", ".join(sorted(ISAS[asked].needs - cpu_features()))
        raise BuildError(
            "B103",
            f"this CPU cannot run {asked} code: it lacks {missing}",
            hint="leave the instruction set open, and the best one of this CPU is taken",
        )
    return ISAS[asked]


def vector_bits(isa: str | None = None) -> int:
    """Bits of a vector register of the resolved instruction set: 512, 256 or 128."""
    return resolve_isa(isa).vector_bits


@functools.cache
def l2_bytes() -> int:
    """Bytes of a core's second-level cache; 1 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_bytes()
        return int(text.strip().rstrip(b"K")) << 10
    except (OSError, ValueError):
        return 1 << 20


def find_compiler() -> Compiler:
    """The compiler of the `cxx` knob, else c++, g++ or clang++. Raises BuildError[B102]."""
    asked = knobs.get("cxx")
    search = os.environ.get("PATH", os.defpath)
    path = _located(asked, search)
    if path is None or not os.access(path, os.X_OK):  # not there yet, or not there any more
        _located.cache_clear()
        path = _located(asked, search)
    if path is not None:
        return _describe(path)
    raise BuildError(
        "B102",
        f"no C++ compiler: {asked!r} is not found" if asked else "no C++ compiler is installed",
        hint="install g++ or clang++, or set TILEWRIGHT_CXX; the interp target needs none",
    )


def has_compiler() -> bool:
    """Whether `find_compiler` would find one. Raises BuildError[B105] where it cannot be asked for
    its version, as the cache folder is refused."""
    try:
        find_compiler()
    except BuildError as error:
        if error.code != "B102":
            raise
        return False
    return True


@functools.cache
def warn_of_interpreter() -> None:
    """Says, once a process, that there is no C++ compiler and what runs in its place."""
    cache.warn(
        "no C++ compiler was found: kernels run on the NumPy interpreter, slowly. "
        "Install g++ or clang++, or set TILEWRIGHT_CXX"
    )


@functools.lru_cache(maxsize=16)
def _located(asked: str, search: str) -> str | None:
    """The file of the compiler on a search path. (`shutil.which` would cost 2 ms to import.)"""
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        folders = [""] if os.sep in name else search.split(os.pathsep)
        for path in (os.path.join(folder, name) for folder in folders):
            if os.access(path, os.X_OK) and os.path.isfile(path):
                # as it is called: a link to ccache compiles by its own name only
                return os.path.abspath(path)
    return None


@functools.lru_cache(maxsize=16)
def _describe(path: str) -> Compiler:
    """Ask a compiler for its version; the answer is kept on disk until the file changes."""
    status = os.stat(path)
    key = cache.key_of("cxx", path, f"{status.st_ino} {status.st_mtime_ns} {status.st_size}")
    known = cache.current().get("cxx", key)
    if known is not None:
        return Compiler(path, known.decode())
    import subprocess  # 3 ms, for a question that is rarely asked

    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, encoding="utf-8", errors="replace",
            timeout=60, check=True,
        )  # fmt: skip
        version = answer.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise BuildError(
            "B102", f"{path} does not answer to --version: {error}", hint="set TILEWRIGHT_CXX"
        ) from None
    cache.put("cxx", key, version.encode())
    return Compiler(path, version)
