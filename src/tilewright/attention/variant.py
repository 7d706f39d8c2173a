"""An attention variant: what is done to a score and which scores count, as traced expressions.

    @variant
    class Softcap:
        soft_cap = scalar("float32", 30.0)
        def logits(self, s, at): return self.soft_cap * tanh(s / self.soft_cap)
        def mask(self, at):      return at.kv <= at.qo

The class is traced when it is defined. Its values are frozen: `Softcap(soft_cap=50.0)`.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError, ProgramError
from tilewright.ir.names import size_name
from tilewright.ir.nodes import (
    BITWISE,
    COMPARISON,
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    Load,
    Select,
    Unary,
    Var,
    as_expr,
    cast,
)
from tilewright.ir.rewrite import walk
from tilewright.sparse.trace import Declared, scalar, tanh

PLACES = ("qo", "kv", "qo_head", "kv_head", "request")
SCORE = Var("s", dtypes.float32)
VALUE_TYPES = (dtypes.float32, dtypes.int32)


class At:
    """Where a score stands: `qo` and `kv` are positions in the sequence, the rest are numbers."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Expr:
        if name not in PLACES:
            raise ProgramError(
                "P101",
                f"at.{name} is not known",
                hint=f"one of {', '.join(f'at.{n}' for n in PLACES)}",
            )
        return Var(f"at.{name}", dtypes.int32)


@dataclass(frozen=True, slots=True)
class PerHead:
    """One value for each query head, or each KV head: by which it is indexed says."""

    dtype: DType


def per_head(dtype: Any = "float32") -> Any:
    """A run-time vector with one value a head: `slopes[at.qo_head]` or `sinks[at.kv_head]`."""
    return PerHead(dtypes.dtype(dtype))


@dataclass(frozen=True, slots=True)
class Value:
    """A run-time value of a variant. `heads` is empty for a scalar, else `qo_head` or `kv_head`."""

    name: str
    dtype: DType
    default: float | None = None
    heads: str = ""


@dataclass(frozen=True, slots=True)
class Traced:
    """A variant after tracing: `logits` float32, `mask` bool, over `s`, `at.…` and the values."""

    name: str
    logits: Expr
    mask: Expr
    values: tuple[Value, ...]

    def __str__(self) -> str:
        return f"variant {self.name}\n  logits = {self.logits}\n  mask = {self.mask}"


# ---------------------------------------------------------------------------- tracing


class _Heads:
    """What `self.slopes` is while a variant is traced."""

    def __init__(self, name: str, declared: PerHead, used: dict[str, str]) -> None:
        self.name, self.declared, self.used = name, declared, used

    def __getitem__(self, index: Any) -> Expr:
        by = index.name if isinstance(index, Var) else ""
        if by not in ("at.qo_head", "at.kv_head"):
            raise ProgramError(
                "P101",
                f"{self.name}[{index}]: a per-head value is read at one head",
                hint=f"{self.name}[at.qo_head] or {self.name}[at.kv_head]",
            )
        if self.used.setdefault(self.name, by) != by:
            raise ProgramError(
                "P102",
                f"{self.name} is read by query head and by KV head",
                hint="declare two values",
            )
        buffer = Buffer(self.name, self.declared.dtype, (Var(size_name(by)),))
        return Load(buffer, (index,), self.declared.dtype)


class _Symbols:
    """`self` while a variant is traced: declared values become nodes, all else is the class's."""

    def __init__(self, cls: type, values: dict[str, Any]) -> None:
        self._cls, self._values = cls, values

    def __getattr__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        try:
            found = inspect.getattr_static(self._cls, name)
        except AttributeError:
            raise ProgramError("P101", f"{self._cls.__name__} has no {name!r}") from None
        if isinstance(found, FunctionType):
            return MethodType(found, self)
        return getattr(self._cls, name)


def trace(cls: type) -> Traced:
    """Run `logits` and `mask` of a class on symbols. Raises ProgramError (P codes)."""
    declared = _declared(cls)
    used: dict[str, str] = {}
    symbols: dict[str, Any] = {}
    for name, d in declared.items():
        if d.dtype not in VALUE_TYPES:
            raise ProgramError(
                "P106",
                f"{name} of variant {cls.__name__} is {d.dtype}",
                hint="run-time values are float32 or int32",
            )
        if isinstance(d, PerHead):
            symbols[name] = _Heads(name, d, used)
        else:
            symbols[name] = Load(Buffer(name, d.dtype, ()), (), d.dtype)
    me = _Symbols(cls, symbols)
    logits = _call(cls, me, "logits", ("s", "at"), (SCORE, At()), SCORE)
    mask = _call(cls, me, "mask", ("at",), (At(),), Const(True, dtypes.bool_))
    if mask.dtype != dtypes.bool_:
        raise ProgramError(
            "P106",
            f"mask of {cls.__name__} is {mask.dtype}, not bool",
            where=str(mask),
            hint="return a comparison, as at.kv <= at.qo",
        )
    if logits.dtype == dtypes.bool_:
        raise ProgramError("P106", f"logits of {cls.__name__} is a condition", where=str(logits))
    for what in (logits, mask):
        _check(cls, what)
    values = tuple(
        Value(n, d.dtype, heads=used.get(n, "at.qo_head").removeprefix("at."))
        if isinstance(d, PerHead)
        else Value(n, d.dtype, d.default)
        for n, d in declared.items()
    )
    return Traced(cls.__name__, cast(logits, dtypes.float32), mask, values)


def _declared(cls: type) -> dict[str, Any]:
    """The run-time values of a class and its bases, in the order of definition."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, PerHead) or (isinstance(value, Declared) and not value.dims):
                found[name] = value
            elif isinstance(value, Declared):
                raise ProgramError(
                    "P101",
                    f"{name} of variant {cls.__name__} is a tensor",
                    hint="a variant has scalar() and per_head() values",
                )
            else:
                found.pop(name, None)  # a subclass made it a constant
    return found


def _call(
    cls: type,
    me: _Symbols,
    name: str,
    takes: tuple[str, ...],
    given: tuple[Any, ...],
    absent: Expr,
) -> Expr:
    function = inspect.getattr_static(cls, name, None)
    if function is None:
        return absent
    wanted = f"def {name}(self, {', '.join(takes)})"
    if not isinstance(function, FunctionType) or len(
        inspect.signature(function).parameters
    ) != 1 + len(takes):
        raise ProgramError(
            "P101", f"{name} of variant {cls.__name__} is not {wanted}", hint=f"write {wanted}"
        )
    result = function(me, *given)
    if result is None:
        raise ProgramError("P101", f"{name} of variant {cls.__name__} returns nothing")
    return as_expr(result, dtypes.float32 if name == "logits" else None)


def _check(cls: type, what: Expr) -> None:
    """Only scalars of 32 bits, by operations that each target has on vectors too."""
    for x in walk(what):
        if not isinstance(x, (Const, Var, Load, Binary, Unary, Select, Cast)):
            raise ProgramError(
                "P101",
                f"{type(x).__name__} cannot stand in variant {cls.__name__}",
                where=str(what),
                hint="a variant computes with s, at and its own values",
            )
        if isinstance(x, Var) and x.name != "s" and not x.name.startswith("at."):
            raise ProgramError(
                "P104", f"{x.name} means nothing in variant {cls.__name__}", where=str(what)
            )
        if x.dtype not in (*VALUE_TYPES, dtypes.bool_):
            raise ProgramError(
                "P106",
                f"{x} of variant {cls.__name__} is {x.dtype}",
                where=str(what),
                hint="variants compute in float32, int32 and bool",
            )
        if isinstance(x, Binary) and x.op in ("//", "%") and x.dtype.is_float:
            raise ProgramError(
                "P106", f"{x.op} needs integers", where=str(x), hint="tw.floor(a / b)"
            )
        if isinstance(x, Binary) and x.a.dtype == dtypes.bool_:
            allowed = {*(BITWISE - {"<<", ">>"}), *COMPARISON}
            if x.op not in allowed:
                raise ProgramError(
                    "P106", f"{x.op} of two conditions", where=str(x), hint="use & | or where()"
                )
    if what.dtype == dtypes.bool_ and any(isinstance(x, Var) and x.name == "s" for x in walk(what)):
        raise ProgramError("P104", f"mask of {cls.__name__} reads the score", where=str(what))


# ---------------------------------------------------------------------------- values of a variant


def variant(cls: type) -> Any:
    """Class decorator: traces `logits(self, s, at)` and `mask(self, at)` (either may be absent).

    Class attributes `scalar(dtype, default)` and `per_head(dtype)` are read from memory at run time
    (float32 or int32). Instances are frozen values that may fix scalars:
    `SlidingWindow(window=512)`. Raises ProgramError (P codes).
    """
    traced = trace(cls)
    scalars = {v.name: v for v in traced.values if not v.heads}

    def __init__(self: Any, **values: float) -> None:
        for name, value in values.items():
            if name not in scalars:
                raise ArgumentError(
                    "A101",
                    f"{cls.__name__} has no scalar {name!r}",
                    where=name,
                    hint=f"scalars: {', '.join(scalars) or 'none'}; per-head values go to run()",
                )
            check_number(scalars[name], value)
        fixed = {n: v.default for n, v in scalars.items() if v.default is not None} | values
        object.__setattr__(self, "fixed", tuple(sorted(fixed.items())))

    def __setattr__(self: Any, name: str, value: Any) -> None:
        raise AttributeError(f"{cls.__name__} is frozen")

    def __repr__(self: Any) -> str:
        return f"{cls.__name__}({', '.join(f'{n}={v}' for n, v in self.fixed)})"

    def __eq__(self: Any, other: Any) -> bool:
        return type(other) is type(self) and other.fixed == self.fixed

    def __hash__(self: Any) -> int:
        return hash((type(self), self.fixed))

    functions: list[Callable[..., Any]] = [__init__, __setattr__, __repr__, __eq__, __hash__]
    for function in functions:
        setattr(cls, function.__name__, function)
    cls.traced = traced
    return cls


def check_number(value: Value, given: Any) -> None:
    """A Python or NumPy number fits a scalar. Raises ArgumentError[A102]."""
    kind: Any = numbers.Integral if value.dtype.is_int else numbers.Real
    if isinstance(given, bool) or not isinstance(given, kind):
        raise ArgumentError(
            "A102", f"{value.name}={given!r} is not a number of {value.dtype}", where=value.name
        )
    if value.dtype.is_int and not -(2**31) <= int(given) < 2**31:
        raise ArgumentError("A109", f"{value.name}={given!r} does not fit int32", where=value.name)


def traced_of(what: Any) -> Traced:
    """The expressions of a variant's value or class. Raises ArgumentError[A107]."""
    found = getattr(what, "traced", None)
    if isinstance(what, type) or not isinstance(found, Traced):
        raise ArgumentError(
            "A107",
            f"{what!r} is not a variant",
            where="variant",
            hint="decorate the class with @tw.variant and pass an instance: MyVariant()",
        )
    return found


# ---------------------------------------------------------------------------- built-in ones


@variant
class Full:
    """Every query sees every key."""


@variant
class Causal:
    """A query sees the keys up to its own position."""

    def mask(self, at: Any) -> Any:
        return at.kv <= at.qo


@variant
class Softcap:
    """Causal, with scores bent into (−soft_cap, soft_cap) by a tanh."""

    soft_cap = scalar("float32", 30.0)

    def logits(self, s: Any, at: Any) -> Any:
        return self.soft_cap * tanh(s / self.soft_cap)

    def mask(self, at: Any) -> Any:
        return at.kv <= at.qo


@variant
class SlidingWindow:
    """Causal, and only the last `window` keys, the query's own included."""

    window = scalar("int32")

    def mask(self, at: Any) -> Any:
        return (at.kv <= at.qo) & (at.qo - at.kv < self.window)


@variant
class Alibi:
    """Causal, with a bias that falls with the distance, by a slope for each query head."""

    slopes = per_head("float32")

    def logits(self, s: Any, at: Any) -> Any:
        return s + self.slopes[at.qo_head] * (at.kv - at.qo)

    def mask(self, at: Any) -> Any:
        return at.kv <= at.qo
