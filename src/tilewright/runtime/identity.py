"""What a value is, as a key that means the same in every process; or that nobody can say.

A wrong key would be a wrong kernel in silence. So a value counts as known only where everything
that it can do follows from what is hashed here: numbers, texts, containers, frozen dataclasses, and
functions with their code, defaults, closures and the globals they name. All else is refused.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import marshal
import opcode
import sys
from collections.abc import Callable
from types import (
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

from tilewright.toolchain.disk_cache import key_of

# Compiler rooms: the version of Tilewright covers what their functions and classes do.
ROOMS = {
    "ir", "sparse", "schedule", "lower", "codegen", "dtypes", "errors", "target", "compiler",
    "build",
}  # fmt: skip
# Of the toolchain, what the resolved instruction set answers: that is part of a kernel's key.
TOOLCHAIN, ANSWERED = "tilewright.toolchain.compilers", {"vector_bits", "resolve_isa"}
# Modules whose functions depend on their arguments only, but for the names below.
PURE = {"builtins", "math", "operator", "itertools", "functools", "dataclasses", "typing", "numpy"}
NATIVE = PURE | {"_operator", "_functools"}
IMPURE = {
    "open", "eval", "exec", "compile", "__import__", "input", "print", "globals", "locals", "vars",
    "id", "hash", "breakpoint", "load", "loadtxt", "fromfile", "genfromtxt", "memmap", "seterr",
}  # fmt: skip
HIDDEN = {  # what no key holds, or what leads anywhere
    "__globals__", "__dict__", "__closure__", "__code__", "__subclasses__", "f_globals",
    "__doc__", "__annotations__", "__slots__",
}  # fmt: skip
DYNAMIC = {"getattr", "attrgetter", "methodcaller"}
PLAIN = {bool, int, float, complex, str, bytes, type(None), type(...)}
SCALARS = PLAIN | {range}
STATEFUL = {opcode.opmap[name] for name in ("IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")}
GENERATED = "__create_fn__.<locals>."  # where dataclasses make their methods, from their fields
DESCRIBES = {
    "__module__", "__qualname__", "__doc__", "__annotations__", "__dataclass_fields__",
    "__dataclass_params__", "__firstlineno__", "__static_attributes__", "__slots__",
}  # fmt: skip


class Unidentified(Exception):
    """Something whose behaviour a key cannot hold."""


def identity(*values: Any) -> str | None:
    """A sha256 of what the values are and do, or None where that cannot be told."""
    try:
        walker = _Walker()
        for v in values:
            walker.visit(v)
        walker.ask_modules()
        # Scalars only: equal bytes are equal parts. (Format 3 would also tell what is shared.)
        parts = marshal.dumps(walker.parts, 2)
    except Exception:  # of objects that are asked for something: what is not known has no key
        return None
    return key_of(sys.implementation.cache_tag or sys.version, np.__version__, parts)


class _Walker:
    """Writes a prefix code: each kind of value says how many parts follow it."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.seen: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no id is used twice
        self.names: set[str] = set()  # what any of the code may ask an object for
        self.modules: list[ModuleType] = []

    def visit(self, x: Any) -> None:
        kind = type(x)
        if kind in PLAIN:
            self.parts += (kind.__name__, x)
        elif kind is range:
            self.put("range", repr(x))
        elif kind in (tuple, list):
            self.many(kind.__name__, x)
        elif kind in (dict, MappingProxyType):
            self.many(kind.__name__, [half for item in x.items() for half in item])
        elif kind in (frozenset, set):
            if any(type(v) not in SCALARS for v in x):
                raise Unidentified(x)
            self.put(kind.__name__, len(x), *sorted(f"{type(v).__name__} {v!r}" for v in x))
        elif (names := _fields(kind)) is not None:
            if not self.met(x):
                self.record(x, names)
        elif isinstance(x, (np.generic, np.dtype)):
            plain = kind.__module__.partition(".")[0] == "numpy"  # and not a class derived from it
            if not plain or (isinstance(x, np.dtype) and x.metadata):
                raise Unidentified(x)
            self.put("numpy", kind.__name__, repr(x))
        elif not self.met(x):
            self.behaviour(x)

    def put(self, *parts: Any) -> None:
        """Scalars, and tuples of names: what `marshal` tells apart."""
        self.parts += parts

    def many(self, kind: str, values: Any) -> None:
        self.parts += (kind, len(values))
        for v in values:
            if type(v) in PLAIN:  # most are: a call for each cost a tenth of the whole
                self.parts += (type(v).__name__, v)
            else:
                self.visit(v)

    def met(self, x: Any) -> bool:
        """Whether a function, class, module or record stands further up; it is then named by its
        number."""
        number = self.seen.setdefault(id(x), len(self.seen))
        if number == len(self.alive):
            self.alive.append(x)
            return False
        self.parts += ("seen", number)
        return True

    def record(self, x: Any, names: tuple[str, ...]) -> None:
        if not type(x).__dataclass_params__.frozen or vars_beyond(x, names):
            raise Unidentified(type(x))
        self.visit(type(x))
        self.many("record", [getattr(x, name) for name in names])

    # -- modules ---------------------------------------------------------------------------------

    def ask_modules(self) -> None:
        """What the code may find in the modules it reaches, until nothing new is found. A function
        may hand a module to another, so names are looked for in all of them."""
        asked: set[tuple[int, str]] = set()
        more = True
        while more:
            more = False
            for number, m in enumerate(self.modules):
                for name in sorted(self.names & vars(m).keys()):
                    if (number, name) not in asked:
                        asked.add((number, name))
                        self.put("of", number, name)
                        self.visit(vars(m)[name])
                        more = True
        own = [m for m in self.modules if not _pure(m.__name__) and not _in_rooms(m.__name__)]
        if self.names & HIDDEN or (own and self.names & DYNAMIC):
            raise Unidentified("attributes by computed names")
        if any("__getattr__" in vars(m) for m in own):
            raise Unidentified("a module that makes its attributes")

    # -- what can be called ----------------------------------------------------------------------

    def behaviour(self, x: Any) -> None:
        known = _BEHAVIOURS.get(type(x))
        if known is not None:
            known(self, x)
        elif isinstance(x, type):
            self.type(x)
        else:
            self.native(x)

    def module(self, m: ModuleType) -> None:
        self.put("module", m.__name__)
        self.modules.append(m)

    def native(self, x: Any) -> None:
        """A function that is not written in Python, of a module that keeps no state: what the
        module has under its name, and not an object that was made with arguments."""
        name = str(getattr(x, "__name__", ""))
        module = "numpy" if isinstance(x, np.ufunc) else str(getattr(x, "__module__", ""))
        known = module in NATIVE and _found(module, name) is x
        if not known or name in IMPURE:
            raise Unidentified(x)
        self.put("native", module, name)

    def type(self, cls: type) -> None:
        self.put("type", cls.__module__, cls.__qualname__)
        if _pure(cls.__module__) or _in_rooms(cls.__module__):
            # A class without a module of its own, made by `exec`, says `builtins`.
            if cls.__name__ in IMPURE or _found(cls.__module__, cls.__qualname__) is not cls:
                raise Unidentified(cls)
            return
        if type(cls) is not type:
            raise Unidentified(cls)
        self.many("bases", cls.__bases__)
        if "__dataclass_fields__" in vars(cls):
            self.dataclass(cls)
        for name, value in sorted(vars(cls).items()):
            described = isinstance(value, (MemberDescriptorType, GetSetDescriptorType))
            if name not in DESCRIBES and not described and not _made(value):
                self.put("has", name)
                self.visit(value)

    def dataclass(self, cls: Any) -> None:
        """All that its generated methods are made from."""
        self.put("dataclass", repr(cls.__dataclass_params__))
        for f in cls.__dataclass_fields__.values():
            self.put(
                f.name, str(f._field_type), f.init, f.repr, f.compare, f.hash, f.kw_only is True
            )
            for default in (f.default, f.default_factory):
                self.many("default", [] if default is dataclasses.MISSING else [default])

    def function(self, f: FunctionType) -> None:
        module = str(
            f.__globals__.get("__name__")
        )  # `__module__` may be that of a wrapped function
        self.put("function", module, f.__qualname__)
        try:
            cells = [c.cell_contents for c in f.__closure__ or ()]
        except ValueError:  # a name that is not bound yet
            raise Unidentified(f) from None
        self.many("given", [f.__defaults__, f.__kwdefaults__, cells, f.__dict__])
        at_home = _found(module, "__dict__") is f.__globals__
        if at_home and (_pure(module) or _in_rooms(module)):
            if f.__name__ in IMPURE or (module == TOOLCHAIN and f.__name__ not in ANSWERED):
                raise Unidentified(f)
            self.put(f.__code__.co_code)
        else:
            self.code(f.__code__)
            self.globals(f)

    def cached(self, x: Any) -> None:
        """What it calls is what it wraps, where nobody has set that to something else."""
        if set(vars(x)) != {"__wrapped__"} or not _in_rooms(x.__wrapped__.__module__):
            raise Unidentified(x)
        self.many("cached", [x.__wrapped__])

    def globals(self, f: FunctionType) -> None:
        """The globals that its code names; a name may be an attribute only, which does no harm."""
        for name in sorted(_names(f.__code__)):
            if name in f.__globals__:
                self.put("global", name)
                self.visit(f.__globals__[name])
            elif name in IMPURE and hasattr(builtins, name):
                raise Unidentified(name)

    def code(self, c: CodeType) -> None:
        """Everything that runs; places in files are left out."""
        if STATEFUL.intersection(c.co_code[::2]):
            raise Unidentified(c)
        counts = (
            c.co_argcount,
            c.co_posonlyargcount,
            c.co_kwonlyargcount,
            c.co_nlocals,
            c.co_flags,
        )
        self.put("code", c.co_code, c.co_exceptiontable, c.co_name, *counts)
        self.put(c.co_names, c.co_varnames, c.co_freevars, c.co_cellvars)
        self.names.update(c.co_names)
        self.names.update(v for v in c.co_consts if type(v) is str and v.isidentifier())
        self.many("consts", c.co_consts)


# Objects of just these types; what a subclass of one does, nobody can say.
_BEHAVIOURS: dict[type, Callable[[_Walker, Any], None]] = {
    ModuleType: _Walker.module,
    FunctionType: _Walker.function,
    CodeType: _Walker.code,
    type: _Walker.type,
    functools.partial: lambda w, x: w.many("partial", [x.func, x.args, x.keywords, x.__dict__]),
    MethodType: lambda w, x: w.many("method", [x.__self__, x.__func__]),
    functools._lru_cache_wrapper: _Walker.cached,
    property: lambda w, x: w.many("property", [x.fget, x.fset, x.fdel]),
    staticmethod: lambda w, x: w.many("staticmethod", [x.__func__]),
    classmethod: lambda w, x: w.many("classmethod", [x.__func__]),
}


@functools.cache
def _fields(cls: type) -> tuple[str, ...] | None:
    """The fields of a dataclass, or None for another class."""
    if not dataclasses.is_dataclass(cls):
        return None
    return tuple(f.name for f in dataclasses.fields(cls))


def vars_beyond(x: Any, names: tuple[str, ...]) -> bool:
    """Whether an object keeps more than its fields."""
    return hasattr(x, "__dict__") and not vars(x).keys() <= set(names)


def _names(c: CodeType) -> set[str]:
    """The names of globals and attributes in a function and in those it makes."""
    found = set(c.co_names)
    for inner in c.co_consts:
        if isinstance(inner, CodeType):
            found |= _names(inner)
    return found


def _found(module: str, name: str) -> Any:
    """What a module that is loaded has under a name with dots."""
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _in_rooms(module: str) -> bool:
    parts = module.split(".")
    if module == TOOLCHAIN:
        return True
    return len(parts) > 1 and parts[0] == "tilewright" and parts[1] in ROOMS


def _pure(module: str) -> bool:
    return module.partition(".")[0] in PURE


def _made(value: Any) -> bool:
    """Whether a method was made by `dataclass`; `dataclass()` of the walker holds what it does."""
    return isinstance(value, FunctionType) and value.__code__.co_qualname.startswith(GENERATED)
