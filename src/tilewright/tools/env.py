"""`tilewright env`: lists what is installed and what is missing. Standard library only.

Every probe is guarded: a broken package is a line of the report and does not end it.
"""

import argparse
import os
import platform
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import NamedTuple

from tilewright.errors import TilewrightError


class Finding(NamedTuple):
    """One line. `state` is ok, missing (an optional part is absent) or bad (a part is broken)."""

    section: str
    name: str
    value: str
    state: str = "ok"
    hint: str = ""


def env_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def env(_: argparse.Namespace) -> int:
    """Print the report. The exit status is 1 if a part is broken."""
    findings = report()
    section = ""
    for f in findings:
        if f.section != section:
            section = f.section
            print(("\n" if f is not findings[0] else "") + section)
        mark = {"ok": " ", "missing": "-", "bad": "!"}[f.state]
        print(f" {mark} {f.name:22} {f.value}")
        if f.hint:
            print(f"   {'':22} → {f.hint}")
    return 1 if any(f.state == "bad" for f in findings) else 0


def report() -> list[Finding]:
    """All findings, in the order they are printed."""
    findings: list[Finding] = []
    for section, probe in (
        ("Python", _python), ("CPU target", _cpu), ("Kernel cache", _cache),
        ("Packages", _packages), ("CUDA target", _cuda),
    ):  # fmt: skip
        try:
            findings += [Finding(section, *line) for line in probe()]
        except Exception as error:  # the other probes still run
            findings.append(Finding(section, *_failure("probe failed", error)))
    return findings


Line = tuple[str, ...]


def _try(name: str, probe: Callable[[], str], hint: str = "") -> Line:
    """A line from a probe, with its error as the value if it fails."""
    try:
        return name, probe()
    except Exception as error:
        return _failure(name, error, hint)


def _failure(name: str, error: Exception, hint: str = "") -> Line:
    message = getattr(error, "message", f"{type(error).__name__}: {error}")
    return name, message, "bad", getattr(error, "hint", "") or hint


def _python() -> Iterable[Line]:
    from tilewright import __version__, knobs

    yield "tilewright", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", f"{platform.system()} {platform.machine()}"
    for name, knob in knobs.KNOBS.items():
        if os.environ.get(knob.env):
            yield _try(knob.env, lambda name=name: str(knobs.get(name)))


def _cpu() -> Iterable[Line]:
    from tilewright.runtime import pool
    from tilewright.toolchain import compilers

    try:
        compiler = compilers.find_compiler()
        yield "C++ compiler", f"{compiler.version} ({' '.join(compiler.command)})"
    except TilewrightError as error:
        # An error with a location is about a setting.
        state = "missing" if error.code == "B102" and not error.where else "bad"
        yield "C++ compiler", error.message, state, error.hint
    yield _try("instruction set", lambda: compilers.resolve_isa().name)
    yield "this CPU runs", ", ".join(n for n in compilers.ISAS if compilers.runnable(n))
    yield _try("threads", lambda: f"{pool.wanted_threads()} of {os.cpu_count()} cores")


def _cache() -> Iterable[Line]:
    from tilewright.toolchain import disk_cache

    yield _try("folder", lambda: str(disk_cache.current().folder), "set TILEWRIGHT_CACHE_DIR")
    entries = list(disk_cache.current().entries())
    yield "size", f"{len(entries)} entries, {sum(s.st_size for _, s in entries) / 2**20:.1f} MiB"


def _packages() -> Iterable[Line]:
    """The packages that Tilewright and its extras need, each with an extra that brings it."""
    extras: dict[str, str] = {}
    for text in metadata.requires("tilewright") or ():
        name, extra = re.match(r"[\w.-]+", text), re.search(r"extra == .(\w+)", text)
        assert name is not None
        brings = extra[1] if extra else ""
        if brings != "dev" and (name[0] not in extras or brings == name[0]):
            extras[name[0]] = brings
    for name, extra in extras.items():
        older = (f"{name}-cu12",) * name.startswith("nvidia-")  # wheels of CUDA 12
        installed = next((n for n in (name, *older) if _version(n)), "")
        if installed:
            yield installed, _version(installed)
        else:
            hint = f"pip install 'tilewright[{extra}]'"
            yield name, f"not installed (extra {extra})", "missing", hint


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cuda() -> Iterable[Line]:
    from tilewright.runtime.driver import device, driver
    from tilewright.toolchain import nvrtc

    if nvrtc.available():
        yield "NVRTC", nvrtc.toolkit_version()
    else:
        yield "NVRTC", "not installed", "missing", "pip install 'tilewright[cuda]'"
    try:
        version = driver().returned("cuDriverGetVersion")
        gpus = [device(i) for i in range(driver().returned("cuDeviceGetCount"))]
    except TilewrightError as error:
        hint = "kernels for GPUs compile here but do not run: install NVIDIA's driver"
        yield "CUDA driver", error.message, "missing", hint
        return
    yield "CUDA driver", f"CUDA {version // 1000}.{version % 1000 // 10}"
    for gpu in gpus:
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB"
        yield f"GPU {gpu.ordinal}", f"{gpu.name}, {gpu.arch}, {gpu.sms} SMs, {memory}"
