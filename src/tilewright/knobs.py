"""The environment variables Tilewright reads: all of them, typed, in one table.

`knobs.scope(debug=1)` overrides for a block of code. A bad value is an error at the first read that
names the variable, the value and the expected form.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tilewright.errors import KnobError


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    return parse


def _flag(text: str) -> bool:
    return {0: False, 1: True}[int(text)]


class Knob(NamedTuple):
    env: str
    default: Any
    parse: Callable[[Any], Any]
    form: str
    doc: str


def _folder(path: str | Path) -> Path:
    return Path(path).expanduser()


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base, "tilewright") if base else _folder("~/.cache/tilewright")


KNOBS: dict[str, Knob] = {
    "cache_dir": Knob("TILEWRIGHT_CACHE_DIR", _default_cache, _folder, "a folder", "where compiled kernels are kept"),
    "cache": Knob("TILEWRIGHT_CACHE", True, _flag, "0 or 1", "0 compiles everything anew"),
    "threads": Knob("TILEWRIGHT_THREADS", 0, _integer(0), "an integer, 0 = all cores", "threads of the CPU target"),
    "cxx": Knob("TILEWRIGHT_CXX", "", str, "a command", "the C++ compiler, as g++ or 'ccache g++'; empty = CXX, else c++, g++ or clang++"),
    "isa": Knob("TILEWRIGHT_ISA", "", str, "avx512bf16, avx512, avx2, baseline or empty", "instruction set of the CPU target; empty = this CPU's"),
    "verify": Knob("TILEWRIGHT_VERIFY", False, _flag, "0 or 1", "run the IR verifiers between all passes"),
    "debug": Knob("TILEWRIGHT_DEBUG", 0, _integer(0, 1), "0 or 1", "1 prints the time of each compilation"),
}  # fmt: skip

_overrides: dict[str, Any] = {}


def get(name: str) -> Any:
    """The value of a knob: the override in force, else the environment's, else the default. Raises
    KnobError[K101]."""
    knob = KNOBS[name]
    value = _overrides.get(name, os.environ.get(knob.env) or None)
    try:
        if value is None:
            return knob.default() if callable(knob.default) else knob.default
        return knob.parse(value)
    except (ValueError, KeyError, TypeError, RuntimeError):  # the last: ~ without a home
        rule = f"{knob.env}={value!r} is not {knob.form}"
        where = f"environment variable {knob.env}"
        raise KnobError("K101", rule, where=where, hint=knob.doc) from None


@contextlib.contextmanager
def scope(**values: Any) -> Iterator[None]:
    """Override knobs inside a `with` block."""
    global _overrides
    unknown = values.keys() - KNOBS.keys()
    if unknown:
        raise KnobError("K101", f"no knob {sorted(unknown)}", hint=f"knobs: {', '.join(KNOBS)}")
    saved, _overrides = _overrides, _overrides | values
    try:
        yield
    finally:
        _overrides = saved
