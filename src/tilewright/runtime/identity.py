"""What a value is, as a key that means the same in every process; or that nobody can say.

A wrong key would be a wrong kernel in silence. So a value counts as known only where everything
that it can do follows from what is hashed here: numbers, texts, tuples, frozen dataclasses, and
functions with their code, defaults, closures and the globals they name. All else is refused.
"""

from __future__ import annotations

import builtins
import dataclasses
import enum
import functools
import opcode
import sys
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np

from tilewright.runtime.cache import key_of

# Compiler rooms: the version of Tilewright covers what their functions and classes do.
ROOMS = ("ir", "sparse", "schedule", "lower", "codegen", "dtypes", "errors", "target", "build")
# Of the toolchain, what the resolved instruction set answers; that is part of a kernel's key.
TOOLCHAIN, ANSWERED = "tilewright.runtime.toolchain", ("vector_bits", "resolve_isa")
# Modules whose functions depend on their arguments only, but for those named below.
PURE = {"builtins", "math", "operator", "itertools", "functools", "dataclasses", "typing", "numpy"}
IMPURE = {
    "open", "eval", "exec", "compile", "__import__", "input", "print", "globals", "locals", "vars",
    "id", "hash", "breakpoint", "load", "loadtxt", "fromfile", "genfromtxt", "memmap", "seterr",
}  # fmt: skip
SCALARS = (bool, int, float, complex, str, bytes, type(None), type(...), range)
STATEFUL = {opcode.opmap[name] for name in ("IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")}
GENERATED = "<string>"  # the file of the methods that dataclasses make


class Unidentified(Exception):
    """Something whose behaviour a key cannot hold."""


def identity(*values: Any) -> str | None:
    """A sha256 of what the values are and do, or None where that cannot be told."""
    try:
        walker = _Walker()
        for v in values:
            walker.visit(v, frozenset())
    except (Unidentified, RecursionError):
        return None
    return key_of(sys.implementation.cache_tag or sys.version, np.__version__, *walker.parts)


class _Walker:
    """Writes a prefix code: each kind of value says how many parts follow it."""

    def __init__(self) -> None:
        self.parts: list[str | bytes] = []
        self.seen: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no id is used twice

    def visit(self, x: Any, names: frozenset[str]) -> None:
        """`names`: attributes that the code which holds a module may ask it for."""
        kind = type(x)
        if kind in SCALARS:
            self.put(kind.__name__, repr(x))
        elif kind in (tuple, list):
            self.many(kind.__name__, x)
        elif kind in (frozenset, set):
            self.put(kind.__name__, str(len(x)), *sorted(_alone(v) for v in x))
        elif kind in (dict, MappingProxyType):
            self.many("dict", [half for item in x.items() for half in item])
        elif dataclasses.is_dataclass(x) and not isinstance(x, type):
            self.record(x)
        elif isinstance(x, enum.Enum):
            self.visit(type(x), names)
            self.put("member", x.name)
        elif isinstance(x, (np.generic, np.dtype)):
            self.put("numpy", kind.__name__, repr(x))
        elif not self.met(x):
            self.behaviour(x, names)

    def put(self, *parts: str | bytes) -> None:
        self.parts += parts

    def many(self, kind: str, values: Any) -> None:
        self.put(kind, str(len(values)))
        for v in values:
            self.visit(v, frozenset())

    def met(self, x: Any) -> bool:
        """Whether a function, class or module stands further up; it is then named by its number."""
        number = self.seen.setdefault(id(x), len(self.seen))
        if number == len(self.alive):
            self.alive.append(x)
            return False
        self.put("seen", str(number))
        return True

    def record(self, x: Any) -> None:
        fields = [f.name for f in dataclasses.fields(x)]
        if not type(x).__dataclass_params__.frozen or getattr(x, "__dict__", {}).keys() - fields:
            raise Unidentified(type(x))
        if not self.met(type(x)):
            self.behaviour(type(x), frozenset())
        self.many("record", [getattr(x, name) for name in fields])

    # -- what can be called ----------------------------------------------------------------------

    def behaviour(self, x: Any, names: frozenset[str]) -> None:
        if isinstance(x, ModuleType):
            self.module(x, names)
        elif isinstance(x, FunctionType):
            self.function(x)
        elif isinstance(x, CodeType):
            self.code(x)
        elif isinstance(x, type):
            self.type(x)
        elif isinstance(x, functools.partial) and type(x) is functools.partial:
            self.many("partial", [x.func, x.args, x.keywords])
        elif isinstance(x, MethodType):
            self.many("method", [x.__self__, x.__func__])
        elif isinstance(x, functools._lru_cache_wrapper):
            self.many("cached", [x.__wrapped__])
        elif isinstance(x, property):
            self.many("property", [x.fget, x.fset])
        elif isinstance(x, (staticmethod, classmethod)):
            self.many(type(x).__name__, [x.__func__])
        else:
            self.native(x)

    def native(self, x: Any) -> None:
        """A function that is not written in Python, of a module that keeps no state."""
        module, name = getattr(x, "__module__", None), getattr(x, "__name__", "")
        owner = getattr(x, "__self__", None)
        bound = isinstance(x, BuiltinFunctionType) and not isinstance(owner, (ModuleType, type(None)))
        if not callable(x) or module not in PURE or name in IMPURE or bound:
            raise Unidentified(x)
        self.put("native", module, name)

    def module(self, m: ModuleType, names: frozenset[str]) -> None:
        if "__getattr__" in vars(m) and not _pure(m.__name__):
            raise Unidentified(m)
        found = sorted(names & vars(m).keys())
        self.put("module", m.__name__, str(len(found)))
        for name in found:
            self.put(name)
            self.visit(vars(m)[name], names)

    def type(self, cls: type) -> None:
        self.put("type", cls.__module__, cls.__qualname__)
        if _pure(cls.__module__) or _in_rooms(cls.__module__) or cls is object:
            if cls.__name__ in IMPURE or "<locals>" in cls.__qualname__:
                raise Unidentified(cls)
            return
        if type(cls) not in (type, enum.EnumType):
            raise Unidentified(cls)
        self.many("bases", cls.__bases__)
        for name, value in sorted(vars(cls).items()):
            if isinstance(value, (MemberDescriptorType, GetSetDescriptorType)) or _made(value):
                continue
            if name.startswith("__") and not callable(value) or name.startswith("_") and "_" in name[1:2]:
                continue
            if isinstance(cls, enum.EnumType) and (name.startswith("_") or name in cls.__members__):
                value = value.value if isinstance(value, cls) else None
            self.put(name)
            self.visit(value, frozenset())

    def function(self, f: FunctionType) -> None:
        self.put("function", f.__module__, f.__qualname__)
        self.visit(f.__code__, frozenset())
        self.visit(f.__defaults__, frozenset())
        self.visit(f.__kwdefaults__, frozenset())
        self.put("cells", str(len(f.__closure__ or ())))
        names = _names(f.__code__)
        for cell in f.__closure__ or ():
            self.cell(cell, names)
        self.visit(f.__dict__, frozenset())
        if f.__module__ == TOOLCHAIN:
            if f.__name__ not in ANSWERED:
                raise Unidentified(f)
        elif not _in_rooms(f.__module__) and not _pure(f.__module__):
            self.globals(f, names)

    def cell(self, cell: CellType, names: frozenset[str]) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            raise Unidentified(cell) from None
        self.visit(value, names)

    def globals(self, f: FunctionType, names: frozenset[str]) -> None:
        """The globals that its code names; a name may be an attribute only, which does no harm."""
        for name in sorted(names):
            if name in f.__globals__:
                self.put("global", name)
                self.visit(f.__globals__[name], names)
            elif name in IMPURE and hasattr(builtins, name):
                raise Unidentified(name)

    def code(self, c: CodeType) -> None:
        """Everything that runs; places in files are left out."""
        if STATEFUL & set(c.co_code[::2]):
            raise Unidentified(c)
        self.put("code", c.co_code, c.co_exceptiontable, c.co_name)
        counts = (c.co_argcount, c.co_posonlyargcount, c.co_kwonlyargcount, c.co_nlocals, c.co_flags)
        self.put(repr(counts), repr((c.co_names, c.co_varnames, c.co_freevars, c.co_cellvars)))
        self.many("consts", c.co_consts)


def _alone(x: Any) -> str:
    """One element of a set, whose order means nothing."""
    walker = _Walker()
    walker.visit(x, frozenset())
    return key_of(*walker.parts)


def _names(c: CodeType) -> frozenset[str]:
    """The names of globals and attributes in a function and in those it makes."""
    found = set(c.co_names)
    for inner in c.co_consts:
        if isinstance(inner, CodeType):
            found |= _names(inner)
    return frozenset(found)


def _in_rooms(module: str | None) -> bool:
    parts = (module or "").split(".")
    return len(parts) > 1 and parts[0] == "tilewright" and parts[1] in ROOMS or module == TOOLCHAIN


def _pure(module: str | None) -> bool:
    return (module or "").split(".")[0] in PURE


def _made(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__code__.co_filename == GENERATED
