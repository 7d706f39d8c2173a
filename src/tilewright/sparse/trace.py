"""The language: a Python function on coordinates, run once on symbols, becomes a `Program`.

    def spmm(A=sparse("m n"), X=dense("n d")):
        i, j, k = indices("m n d")
        return out[i, k](sum(A[i, j] * X[j, k], over=j))

Parameters are described by their default values. A reduction `over` an axis that one sparse operand
has ranges over the *stored* coordinates of that operand. Where several have the axis, it ranges
over all coordinates, and the body must be the identity of the reduction where one of them, or where
all of them, are missing; else `where=` names the coordinates, as in
`max(A[i, j] * B[i, j], over=j, where=stored(A[i, j]))`. Elsewhere a missing coordinate reads as the
tensor's fill. Nothing is executed here: `A[i, j]` is a node.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, get_args

from tilewright import dtypes
from tilewright.errors import ProgramError
from tilewright.ir.nodes import Kind, Program, Tensor
from tilewright.sparse import expressions
from tilewright.sparse.expressions import *  # noqa: F403 - the language is imported from here
from tilewright.sparse.formats import plain
from tilewright.sparse.outputs import out, temp, update  # noqa: F401
from tilewright.sparse.tracing import Trace, checked_name, refusal, tracing

# What a TypeError says of symbols where they cannot be, as in np.exp(x), float(x) or len(x), and of
# operations of the language that lack an argument.
_OPERATIONS = "|".join(name.strip("_") for name in expressions.__all__)
_OF_SYMBOLS = re.compile(
    r"('|not |type |to )(Access|Binary|Cast|Const|Index|Reduce|Select|Stored|Tensor|Unary|Var)\b"
    rf"|^({_OPERATIONS})_?\(\)|^Update\."
)


@dataclass(frozen=True, slots=True)
class Declared:
    """What a parameter's default value says of it; `trace` turns it into a `Tensor`."""

    dims: tuple[str | int, ...]
    dtype: dtypes.DType | None = None
    is_sparse: bool = False
    like: str = ""
    fill: float = 0.0
    kind: Kind = "activation"
    strided: bool = False
    default: float | None = None


def _dims(text: str, kind: Kind, like: str = "") -> tuple[str | int, ...]:
    if not all(isinstance(x, str) for x in (text, kind, like)) or kind not in get_args(Kind):
        hint = f'names, as "m n", and one of {", ".join(get_args(Kind))}'
        raise refusal("P101", f"a parameter of {text!r}, kind {kind!r}, like {like!r}", hint=hint)
    parts: list[str | int] = []
    for d in text.split():
        parts.append(int(d) if d.isdecimal() else checked_name(d, "a dimension"))
        if parts[-1] == 0:
            raise refusal("P101", "a dimension of size 0")
    return tuple(parts)


def dense(dims: str, dtype: Any = None, *, kind: Kind = "activation", strided: bool = False) -> Any:
    """A dense parameter over named dimensions or sizes: `dense("n d")`, `dense("n 16")`.

    The last dimension is contiguous unless `strided`. `dtype` None: float32 until `typed` says
    otherwise. `kind` says how a GPU reads it: a `"weight"` is not written while kernels run. Raises
    ProgramError[P101]."""
    kind_ = dtypes.dtype(dtype) if dtype is not None else None
    return Declared(_dims(dims, kind), kind_, kind=kind, strided=bool(strided))


def sparse(
    dims: str, dtype: Any = None, *, like: str = "", fill: float = 0.0, kind: Kind = "activation"
) -> Any:
    """A sparse parameter; its format is chosen by `decompose` (CSR otherwise).

    `like="A"` shares the structure of parameter A; `fill` is what a missing coordinate reads; the
    rest as for `dense`."""
    kind_ = dtypes.dtype(dtype) if dtype is not None else None
    return Declared(_dims(dims, kind, like), kind_, True, like, dtypes.real("fill", fill), kind)


def scalar(dtype: Any = "float32", default: float | None = None) -> Any:
    """A run-time number. `default` is for scalars of attention variants; programs take none."""
    return Declared((), dtypes.dtype(dtype), default=default)


def trace(
    function: Callable[..., Any], dtypes_by_name: dict[str, dtypes.DType], formats: dict[str, Any]
) -> Program:
    """Run `function` on symbols. `dtypes_by_name` overrides the dtypes of parameters. `formats` has
    the formats of sparse parameters; the others are stored as `formats.plain` says. Raises
    ProgramError."""
    code = getattr(function, "__code__", None)
    if code is None:
        raise refusal("P101", f"{function!r} is no function of Python")
    declared = {n: p.default for n, p in inspect.signature(function).parameters.items()}
    line = f"{code.co_filename}:{code.co_firstlineno}"
    with tracing(function.__name__) as t:
        for name, d in declared.items():
            if not isinstance(d, Declared):
                rule = f"parameter {name} of {function.__name__} does not say what it is"
                hint = f'give it a default: {name}=tw.dense("m n")'
                raise ProgramError("P101", rule, where=line, hint=hint)
            checked_name(name, "a parameter")
            t.tensors[name] = _parameter(name, d, declared, dtypes_by_name, formats, line)
        try:
            returned = function(**t.tensors)
        except TypeError as error:
            if not _OF_SYMBOLS.search(str(error)):
                raise  # the function's own fault
            *_, (frame, _) = walk_tb(error.__traceback__)
            hint = "operands are symbols: tw.exp(x), x.cast(…), tw.sum(x, over=j)"
            raise refusal("P101", f"{t.name} cannot be traced: {error}", hint, frame) from error
        results = returned if isinstance(returned, tuple) else (returned,)
        return Program(t.name, "coordinates", _in_order(t, results, line), tuple(t.body))


def _in_order(t: Trace, results: tuple[Any, ...], line: str) -> tuple[Tensor, ...]:
    """The tensors of a program, its outputs as they are returned: each once, and nothing else."""
    names = [r.name if isinstance(r, Tensor) else repr(r) for r in results]
    outputs = {n: x for n, x in t.tensors.items() if x.role == "output"}
    computed = [n for n, x in outputs.items() if x.kind != "state"]
    updated = set(outputs) - set(computed)
    is_complete = sorted(set(names) - updated) == sorted(computed)
    if not t.body or not is_complete or len(set(names)) != len(names):
        pair = f"it returns {', '.join(names)} and computes {', '.join(outputs) or 'nothing'}"
        rule = f"{t.name} must return what it computes, each output once: {pair}"
        raise ProgramError("P101", rule, where=line, hint="return tw.out[i](…)")
    returned = [outputs[n] for n in names if n in computed]
    return (*(x for n, x in t.tensors.items() if n not in computed), *returned)


def _parameter(
    name: str, d: Declared, declared: dict[str, Any], dtypes_by_name: dict[str, dtypes.DType],
    formats: dict[str, Any], line: str,
) -> Tensor:  # fmt: skip
    dtype = dtypes_by_name.get(name) or d.dtype or dtypes.float32
    if d.default is not None:
        rule = f"scalar {name} of a program has a default"
        raise ProgramError("P101", rule, where=line, hint="pass the number in the call")
    if not d.is_sparse:
        return Tensor(name, d.dims, dtype, kind=d.kind, strided=d.strided)
    owner = d.like or name
    other = declared.get(owner)
    if not isinstance(other, Declared) or not other.is_sparse or other.dims != d.dims:
        rule = f"{name} is like {owner!r}, which is no sparse parameter of its dimensions"
        raise ProgramError("P101", rule, where=line)
    fmt = formats.get(owner) or plain(len(d.dims))
    if fmt.ndim != len(d.dims):
        rule = f"{fmt} stores {fmt.ndim} dimensions, {name} has {len(d.dims)}"
        raise ProgramError("P107", rule, where=line)
    return Tensor(name, d.dims, dtype, format=fmt, structure=owner, fill=d.fill, kind=d.kind)
