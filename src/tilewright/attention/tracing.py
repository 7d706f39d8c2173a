"""Tracing of attention variants: the hooks of a class are run on symbols and give expressions."""

import difflib
import inspect
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.errors import ProgramError, TilewrightError
from tilewright.ir import core as ir
from tilewright.ir.names import size_name
from tilewright.sparse.trace import Declared

POSITIONS = (
    "qo", "kv", "qo_head", "kv_head", "request", "q_token", "key", "qo_len", "kv_len", "dim",
)  # fmt: skip
SCORE = ir.Var("s", dtypes.float32)
NO_SINK = ir.Const(float("-inf"), dtypes.float32)
ROW = ir.Buffer("row", dtypes.float32, (ir.Var(size_name("row_0")),))
"""What a hook of rows changes: of q, of k or of o; 0 outside."""
SAME_ROW = ir.Load(ROW, (ir.Var("at.dim", dtypes.int32),), dtypes.float32)
VALUE_TYPES = (dtypes.float32, dtypes.int32)
MOST_NODES, MOST_DEPTH = 4096, 150  # of a hook, as a tree


class At:
    """Where a score is: `qo` and `kv` are the positions of its query and its key.

    `qo_head`, `kv_head`, `request`: numbers; `q_token`: the row of q; `key`: the number of the key
    in its request (its position unless the table says otherwise); `qo_len`, `kv_len`: queries and
    keys of the request; `dim`, in hooks of rows: the number of an element.
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

    dtype: dtypes.DType
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


def per_channel(dtype: Any = "float32") -> Any:
    """A run-time vector of any length for hooks of rows: `weight[at.dim]`, or any other int32
    index. Beyond its length it is 0."""
    return Tensor(dtypes.dtype(dtype), ("dim",))


def bit_mask() -> Any:
    """A run-time matrix (rows of q, words) of uint32 or int32 words, bit n % 32 of word n // 32:
    `tree[n]` is bit n of the query's row as a condition. Beyond the words it is false."""
    return Tensor(dtypes.int32, ("bit",))


@dataclass(frozen=True, slots=True)
class Value:
    """A run-time value of a variant. `by`: "" for a scalar, else what it is read by: qo_head or
    kv_head, request, q_token, key (of a request), bit (of a row of q) or dim (of a row)."""

    name: str
    dtype: dtypes.DType
    default: float | None = None
    by: str = ""


@dataclass(frozen=True, slots=True)
class Traced:
    """A variant after tracing: `logits` float32, `mask` bool, over `s`, `at.…` and the values;
    `sink` float32 over what no key decides. `query`, `key` and `output`: element `at.dim` of a new
    row, float32, over elements of `ROW`. `softmax`: None where the class does not say, which means
    that there is one."""

    name: str
    logits: ir.Expr
    mask: ir.Expr
    values: tuple[Value, ...]
    sink: ir.Expr = NO_SINK
    query: ir.Expr = SAME_ROW
    key: ir.Expr = SAME_ROW
    output: ir.Expr = SAME_ROW
    softmax: bool | None = None

    def __post_init__(self) -> None:
        counts = {f"{v.name}_{n}" for v in self.values for n in ("rows", "columns")}
        for name in (v.name for v in self.values):
            if name in counts or not name.isascii():
                text = f"a value of variant {self.name} is named {name!r}"
                hint = "ASCII letters, digits and _; no _rows or _columns of another value"
                raise ProgramError("P101", text, where=name, hint=hint)
        for name in HOOKS:
            _check_size(self.name, name, getattr(self, name))

    def extras(self, *hosted: str) -> str:
        """What only some families of kernels host and is not among `hosted`, or ""; `softmax`: that
        there is none."""
        names = {n: f"a hook of {n} rows" for n in ROW_HOOKS if getattr(self, n) != SAME_ROW}
        names |= {"softmax": "no softmax"} if self.softmax is False else {}
        return " and ".join(text for name, text in names.items() if name not in hosted)

    def __str__(self) -> str:
        hooks = {name: getattr(self, name) for name in HOOKS} | {"softmax": self.softmax}
        absent = (NO_SINK, SAME_ROW, None)
        lines = (f"\n  {name} = {e}" for name, e in hooks.items() if e not in absent)
        return f"variant {self.name}{''.join(lines)}"


# ---------------------------------------------------------------------------- tracing


class _Reads:
    """What `self.slopes` is while a variant is traced."""

    def __init__(self, name: str, declared: Tensor, used: dict[str, str]) -> None:
        self.name, self.declared, self.used = name, declared, used

    def __getitem__(self, index: Any) -> ir.Expr:
        if self.declared.by == ("key",):
            return self._load("request", _require_index(self.name, index))
        if self.declared.by == ("dim",):
            return self._load(ir.Const(0, dtypes.int32), _require_index(self.name, index))
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

    def _load(self, by: str | ir.Expr, *column: ir.Expr) -> ir.Expr:
        shape = tuple(ir.Var(size_name(f"{self.name}_{n}")) for n in range(1 + len(column)))
        buffer = ir.Buffer(self.name, self.declared.dtype, shape)
        row = ir.Var(f"at.{by}", dtypes.int32) if isinstance(by, str) else by
        return ir.Load(buffer, (row, *column), self.declared.dtype)


class _Row:
    """The row that a hook of rows changes: `q[d]` is its element d, float32."""

    def __getitem__(self, index: Any) -> ir.Expr:
        return ir.Load(ROW, (_require_index(ROW.name, index),), dtypes.float32)


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

    def query(self, row: _Row, at: At) -> ir.Expr:
        return row[at.dim]

    key = output = query


ROW_HOOKS = {"query": "q, ", "key": "k, ", "output": "o, "}
HOOKS = {
    name: f"def {name}(self, {first}at)"
    for name, first in ({"logits": "s, ", "mask": "", "sink": ""} | ROW_HOOKS).items()
}
RESERVED = frozenset(
    {"self", "q", "kv", "plan", "out", "workers", "qo_indptr", "q_dtype", "variant", "sm_scale"}
    | {"scratch", "invariant", "lengths", "fixed", "traced", "softmax", ROW.name, *HOOKS}
)
"""Names that no value of a variant may have: other arguments of its users, its own attributes."""
_SCORES = {*POSITIONS} - {"dim"}
_QUERIES = {*POSITIONS} - {"kv", "key"}
_READS = {  # what a hook may read of `at`, and the score
    "logits": {*_SCORES, "s"}, "mask": _SCORES, "sink": _QUERIES - {"dim"},
    "query": _QUERIES, "key": {"kv", "key", "kv_head", "request", "kv_len", "dim"},
    "output": _QUERIES,
}  # fmt: skip


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
    hooks = {name: _call(cls, me, name) for name in HOOKS}
    for name, hook in hooks.items():
        _check(cls, name, hook)
    softmax = inspect.getattr_static(cls, "softmax", None)
    if softmax is not None and not isinstance(softmax, bool):
        text = f"softmax of variant {cls.__name__} is {softmax!r}, neither True nor False"
        raise ProgramError("P106", text, hint="softmax = False: logits are the weights themselves")
    if softmax is False and hooks["sink"] != NO_SINK:
        text = f"variant {cls.__name__} has a sink and no softmax"
        raise ProgramError("P101", text, hint="a sink joins the denominator of a softmax")
    values = tuple(
        Value(n, d.dtype, by=used.get(n, d.by[0]))
        if isinstance(d, Tensor)
        else Value(n, d.dtype, d.default)
        for n, d in declared.items()
    )
    floats = {n: ir.cast(hook, dtypes.float32) for n, hook in hooks.items() if n != "mask"}
    return Traced(cls.__name__, mask=hooks["mask"], values=values, softmax=softmax, **floats)


def chained(first: Traced, then: Traced) -> dict[str, ir.Expr]:
    """The hooks of rows of a variant, and over the rows that they change those of another."""

    def over(old: ir.Expr, new: ir.Expr) -> ir.Expr:
        def visit(x: Any) -> Any:
            own = isinstance(x, ir.Load) and x.buffer == ROW
            return ir.substitute(old, {"at.dim": x.index[0]}) if own else x

        return ir.transform(new, visit)

    return {name: over(getattr(first, name), getattr(then, name)) for name in ROW_HOOKS}


def _declared(cls: type) -> dict[str, Any]:
    """The run-time values of a class and its bases, in the order of definition."""
    declared: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Tensor) or (isinstance(value, Declared) and not value.dims):
                declared[name] = value
            elif isinstance(value, Declared):
                text = f"{name} of variant {cls.__name__} is a tensor"
                hint = "scalar, per_head, per_request, per_token, per_key, per_channel, bit_mask"
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


def _call(cls: type, me: Any, name: str) -> ir.Expr:
    """The expression that a hook returns."""
    first = {"logits": [SCORE], "mask": [], "sink": []}.get(name, [_Row()])
    arguments = (*first, At())
    try:
        result = getattr(me, name)(*arguments)
    except TilewrightError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        text = f"{name} of variant {cls.__name__} cannot be traced: {reason}"
        hint = "s, q[d], at.qo, at.kv … are symbols: compute with operators, tw.where, tw.tanh …; "
        hint += "arrays come in as tw.per_head, tw.per_token … values"
        raise ProgramError("P101", text, hint=hint) from error
    if result is None:
        raise ProgramError("P101", f"{name} of variant {cls.__name__} returns nothing")
    if isinstance(result, (bool, np.bool_)):
        text = f"{name} of variant {cls.__name__} is {result}: a condition that Python has decided"
        hint = "`==` compares the text of expressions: write tw.equal(a, b) or ~tw.equal(a, b)"
        raise ProgramError("P101", text, hint=hint)
    hook = ir.as_expr(result, None if name == "mask" else dtypes.float32)
    _check_size(cls.__name__, name, hook)
    return hook


def _check_size(variant: str, name: str, hook: ir.Expr) -> None:
    """A hook is small enough to be written as text, where what is used twice is repeated.
    Raises ProgramError[P101]."""
    level, nodes, depth = [hook], 0, 0
    while level:
        nodes, depth = nodes + len(level), depth + 1
        if nodes > MOST_NODES or depth > MOST_DEPTH:
            text = f"{name} of variant {variant} has more than {MOST_NODES} operations"
            text = f"{text}, or more than {MOST_DEPTH} inside each other"
            raise ProgramError("P101", text, hint="compute it outside: tw.per_token, tw.per_key …")
        level = [child for x in level for child in ir.children(x)]


def _check(cls: type, name: str, hook: ir.Expr) -> None:
    """Only scalars of 32 bits, by operations that each target has on vectors too, of what the hook
    may read; a mask is a condition, others are numbers."""
    if (name == "mask") != (hook.dtype == dtypes.bool_):
        text = f"{name} of {cls.__name__} is {hook.dtype}"
        hint = "return a comparison, as at.kv <= at.qo" if name == "mask" else "return a number"
        raise ProgramError("P106", text, where=str(hook), hint=hint)
    for x in ir.walk(hook):
        if not isinstance(x, (ir.Const, ir.Var, ir.Load, ir.Binary, ir.Unary, ir.Select, ir.Cast)):
            text = f"{type(x).__name__} cannot stand in variant {cls.__name__}"
            hint = "a variant computes with s, at and its own values"
            raise ProgramError("P101", text, where=str(hook), hint=hint)
        read = x.name.removeprefix("at.") if isinstance(x, ir.Var) else ""
        if isinstance(x, ir.Load) and (x.buffer == ROW or isinstance((*x.index, 0)[0], ir.Const)):
            read = "dim"  # elements of rows, and what is by channel
        if read and read not in _READS[name]:
            own = sorted(f"at.{n}" for n in _READS[name] - {"s"})
            text, hint = f"{name} of {cls.__name__} reads {x}", f"it may read {', '.join(own)}"
            raise ProgramError("P104", text, where=str(hook), hint=hint)
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
