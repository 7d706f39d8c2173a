"""Expressions: their node kinds, tensors and buffers, and the constructors that promote dtypes.

Nodes are frozen; a pass builds new ones. Each carries its dtype, so that no pass infers it twice.
`a + b`, `a < b`, … build nodes; `==` compares structure (`equal(a, b)` builds a node).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, dataclass_transform

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ProgramError
from tilewright.ir.names import size_name
from tilewright.ir.text import expr_text

T = TypeVar("T")

BITWISE = {"&", "|", "^", "<<", ">>"}
COMPARISON = {"<", "<=", ">", ">=", "==", "!="}
UNARY = {"-", "not", "exp", "exp2", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "abs", "floor"}
REDUCTIONS = {"sum": "+", "max": "max", "min": "min", "prod": "*"}
ATOMIC: dict[str, tuple[DType, ...]] = dict.fromkeys(
    ("sum", "max", "min"), (dtypes.float32, dtypes.float64, dtypes.int32)
)
"""The atomic updates that every target has: types by operator."""


def _both_sides(op: str) -> tuple[Callable[[Any, Any], Expr], Callable[[Any, Any], Expr]]:
    """The methods `self op other` and `other op self`."""
    return lambda self, other: binary(op, self, other), lambda self, other: binary(op, other, self)


class Operators:
    """Python's operators as nodes with promoted dtypes: of expressions, and of tensors without
    dimensions. The other operand may be a number of Python or NumPy, on either side."""

    __slots__ = ()
    __array_ufunc__ = None  # NumPy leaves `np.float32(2) * x` to us

    __add__, __radd__ = _both_sides("+")
    __sub__, __rsub__ = _both_sides("-")
    __mul__, __rmul__ = _both_sides("*")
    __truediv__, __rtruediv__ = _both_sides("/")
    __floordiv__, __rfloordiv__ = _both_sides("//")
    __mod__, __rmod__ = _both_sides("%")
    __and__, __rand__ = _both_sides("&")
    __or__, __ror__ = _both_sides("|")
    __xor__, __rxor__ = _both_sides("^")
    __lshift__, __rlshift__ = _both_sides("<<")
    __rshift__, __rrshift__ = _both_sides(">>")
    __lt__, __gt__ = _both_sides("<")[0], _both_sides(">")[0]
    __le__, __ge__ = _both_sides("<=")[0], _both_sides(">=")[0]

    def __pow__(self, exponent: Any) -> Expr:
        return power(self, exponent)

    def __rpow__(self, base: Any) -> Expr:
        return power(base, self)

    def __pos__(self) -> Expr:
        return as_expr(self)

    def __neg__(self) -> Expr:
        return unary("-", self)

    def __invert__(self) -> Expr:
        x = as_expr(self)
        return unary("not", x) if x.dtype.kind == "b" else binary("^", x, -1)


class Expr(Operators):
    """Base of expressions."""

    __slots__ = ()
    dtype: DType

    def __bool__(self) -> bool:
        hint = "programs are traced: use tw.where(condition, a, b), and & | for and, or"
        raise ProgramError("P101", "an expression of a program has no truth value", hint=hint)

    def cast(self, to: DType | str) -> Expr:
        """The value converted to another dtype. A float that becomes an integer loses its
        fraction; out of range it is the nearest integer of the type, and NaN is 0."""
        return cast(self, dtypes.dtype(to))

    def __str__(self) -> str:
        return expr_text(self)

    __repr__ = __str__


@dataclass_transform(frozen_default=True)
def node(cls: type[T]) -> type[T]:
    """A frozen dataclass that prints as program text."""
    return dataclass(frozen=True, slots=True, repr=False)(cls)


@node
class Const(Expr):
    value: float | int | bool
    dtype: DType


@node
class Var(Expr):
    """A scalar: an index of a program, a loop variable, a `Let` name or a size."""

    name: str
    dtype: DType = dtypes.int32


@node
class Index(Var):
    """Coordinate level: an index of a program, a variable over one dimension (a name or a size)."""

    dim: str | int = ""


@node
class Access(Expr):
    """Coordinate level: the value of `tensor` at coordinates; its fill where nothing is stored."""

    tensor: Tensor
    coords: tuple[Expr, ...]
    dtype: DType

    @property
    def stored_coords(self) -> tuple[Expr, ...]:
        """The coordinates in the structure of a sparse tensor, without those behind it."""
        return self.coords[: len(self.coords) - self.tensor.inner]


@node
class Stored(Expr):
    """Coordinate level: whether the tensor of `access` stores an entry at its coordinates."""

    access: Access
    dtype: DType = dtypes.bool_


@node
class Load(Expr):
    """`buffer[index…]`: one index per dimension (positions), or one flat offset (loops)."""

    buffer: Buffer
    index: tuple[Expr, ...]
    dtype: DType


@node
class Binary(Expr):
    op: str
    a: Expr
    b: Expr
    dtype: DType


@node
class Unary(Expr):
    op: str
    a: Expr
    dtype: DType


@node
class Select(Expr):
    """`a` where `cond`, else `b`; the arm not taken is not evaluated (for scalars)."""

    cond: Expr
    a: Expr
    b: Expr
    dtype: DType


@node
class Cast(Expr):
    a: Expr
    dtype: DType


@node
class Reduce(Expr):
    """Coordinate level: `op` over all values of `axes` of `body`; over stored coordinates where an
    axis is driven by a sparse tensor. Binds `axes`."""

    op: str
    axes: tuple[Var, ...]
    body: Expr
    dtype: DType


@node
class Search(Expr):
    """The position p in [lo, hi) with `keys[p] == key` (keys ascending), or -1.

    With `last`, the greatest p with `keys[p] <= key`: the row of a fused position.
    """

    keys: Buffer
    lo: Expr
    hi: Expr
    key: Expr
    last: bool = False
    dtype: DType = dtypes.int32


@node
class Cursor(Expr):
    """In the body of a `Merge` or `Drain` loop of variable `loop`: the position in its list number
    `operand`, -1 where that list lacks the coordinate (`optional`); the coordinate itself where
    `operand` is `KEY`; the value that belongs to it where it is `VALUE`."""

    loop: Var
    operand: int
    dtype: DType
    optional: bool = False


KEY, VALUE = -1, -2  # operands of a `Cursor`


@node
class Holds(Expr):
    """Whether a row workspace holds a coordinate."""

    workspace: Buffer
    key: Expr
    dtype: DType = dtypes.bool_


@node
class Ramp(Expr):
    """Loop level: the vector base, base+1, … of `dtype.lanes` lanes."""

    base: Expr
    dtype: DType


@node
class Broadcast(Expr):
    a: Expr
    dtype: DType


@node
class ReduceLanes(Expr):
    """Loop level: `op` over the lanes of a vector."""

    op: str
    a: Expr
    dtype: DType


@node
class ReduceThreads(Expr):
    """Loop level, CUDA: `op` over the `extent` threads along `axis`; all of them get the result.

    `axis` is `thread.x` (shuffles, extent a power of two up to 32) or `thread.y` (shared memory).
    """

    op: str
    a: Expr
    axis: str
    extent: int
    dtype: DType


Role = Literal["input", "output", "temp", "inline"]  # inline: lives inside the nest that reads it
Kind = Literal["weight", "activation", "kv", "state"]


@dataclass(frozen=True, slots=True)
class Tensor(Operators):
    """Coordinate level: a named array over named dimensions (or integer sizes).

    `format` is None for dense tensors. Tensors with the same `structure` name share one sparsity
    structure; `fill` is what a missing coordinate reads. The last `inner` dimensions of a sparse
    tensor are dense: each stored coordinate has an array of them.
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: DType
    role: Role = "input"
    format: Any = None
    structure: str = ""
    fill: float = 0.0
    kind: Kind = "activation"
    strided: bool = False
    inner: int = 0

    def __hash__(self) -> int:  # formats are long to hash
        return hash((self.name, self.dims))

    @property
    def is_sparse(self) -> bool:
        return bool(self.structure)

    def __getitem__(self, coords: Any) -> Access:
        coords = coords if isinstance(coords, tuple) else (coords,)
        if len(coords) != len(self.dims):
            rule = f"{self.name} has dimensions {self.dims} but {len(coords)} coordinates"
            hint = f"write {self.name}[{', '.join('ijklmn'[: len(self.dims)])}]"
            raise ProgramError("P103", rule, hint=hint)
        indices = tuple(as_expr(c, dtypes.int32) for c in coords)
        for c in indices:
            if not c.dtype.is_int:
                rule = f"{c} is {c.dtype}: coordinates of {self.name} are integers"
                raise ProgramError("P106", rule, hint='convert it: tw.floor(x).cast("int32")')
        return Access(self, indices, self.dtype)

    def __str__(self) -> str:
        kind = f"sparse({self.format or 'csr'})" if self.is_sparse else "dense"
        return f"{self.name}: {kind}[{' '.join(map(str, self.dims))}] {self.dtype}"

    __repr__ = __str__


Scope = Literal["global", "part", "register", "shared", "fragment", "workspace", "row"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory. `part` buffers belong to one part of a composed tensor and come with the work table;
    `row` buffers hold what one iteration of a loop computes.

    `shape` and `strides` are in elements; run-time sizes are `Var`s. `strides` None = dense C
    order. `swizzled`: chunks of 16 bytes of a row of shared memory are exchanged by the number of
    the row. Indices and offsets do not show it: the renderer of the GPU moves the addresses.
    """

    name: str
    dtype: DType
    shape: tuple[Expr, ...]
    scope: Scope = "global"
    strides: tuple[Expr, ...] | None = None
    kind: Kind = "activation"
    swizzled: bool = False

    def __getitem__(self, index: Any) -> Load:
        index = index if isinstance(index, tuple) else (index,)
        return Load(self, tuple(as_expr(i, dtypes.int32) for i in index), self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.scope} {self.dtype}[{', '.join(map(str, self.shape))}]"

    __repr__ = __str__


# ---------------------------------------------------------------------------- building


def size_var(dim: str | int, index: DType = dtypes.int32) -> Expr:
    """The variable (or constant) that holds the size of a dimension."""
    return Const(dim, index) if isinstance(dim, int) else Var(size_name(dim), index)


def as_expr(x: Any, dtype: DType | None = None) -> Expr:
    """Numbers of Python and NumPy become constants: of `dtype`, else bool, int32 or float32; a
    tensor without dimensions is its one value."""
    x = _operand(x)
    if isinstance(x, Expr):
        return x
    if isinstance(x, bool):
        return Const(x, dtypes.bool_)
    if isinstance(x, int):
        kind = dtype or dtypes.int32
        if abs(x) >> 1023 or (kind.is_int and not kind.least <= x <= kind.most):
            raise ProgramError("P106", f"{x} does not fit {kind}", hint="cast the other operand")
        return Const(x, kind)
    if isinstance(x, float):
        return Const(x, dtype if dtype and dtype.is_float else dtypes.float32)
    hint = "operands are numbers, scalars and elements of tensors, such as X[i, j]"
    raise ProgramError("P101", f"{x!r} cannot be an operand", hint=hint)


def _operand(x: Any) -> Any:
    """A tensor without dimensions as its value, a number of NumPy as Python's; `x` otherwise."""
    if isinstance(x, Tensor) and not x.dims:
        return Access(x, (), x.dtype)
    item = getattr(x, "item", None)
    return item() if item is not None and getattr(x, "ndim", None) == 0 else x


def binary(op: str, a: Any, b: Any) -> Expr:
    """`a op b` with promoted operands; a number takes the other operand's type."""
    a, b = _operand(a), _operand(b)
    if isinstance(a, bool) or isinstance(b, bool):
        hint = "`==` compares the text of expressions: write tw.equal(i, j)"
        raise ProgramError("P101", f"{a} {op} {b}: a condition that Python has decided", hint=hint)
    a, b = _same_literals(a, b)
    ta, tb = a.dtype.scalar, b.dtype.scalar
    common = ta if op in ("<<", ">>") and tb.is_int else dtypes.promote(ta, tb)
    if op in BITWISE and common.is_float:
        rule = f"{op} needs integers of one type, not {ta} and {tb}"
        raise ProgramError("P106", rule, where=f"{a} {op} {b}", hint="cast one of them")
    if op == "/" and not common.is_float:
        common = dtypes.float32
    elif common.is_float:
        common = common.accumulator
    elif common.kind == "b" and op not in COMPARISON and op not in BITWISE:
        common = dtypes.int32  # conditions count as 0 and 1
    lanes = max(a.dtype.lanes, b.dtype.lanes)
    a, b = cast(a, common), cast(b, common)
    return Binary(op, a, b, (dtypes.bool_ if op in COMPARISON else common).vector(lanes))


def _same_literals(a: Any, b: Any) -> tuple[Expr, Expr]:
    """Two operands as expressions: a number takes its type from the other operand."""
    if isinstance(a, Expr):
        return a, as_expr(b, _literal_type(b, a.dtype))
    b = as_expr(b)
    return as_expr(a, _literal_type(a, b.dtype)), b


def _literal_type(x: Any, other: DType) -> DType | None:
    if isinstance(x, float) and not other.is_float:
        return dtypes.float32
    if isinstance(x, (int, float)) and not isinstance(x, bool) and other.kind != "b":
        return other.accumulator if other.is_float else other.scalar
    return None


def power(a: Any, exponent: Any) -> Expr:
    """`a ** exponent` for an integer exponent from -64 to 64, as products. Raises
    ProgramError[P106] for another one, or a negative one of an integer."""
    a, n = as_expr(a), _operand(exponent)
    if isinstance(n, float) and n.is_integer():
        n = int(n)
    if not isinstance(n, int) or isinstance(n, bool) or abs(n) > 64 or (n < 0 and a.dtype.is_int):
        rule = f"{a} ** {exponent}: the exponent is an integer of at most 64"
        raise ProgramError("P106", rule, hint="write tw.sqrt(x), or tw.exp(y * tw.log(x)) if x > 0")
    if n < 1:
        return as_expr(1, a.dtype.accumulator) if n == 0 else binary("/", 1, power(a, -n))
    half = power(a, n // 2) if n > 1 else a
    return half if n == 1 else half * half if n % 2 == 0 else half * half * a


def equal(a: Any, b: Any) -> Expr:
    """The condition that two values are equal; `a == b` itself compares the expressions."""
    return binary("==", a, b)


def unary(op: str, a: Any) -> Expr:
    a = as_expr(a)
    if op in ("-", "abs"):  # a narrow float is only stored, never computed with
        a = cast(a, a.dtype.scalar.accumulator) if a.dtype.is_float else a
        a = cast(a, dtypes.int32) if a.dtype.kind == "b" else a
        return Unary(op, a, a.dtype)
    if op == "not":
        return Unary(op, cast(a, dtypes.bool_), dtypes.bool_.vector(a.dtype.lanes))
    if not a.dtype.is_float:
        a = cast(a, dtypes.float32)
    kept = a.dtype.accumulator.vector(a.dtype.lanes)
    return Unary(op, cast(a, kept.scalar), kept)


def cast(a: Expr, to: DType) -> Expr:
    """`a` as `to`, keeping its lanes; nothing when it already is."""
    if a.dtype.scalar == to:
        return a
    if isinstance(a, Const) and to.kind == "b":
        return Const(bool(a.value), to)
    if isinstance(a, Const) and to.is_float:
        return Const(float(a.value), to)
    if isinstance(a, Const) and (not a.dtype.is_float or to.least <= a.value <= to.most):
        return Const(to.wrapped(int(a.value)), to)
    return Cast(a, to.vector(a.dtype.lanes))


def select(cond: Any, a: Any, b: Any) -> Expr:
    a, b = _same_literals(_operand(a), _operand(b))
    common = dtypes.promote(a.dtype.scalar, b.dtype.scalar)
    cond = as_expr(cond)
    lanes = max(a.dtype.lanes, b.dtype.lanes, cond.dtype.lanes)
    return Select(cond, cast(a, common), cast(b, common), common.vector(lanes))


def identity_of(op: str, dtype: DType) -> Const:
    """The identity of a reduction: 0, 1, or for max and min the least or greatest value."""
    if op in ("sum", "prod"):
        return Const({"sum": 0, "prod": 1}[op] * (1.0 if dtype.is_float else 1), dtype)
    if dtype.is_float:
        return Const(float("-inf") if op == "max" else float("inf"), dtype)
    return Const(dtype.least if op == "max" else dtype.most, dtype)
