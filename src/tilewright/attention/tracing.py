"""Tracing of attention variants: the hooks of a class are run on symbols and give expressions."""

import difflib
import inspect
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ProgramError, TilewrightError
from tilewright.ir import nodes as ir
from tilewright.ir.names import size_name
from tilewright.ir.rewrite import walk
from tilewright.sparse.trace import Declared

POSITIONS = (
    "qo", "kv", "qo_head", "kv_head", "request", "q_token", "key", "qo_len", "kv_len",
)  # fmt: skip
SCORE = ir.Var("s", dtypes.float32)
VALUE_TYPES = (dtypes.float32, dtypes.int32)
RESERVED = frozenset(
    {"self", "q", "kv", "plan", "out", "workers", "qo_indptr", "q_dtype", "variant", "sm_scale"}
    | {"scratch", "invariant", "fixed", "traced", "logits", "mask", "sink"}
)
"""Names that no value of a variant may have: other arguments of its users, its own attributes."""


class At:
    """Where a score is: `qo` and `kv` are the positions of its query and its key.

    `qo_head`, `kv_head`, `request`: numbers; `q_token`: the row of q; `key`: the number of the key
    in its request (its position unless the table says otherwise); `qo_len`, `kv_len`: queries and
    keys of the request.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> ir.Expr:
        if name not in POSITIONS:
            hint = f"one of {', '.join(f'at.{n}' for n in POSITIONS)}"
            raise ProgramError("P101", f"at.{name} is not known", hint=hint)
        return ir.Var(f"at.{name}", dtypes.int32)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A run-time tensor of a variant; `by`: what it may be read by, see `Value`."""

    dtype: DType
    by: tuple[str, ...]


def per_head(dtype: Any = "float32") -> Any:
    """A run-time vector with one value a head: `slopes[at.qo_head]` or `sinks[at.kv_head]`."""
    return Tensor(dtypes.dtype(dtype), ("qo_head", "kv_head"))


def per_request(dtype: Any = "int32") -> Any:
    """A run-time vector with one value a request: `prefix[at.request]`."""
    return Tensor(dtypes.dtype(dtype), ("request",))


def per_token(dtype: Any = "int32") -> Any:
    """A run-time vector with one value a row of q: `depth[at.q_token]`."""
    return Tensor(dtypes.dtype(dtype), ("q_token",))


def per_key(dtype: Any = "int32") -> Any:
    """A run-time matrix (requests, any width) with one value a key: `document[at.key]`, or of any
    other key of the request, as `document[at.qo]` of the query's own. Beyond the width it is 0."""
    return Tensor(dtypes.dtype(dtype), ("key",))


def bit_mask() -> Any:
    """A run-time matrix (rows of q, words) of uint32 or int32 words, bit n % 32 of word n // 32:
    `tree[n]` is bit n of the query's row as a condition. Beyond the words it is false."""
    return Tensor(dtypes.int32, ("bit",))


@dataclass(frozen=True, slots=True)
class Value:
    """A run-time value of a variant. `by`: "" for a scalar, else what it is read by: qo_head or
    kv_head, request, q_token, key (of a request) or bit (of a row of q)."""

    name: str
    dtype: DType
    default: float | None = None
    by: str = ""


@dataclass(frozen=True, slots=True)
class Traced:
    """A variant after tracing: `logits` float32, `mask` bool, over `s`, `at.…` and the values;
    `sink` float32 over what no key decides, None where there is none."""

    name: str
    logits: ir.Expr
    mask: ir.Expr
    values: tuple[Value, ...]
    sink: ir.Expr | None = None

    def __str__(self) -> str:
        sink = "" if self.sink is None else f"\n  sink = {self.sink}"
        return f"variant {self.name}\n  logits = {self.logits}\n  mask = {self.mask}{sink}"


# ---------------------------------------------------------------------------- tracing


class _Reads:
    """What `self.slopes` is while a variant is traced."""

    def __init__(self, name: str, declared: Tensor, used: dict[str, str]) -> None:
        self.name, self.declared, self.used = name, declared, used

    def __getitem__(self, index: Any) -> ir.Expr:
        if self.declared.by == ("key",):
            return self._load("request", _require_index(self.name, index))
        if self.declared.by == ("bit",):
            n = _require_index(self.name, index)
            return ir.equal(self._load("q_token", n >> 5) >> (n & 31) & 1, 1)
        by = index.name.removeprefix("at.") if isinstance(index, ir.Var) else ""
        if by not in self.declared.by:
            accesses = [f"{self.name}[at.{by}]" for by in self.declared.by]
            text = f"{self.name}[{index}]: it is read as {' or '.join(accesses)}"
            raise ProgramError("P101", text)
        if self.used.setdefault(self.name, by) != by:
            text = f"{self.name} is read by query head and by KV head"
            raise ProgramError("P102", text, hint="declare two values")
        return self._load(by)

    def _load(self, by: str, *column: ir.Expr) -> ir.Expr:
        shape = tuple(ir.Var(size_name(f"{self.name}_{n}")) for n in range(1 + len(column)))
        buffer = ir.Buffer(self.name, self.declared.dtype, shape)
        return ir.Load(buffer, (ir.Var(f"at.{by}", dtypes.int32), *column), self.declared.dtype)


def _require_index(name: str, index: Any) -> ir.Expr:
    """An index of a tensor as an int32 expression. Raises ProgramError[P106]."""
    try:
        entry = ir.as_expr(index, None)
    except (TypeError, TilewrightError):
        entry = None
    if entry is None or entry.dtype != dtypes.int32:
        raise ProgramError("P106", f"{name}[{index}]: the index is no int32 number")
    return entry


class _Defaults:
    """The hooks of a variant that has none; `super()` of a base class ends here."""

    def logits(self, s: ir.Expr, at: At) -> ir.Expr:
        return s

    def mask(self, at: At) -> ir.Expr:
        return ir.Const(True, dtypes.bool_)

    def sink(self, at: At) -> Any:
        return NO_SINK


NO_SINK = ir.Const(float("-inf"), dtypes.float32)
HOOKS = {
    "logits": "def logits(self, s, at)",
    "mask": "def mask(self, at)",
    "sink": "def sink(self, at)",
}


def trace(cls: type) -> Traced:
    """Run the hooks of a class on symbols. Raises ProgramError (P codes)."""
    declared = _declared(cls)
    used: dict[str, str] = {}
    symbols: dict[str, Any] = {}
    for name, d in declared.items():
        if name in RESERVED:
            text = f"a value of variant {cls.__name__} is named {name!r}"
            hint = f"Attention uses these names itself: {', '.join(sorted(RESERVED))}"
            raise ProgramError("P101", text, where=name, hint=hint)
        if d.dtype not in VALUE_TYPES:
            hint = "run-time values are float32 or int32"
            raise ProgramError("P106", f"{name} of variant {cls.__name__} is {d.dtype}", hint=hint)
        if isinstance(d, Tensor):
            symbols[name] = _Reads(name, d, used)
        else:
            symbols[name] = ir.Load(ir.Buffer(name, d.dtype, ()), (), d.dtype)
    _check_functions(cls)
    # An instance of a subclass, so that super() and properties work in a hook as anywhere.
    me = object.__new__(type(cls.__name__, (cls, _Defaults), symbols))
    logits = _call(cls, me, "logits", (SCORE, At()))
    mask = _call(cls, me, "mask", (At(),))
    sink = _call(cls, me, "sink", (At(),))
    if mask.dtype != dtypes.bool_:
        text = f"mask of {cls.__name__} is {mask.dtype}, not bool"
        hint = "return a comparison, as at.kv <= at.qo"
        raise ProgramError("P106", text, where=str(mask), hint=hint)
    for name, hook in (("logits", logits), ("sink", sink)):
        if hook.dtype == dtypes.bool_:
            raise ProgramError("P106", f"{name} of {cls.__name__} is a condition", where=str(hook))
    for hook in (logits, mask, sink):
        _check(cls, hook)
    if {"s", "at.kv", "at.key"} & {x.name for x in walk(sink) if isinstance(x, ir.Var)}:
        text = f"sink of {cls.__name__} reads a score or a key"
        hint = "it is one logit a row: a function of at.qo_head, at.qo …"
        raise ProgramError("P104", text, where=str(sink), hint=hint)
    values = tuple(
        Value(n, d.dtype, by=used.get(n, d.by[0]))
        if isinstance(d, Tensor)
        else Value(n, d.dtype, d.default)
        for n, d in declared.items()
    )
    end = None if sink == NO_SINK else ir.cast(sink, dtypes.float32)
    return Traced(cls.__name__, ir.cast(logits, dtypes.float32), mask, values, end)


def _declared(cls: type) -> dict[str, Any]:
    """The run-time values of a class and its bases, in the order of definition."""
    declared: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Tensor) or (isinstance(value, Declared) and not value.dims):
                declared[name] = value
            elif isinstance(value, Declared):
                text = f"{name} of variant {cls.__name__} is a tensor"
                hint = "values: scalar, per_head, per_request, per_token, per_key, bit_mask"
                raise ProgramError("P101", text, hint=hint)
            else:
                declared.pop(name, None)  # a subclass made it a constant
    return declared


def _check_functions(cls: type) -> None:
    """Hooks have their parameters; each other public function of the class is called by a hook, by
    the names that the hooks' code reads: else it is a hook that somebody misspelt."""
    for name, wanted in HOOKS.items():
        function = inspect.getattr_static(cls, name, None)
        parameters = wanted.count(",") + 1
        if function is not None and not (
            isinstance(function, FunctionType)
            and len(inspect.signature(function).parameters) == parameters
        ):
            text = f"{name} of variant {cls.__name__} is not {wanted}"
            raise ProgramError("P101", text, hint=f"write {wanted}")
    members = (member for base in cls.__mro__ for member in vars(base).items())
    functions = [(name, f) for name, f in members if isinstance(f, FunctionType)]
    called, new = set(HOOKS), set(HOOKS)
    while new:
        names = {n for name, f in functions if name in new for n in _names_read(f.__code__)}
        new = names - called
        called |= new
    for name, value in vars(cls).items():
        if isinstance(value, FunctionType) and not name.startswith("_") and name not in called:
            near = difflib.get_close_matches(name, HOOKS, 1, 0.5)
            text = f"{name} of variant {cls.__name__} is no hook, and no hook calls it"
            hint = f"hooks: {', '.join(HOOKS)}; a name with _ in front is not looked at"
            hint = f"did you mean {near[0]}?" if near else hint
            raise ProgramError("P101", text, where=name, hint=hint)


def _names_read(code: CodeType) -> set[str]:
    inner = (_names_read(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*inner)


def _call(cls: type, me: Any, name: str, arguments: tuple[Any, ...]) -> ir.Expr:
    """The expression that a hook returns."""
    try:
        result = getattr(me, name)(*arguments)
    except TilewrightError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        text = f"{name} of variant {cls.__name__} cannot be traced: {reason}"
        hint = "s, at.qo, at.kv … are symbols: compute with operators, tw.where, tw.tanh …; "
        hint += "arrays come in as tw.per_head, tw.per_token … values"
        raise ProgramError("P101", text, hint=hint) from error
    if result is None:
        raise ProgramError("P101", f"{name} of variant {cls.__name__} returns nothing")
    if isinstance(result, (bool, np.bool_)):
        text = f"{name} of variant {cls.__name__} is {result}: a condition that Python has decided"
        hint = "`==` compares the text of expressions: write tw.equal(a, b) or ~tw.equal(a, b)"
        raise ProgramError("P101", text, hint=hint)
    return ir.as_expr(result, None if name == "mask" else dtypes.float32)


def _check(cls: type, hook: ir.Expr) -> None:
    """Only scalars of 32 bits, by operations that each target has on vectors too."""
    for x in walk(hook):
        if not isinstance(x, (ir.Const, ir.Var, ir.Load, ir.Binary, ir.Unary, ir.Select, ir.Cast)):
            text = f"{type(x).__name__} cannot stand in variant {cls.__name__}"
            hint = "a variant computes with s, at and its own values"
            raise ProgramError("P101", text, where=str(hook), hint=hint)
        if isinstance(x, ir.Var) and x.name != "s" and not x.name.startswith("at."):
            text = f"{x.name} means nothing in variant {cls.__name__}"
            raise ProgramError("P104", text, where=str(hook))
        if x.dtype not in (*VALUE_TYPES, dtypes.bool_):
            text = f"{x} of variant {cls.__name__} is {x.dtype}"
            hint = "variants compute in float32, int32 and bool"
            raise ProgramError("P106", text, where=str(hook), hint=hint)
        if isinstance(x, ir.Binary) and x.op in ("//", "%") and x.dtype.is_float:
            text = f"{x.op} needs integers"
            raise ProgramError("P106", text, where=str(x), hint="tw.floor(a / b)")
        if isinstance(x, ir.Binary) and x.a.dtype == dtypes.bool_:
            allowed = {*(ir.BITWISE - {"<<", ">>"}), *ir.COMPARISON}
            if x.op not in allowed:
                text = f"{x.op} of two conditions"
                raise ProgramError("P106", text, where=str(x), hint="use & | or where()")
    if hook.dtype == dtypes.bool_ and any(x.name == "s" for x in walk(hook, ir.Var)):
        raise ProgramError("P104", f"mask of {cls.__name__} reads the score", where=str(hook))
