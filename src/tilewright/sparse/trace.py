"""The language: a Python function on coordinates, run once on symbols, becomes a `Program`.

    def spmm(A=sparse("m n"), X=dense("n d")):
        i, j, k = indices("m n d")
        return out[i, k](sum(A[i, j] * X[j, k], over=j))

Parameters are described by their default values. A reduction `over` a sparse axis ranges over the
*stored* coordinates of the first sparse operand that has the axis; where others have it too, the
first must make the body the identity where it is missing. Elsewhere a missing coordinate reads as
the tensor's fill. Nothing is executed here: `A[i, j]` is a node.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ProgramError
from tilewright.ir.names import is_users
from tilewright.ir.nodes import (
    ATOMIC,
    Access,
    Assign,
    Cast,
    Expr,
    Index,
    Kind,
    Program,
    Reduce,
    Role,
    Tensor,
    as_expr,
    binary,
    cast,
    children,
    equal,
    select,
    size_var,
    unary,
)  # fmt: skip
from tilewright.ir.rewrite import computed_in, free_vars, rename_reductions, walk


@dataclass(frozen=True, slots=True)
class Declared:
    """What a parameter's default value says of it; `trace` turns it into a `Tensor`."""

    dims: tuple[str | int, ...]
    dtype: DType | None = None
    is_sparse: bool = False
    like: str = ""
    fill: float = 0.0
    kind: Kind = "activation"
    strided: bool = False
    default: float | None = None


@dataclass(slots=True)
class _Trace:
    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    body: list[Assign] = field(default_factory=list)
    indices: list[Index] = field(default_factory=list)


_active: list[_Trace] = []


def _trace() -> _Trace:
    if not _active:
        raise ProgramError(
            "P101", "this only has a meaning inside a function under @program", where=_user_line()
        )
    return _active[-1]


def _user_line() -> str:
    """The file and line outside this package from which we were called."""
    frame = sys._getframe(1)
    while frame and frame.f_globals.get("__name__", "").startswith("tilewright."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


# ---------------------------------------------------------------------------- parameters


def _named(name: str, what: str, code: str = "P101") -> str:
    """A name that generated code can carry, and that no generated name meets."""
    if not is_users(name):
        raise ProgramError(
            code, f"{name!r} is no name for {what}", where=_user_line(),
            hint="letters, digits and single underscores, a letter first",
        )  # fmt: skip
    return name


def _dims(text: str) -> tuple[str | int, ...]:
    found: list[str | int] = []
    for d in text.split():
        found.append(int(d) if d.isdecimal() else _named(d, "a dimension"))
        if found[-1] == 0:
            raise ProgramError("P101", "a dimension of size 0", where=_user_line())
    return tuple(found)


def dense(dims: str, dtype: Any = None, *, kind: Kind = "activation", strided: bool = False) -> Any:
    """A dense parameter over named dimensions or sizes: `dense("n d")`, `dense("n 16")`.

    The last dimension is contiguous unless `strided`. `dtype` None: float32 until `typed` says
    otherwise."""
    return Declared(
        _dims(dims), dtypes.dtype(dtype) if dtype is not None else None, kind=kind, strided=strided
    )


def sparse(
    dims: str, dtype: Any = None, *, like: str = "", fill: float = 0.0, kind: Kind = "activation"
) -> Any:
    """A sparse parameter; its format is chosen by `decompose` (CSR otherwise).

    `like="A"` shares the structure of parameter A; `fill` is what a missing coordinate reads."""
    kind_ = dtypes.dtype(dtype) if dtype is not None else None
    return Declared(_dims(dims), kind_, True, like, fill, kind)


def scalar(dtype: Any = "float32", default: float | None = None) -> Any:
    """A run-time number. `default` is for scalars of attention variants; programs take none."""
    return Declared((), dtypes.dtype(dtype), default=default)


# ---------------------------------------------------------------------------- in the body


def indices(dims: str) -> Any:
    """Indices over dimensions: `i, j, k = indices("m n d")`. Their loops are called as the
    dimensions are, m, n and d; with `indices("row:m col:n")` they are called row and col.

    The same dimension may be given twice (square matrices): its second loop is m1. One dimension
    gives one index."""
    trace = _trace()
    made: list[Index] = []
    for word in dims.split():
        name, _, dim = word.rpartition(":")
        used = {x.name for x in trace.indices} | trace.tensors.keys()
        name = name or _loop_name(dim, used)
        if _named(name, "an index", "P102") in used:
            raise ProgramError(
                "P102", f"index {name!r} is not a new name", where=_user_line(),
                hint="indices and parameters have names of their own",
            )  # fmt: skip
        known = {d for t in trace.tensors.values() for d in t.dims}
        parsed: str | int = int(dim) if dim.isdigit() else dim
        if isinstance(parsed, str) and parsed not in known:
            raise ProgramError(
                "P102", f"no parameter has a dimension {parsed!r}", where=_user_line(),
                hint=f"dimensions: {', '.join(sorted(str(k) for k in known))}",
            )  # fmt: skip
        made.append(Index(name, dim=parsed))
        trace.indices.append(made[-1])
    return made[0] if len(made) == 1 else tuple(made)


def _loop_name(dim: str, used: set[str]) -> str:
    """The name of a dimension for an index, with a number where it is taken; `i` for a size. The
    names that outputs and temporaries have by default are taken."""
    base = "i" if dim.isdigit() else f"i_{dim}" if re.fullmatch(r"(out|temp)\d*", dim) else dim
    return next(n for n in chain((base,), (f"{base}{n}" for n in count(1))) if n not in used)


def size(dim: str) -> Expr:
    """The run-time size of a dimension."""
    known = {d for t in _trace().tensors.values() for d in t.dims if isinstance(d, str)}
    if dim not in known:
        raise ProgramError(
            "P102", f"no parameter has a dimension {dim!r}", where=_user_line(),
            hint=f"dimensions: {', '.join(sorted(known))}",
        )  # fmt: skip
    return size_var(dim)


def _reduce(op: str) -> Callable[..., Expr]:
    def reduction(value: Any, over: Index | tuple[Index, ...]) -> Expr:
        axes = over if isinstance(over, tuple) else (over,)
        if not axes or not all(isinstance(a, Index) for a in axes):
            raise ProgramError(
                "P104",
                f"{op} over {over!r}: not indices",
                where=_user_line(),
                hint="over=j or over=(j, k)",
            )
        body = as_expr(value)
        missing = {a.name for a in axes} - free_vars(body)
        if missing:
            raise ProgramError(
                "P104",
                f"{op} over {', '.join(sorted(missing))}, which its body does not use",
                where=_user_line(),
            )
        dtype = body.dtype.accumulator if body.dtype.kind != "b" else dtypes.int32
        return Reduce(op, axes, computed_in(body, dtype), dtype)

    reduction.__name__ = reduction.__qualname__ = op
    reduction.__doc__ = (
        f"The {op} of `value` over an index or a tuple of indices; its identity over none."
    )
    return reduction


sum_, max_, min_, prod = (_reduce(op) for op in ("sum", "max", "min", "prod"))


def _function(op: str) -> Callable[[Any], Expr]:
    def apply(x: Any) -> Expr:
        return unary(op, as_expr(x))

    apply.__name__ = apply.__qualname__ = op
    apply.__doc__ = f"{op} of a value, in float32 at least."
    return apply


exp, log, sqrt, rsqrt, tanh, sin, cos, abs_, floor = (
    _function(op) for op in ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "abs", "floor")
)


def sigmoid(x: Any) -> Expr:
    """1 / (1 + exp(-x))"""
    return 1.0 / (1.0 + exp(-as_expr(x)))


def maximum(a: Any, b: Any) -> Expr:
    """The larger of two values."""
    return binary("max", a, b)


def minimum(a: Any, b: Any) -> Expr:
    """The smaller of two values."""
    return binary("min", a, b)


def where(cond: Expr, a: Any, b: Any) -> Expr:
    """`a` where `cond` holds, else `b`."""
    if not isinstance(cond, Expr):
        raise ProgramError(
            "P101", f"the condition of where is {cond!r}", where=_user_line(),
            hint="`==` compares the text of expressions: write tw.equal(i, j)",
        )  # fmt: skip
    return select(cond, a, b)


# ---------------------------------------------------------------------------- outputs


@dataclass(frozen=True, slots=True)
class Output:
    """`out[i, k](value)` declares and computes an output; `temp` a value of the program's own.

    `out.like(A)` has the structure of A; `out.named("Y")` a name; `out.typed("float16")` a dtype.
    """

    role: Role
    name: str = ""
    dtype: DType | None = None
    structure_of: Tensor | None = None

    def like(self, tensor: Tensor) -> Output:
        if not tensor.is_sparse:
            raise ProgramError(
                "P103", f"{tensor.name} is dense: it has no structure to share", where=_user_line()
            )
        return replace(self, structure_of=tensor)

    def named(self, name: str) -> Output:
        return replace(self, name=name)

    def typed(self, dtype: Any) -> Output:
        return replace(self, dtype=dtypes.dtype(dtype))

    def __getitem__(self, coords: Any) -> Callable[[Any], Tensor]:
        coords = coords if isinstance(coords, tuple) else (coords,)
        return lambda value: _assign(self, coords, as_expr(value))


out, temp = Output("output"), Output("temp")


@dataclass(frozen=True, slots=True)
class Update:
    """`update(pages)[slot[t], d](value)` writes into a parameter, at computed coordinates;
    `update(Y).add[at[t]](value)` adds, also where coordinates repeat."""

    tensor: Tensor
    op: str = ""

    @property
    def add(self) -> Update:
        return replace(self, op="sum")

    def __getitem__(self, coords: Any) -> Callable[[Any], Tensor]:
        access = self.tensor[coords]
        return lambda value: self._assign(access, as_expr(value))

    def _assign(self, to: Access, value: Expr) -> Tensor:
        trace, written = _trace(), replace(self.tensor, role="output", kind="state")
        if self.op and written.dtype not in ATOMIC[self.op]:
            kinds = ", ".join(t.name for t in ATOMIC[self.op])
            raise ProgramError(
                "P106", f"{written.name} is {written.dtype}: add updates arrays of {kinds}",
                where=_user_line(), hint="add into an array of a wider type, then convert it",
            )  # fmt: skip
        trace.tensors[written.name] = written
        _check_bound(to.coords, value)
        _check_moves(to, value, self.op)
        target = Access(written, to.coords, written.dtype)
        trace.body.append(_statement(target, value, self.op))
        return written


def update(tensor: Tensor) -> Update:
    """Writes into a parameter: see `Update`."""
    return Update(tensor)


def _check_moves(to: Access, value: Expr, op: str) -> None:
    """What is updated is read where it is written, at plain indices, or nowhere: the order of
    updates is open, and computed coordinates may repeat."""
    plain = all(isinstance(c, Index) for c in to.coords)
    for x in walk(value):
        if not isinstance(x, Access) or x.tensor.name != to.tensor.name:
            continue
        if x.coords != to.coords or not plain or op:
            raise ProgramError(
                "P103", f"{to} is updated from {x}, which another update may have changed",
                where=_user_line(),
                hint=f"tw.update({to.tensor.name}).add[…](value) adds; else read from another "
                "parameter, or write to an output",
            )  # fmt: skip


def _assign(how: Output, coords: tuple[Any, ...], value: Expr) -> Tensor:
    trace = _trace()
    if not all(isinstance(c, Index) for c in coords):
        raise ProgramError(
            "P103",
            f"an {how.role} is written at plain indices",
            where=_user_line(),
            hint="update() writes elsewhere",
        )
    if len({c.name for c in coords}) != len(coords):
        raise ProgramError(
            "P103", "an index stands twice in the coordinates of an output", where=_user_line()
        )
    _check_bound(coords, value)
    number = len([t for t in trace.tensors.values() if t.role == how.role])
    name = how.name or {"output": "out", "temp": "temp"}[how.role] + (str(number) if number else "")
    _named(name, f"an {how.role}")
    if any(x.name == name for x in trace.indices):
        raise ProgramError("P102", f"{name} is an index already", where=_user_line())
    if name in trace.tensors:
        raise ProgramError("P101", f"{name} is defined twice", where=_user_line())
    dtype = how.dtype or (_output_dtype(value) if how.role == "output" else value.dtype)
    like = how.structure_of
    if like is not None and tuple(c.dim for c in coords) != like.dims:
        raise ProgramError(
            "P103",
            f"{name} has the structure of {like.name} but other dimensions",
            where=_user_line(),
        )
    tensor = Tensor(
        name,
        tuple(c.dim for c in coords),
        dtype,
        how.role,
        structure=like.structure if like else "",
        format=like.format if like else None,
    )
    trace.tensors[name] = tensor
    trace.body.append(_statement(Access(tensor, coords, dtype), value))
    return tensor


def _statement(to: Access, value: Expr, op: str = "") -> Assign:
    """`to = value`, or `to += value` with op "sum". No reduction in it binds an index that the
    coordinates or a reduction around it bind."""
    bound = frozenset().union(*(free_vars(c) for c in to.coords))
    return Assign(to, cast(rename_reductions(value, bound), to.dtype), op)


def _output_dtype(value: Expr) -> DType:
    """A float result takes the dtype of the last dense float activation, as a matrix product
    does."""
    if not value.dtype.is_float:
        return value.dtype
    floats = [
        x.dtype
        for x in walk(value)
        if isinstance(x, Access)
        and x.dtype.is_float
        and x.tensor.kind == "activation"
        and not x.tensor.is_sparse
        and x.tensor.dims
    ]
    return floats[-1] if floats and floats[-1].bits <= value.dtype.bits else value.dtype


def _check_bound(coords: tuple[Expr, ...], value: Expr) -> None:
    """Every index is in the coordinates or under a reduction, and runs over one dimension."""
    free: dict[str, Index] = {}

    def visit(x: Any, bound: frozenset[str]) -> None:
        if isinstance(x, Index):
            if x.name not in bound:
                free[x.name] = x
        elif isinstance(x, Reduce):
            visit(x.body, bound | {a.name for a in x.axes})
        elif isinstance(x, Access):
            for c, dim in zip(x.coords, x.tensor.dims, strict=True):
                if isinstance(c, Index) and c.dim != dim:
                    raise ProgramError(
                        "P102",
                        f"{c.name} runs over {c.dim} but stands for {dim} in {x}",
                        where=_user_line(),
                        hint="give the index and the tensor the same dimension name",
                    )
                visit(c, bound)
        else:
            for child in children(x):
                visit(child, bound)

    visit(value, frozenset())
    written = {x.name for c in coords for x in walk(c) if isinstance(x, Index)}
    loose = sorted(free.keys() - written)
    if loose:
        raise ProgramError(
            "P104",
            f"index {', '.join(loose)} is neither in the output nor under a reduction",
            where=_user_line(),
            hint=f"write sum(…, over={loose[0]})",
        )


# ---------------------------------------------------------------------------- tracing


@contextmanager
def _tracing(name: str) -> Iterator[_Trace]:
    _active.append(_Trace(name))
    try:
        yield _active[-1]
    finally:
        _active.pop()


def trace(
    function: Callable[..., Any],
    given: dict[str, DType],
    formats: dict[str, Any],
    default: Callable[[int], Any],
) -> Program:
    """Run `function` on symbols. `given` overrides dtypes by parameter; `formats` by sparse
    parameter (shared by its structure), elsewhere `default` of its number of dimensions. Raises
    ProgramError."""
    declared = {n: p.default for n, p in inspect.signature(function).parameters.items()}
    place = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
    with _tracing(function.__name__) as t:
        for name, d in declared.items():
            if not isinstance(d, Declared):
                raise ProgramError(
                    "P101",
                    f"parameter {name} of {function.__name__} does not say what it is",
                    where=place,
                    hint=f'give it a default: {name}=tw.dense("m n")',
                )
            _named(name, "a parameter")
            t.tensors[name] = _parameter(name, d, declared, given, formats, default, place)
        returned = function(**t.tensors)
        results = returned if isinstance(returned, tuple) else (returned,)
        made = Program(t.name, "coordinates", _in_order(t, results, place), tuple(t.body))
        _check_dtypes(made, place)
        return made


def _in_order(t: _Trace, results: tuple[Any, ...], place: str) -> tuple[Tensor, ...]:
    """The tensors of a program, its outputs as they are returned: each once, and nothing else."""
    names = [r.name if isinstance(r, Tensor) else repr(r) for r in results]
    outputs = {n: x for n, x in t.tensors.items() if x.role == "output"}
    made = [n for n, x in outputs.items() if x.kind != "state"]
    updated = set(outputs) - set(made)
    if not t.body or sorted(set(names) - updated) != sorted(made) or len(set(names)) != len(names):
        raise ProgramError(
            "P101",
            f"{t.name} must return what it computes, each output once: it returns "
            f"{', '.join(names)} and computes {', '.join(outputs) or 'nothing'}",
            where=place,
            hint="return tw.out[i](…)",
        )
    returned = [outputs[n] for n in names if n in made]
    return (*(x for n, x in t.tensors.items() if n not in made), *returned)


def _check_dtypes(program: Program, place: str) -> None:
    """float8 arrays can be viewed and handed on; no target computes with them yet."""
    casts = (x.dtype for s in program.body for x in walk(s.value) if isinstance(x, Cast))
    for kind in (*(t.dtype for t in program.tensors), *casts):
        if kind.is_float and kind.bits < 16:
            raise ProgramError(
                "P106",
                f"{program.name} computes with {kind}",
                where=place,
                hint="convert to float16 or bfloat16 before the call",
            )


def _parameter(
    name: str, d: Declared, declared: dict[str, Any], given: dict[str, DType],
    formats: dict[str, Any], default: Callable[[int], Any], place: str,
) -> Tensor:  # fmt: skip
    dtype = given.get(name) or d.dtype or dtypes.float32
    if d.default is not None:
        raise ProgramError(
            "P101",
            f"scalar {name} of a program has a default",
            where=place,
            hint="pass the number in the call",
        )
    if not d.is_sparse:
        return Tensor(name, d.dims, dtype, kind=d.kind, strided=d.strided)
    owner = d.like or name
    other = declared.get(owner)
    if not isinstance(other, Declared) or not other.is_sparse or other.dims != d.dims:
        raise ProgramError(
            "P101",
            f"{name} is like {owner!r}, which is no sparse parameter of its dimensions",
            where=place,
        )
    fmt = formats.get(owner) or default(len(d.dims))
    if fmt.ndim != len(d.dims):
        raise ProgramError(
            "P107", f"{fmt} stores {fmt.ndim} dimensions, {name} has {len(d.dims)}", where=place
        )
    return Tensor(name, d.dims, dtype, format=fmt, structure=owner, fill=d.fill, kind=d.kind)


__all__ = [
    "Declared",
    "Index",
    "Output",
    "abs_",
    "cos",
    "dense",
    "equal",
    "exp",
    "floor",
    "indices",
    "log",
    "max_",
    "maximum",
    "min_",
    "minimum",
    "out",
    "prod",
    "rsqrt",
    "scalar",
    "sigmoid",
    "sin",
    "size",
    "sparse",
    "sqrt",
    "sum_",
    "tanh",
    "temp",
    "trace",
    "update",
    "where",
]
