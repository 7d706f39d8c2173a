"""Statements, nests and programs: what expressions are computed in. Nodes are frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, NamedTuple

from tilewright import dtypes
from tilewright.ir.atoms import Atom
from tilewright.ir.expr import Access, Buffer, Const, Expr, Load, Ramp, Select, Tensor, Var, node
from tilewright.ir.text import program_text, stmt_text

LoopKind = Literal[
    "serial", "parallel", "vector", "unroll",
    "cta.x", "cta.y", "thread.x", "thread.y", "threads",  # threads: shared out among all of a CTA
    "fragment",  # rows, and right inside columns, of a tile: each thread runs the elements it has
    "pairs",  # in place of these columns: their pairs, both elements of which a thread has
    "pipeline",  # copies of the next iterations to shared memory are under way during each
]  # fmt: skip
GRID: tuple[LoopKind, ...] = ("parallel", "cta.x", "cta.y")  # loops that become units of a launch
THREADS: tuple[LoopKind, ...] = ("thread.x", "thread.y")  # loops bound to the threads of a CTA


class Stmt:
    __slots__ = ()

    def __str__(self) -> str:
        return stmt_text(self)

    __repr__ = __str__


@node
class Assign(Stmt):
    """Coordinate level: `out[coords] = value` for every coordinate of `out` (stored ones, if
    sparse). With `op` "sum" the value is added to what is there, coordinates that repeat too."""

    out: Access
    value: Expr
    op: str = ""


@node
class Seq(Stmt):
    body: tuple[Stmt, ...]


@node
class For(Stmt):
    """A loop `for name in begin:end`. `axes` are the coordinate axes from which it was lowered.

    If it is `private`, reductions over it keep one accumulator per iteration (see rfactor).
    `stages` is the number of buffers of a pipelined loop, and 0 for other loops."""

    var: Var
    begin: Expr
    end: Expr
    body: Stmt
    kind: LoopKind = "serial"
    axes: tuple[str, ...] = ()
    private: bool = False
    unroll_hint: int = 0
    stages: int = 0

    @property
    def name(self) -> str:
        return self.var.name

    @property
    def extent(self) -> int | None:
        """The trip count where it is a constant."""
        if isinstance(self.begin, Const) and isinstance(self.end, Const):
            return int(self.end.value) - int(self.begin.value)
        return None


@node
class Merge(For):
    """A loop over the coordinates of ascending lists: those in all of them, with op "intersection",
    or in any, with "union". Its variable counts the coordinates visited before; `Cursor`s read the
    coordinate and the position in each list.

    List n is `runs[n].buffer` from the element `runs[n]` to `ends[n]`. `end` is a bound only."""

    runs: tuple[Load, ...] = ()
    ends: tuple[Expr, ...] = ()
    op: str = "union"


@node
class Scatter(Stmt):
    """Inserts a coordinate into a row workspace and adds `value` to what belongs to it."""

    workspace: Buffer
    key: Expr
    value: Expr


@node
class Drain(For):
    """A loop over the coordinates of a row workspace, ascending, which leaves it empty. Its
    variable counts; `Cursor`s read the coordinate and its value."""

    workspace: Buffer | None = None


@node
class Let(Stmt):
    """Names a value until the end of the enclosing `Seq`."""

    var: Var
    value: Expr

    @property
    def name(self) -> str:
        return self.var.name


@node
class If(Stmt):
    cond: Expr
    body: Stmt


@node
class Reduction:
    """Position level: `total = op of value`, over the loops that the `Compute` reduces over.
    `factor`: a register that the sum so far is multiplied by before each term."""

    total: Buffer
    op: str
    value: Expr
    factor: Buffer | None = None


@node
class Compute(Stmt):
    """Position level: `out = value`, or `out = op over the loops of the axes in reduce`, or, with
    `reductions`, `out = value` where `value` reads their totals: the epilogue, computed once for
    each element of `out`, where the totals are complete.

    `in_place`: the output was initialised by an earlier nest and is updated in memory (a row that
    several iterations share). `shared`: so do other nests, or other parts of the same format.
    `atomic`: those updates may come from several units at once. `mma`: the names of the three
    innermost loops, when they form a matrix tile. `online`: a maximum that is read before it is
    complete. For each term x it sets two registers: exp(x - maximum), and exp(old maximum -
    maximum), the factor of sums that are relative to it.
    """

    out: Load
    value: Expr
    op: str = ""
    reduce: tuple[str, ...] = ()
    in_place: bool = False
    atomic: bool = False
    mma: tuple[str, str, str] | None = None
    atom: Atom | None = None
    shared: bool = False
    reductions: tuple[Reduction, ...] = ()
    online: tuple[Buffer, Buffer] | None = None

    @property
    def sums(self) -> tuple[tuple[str, Expr], ...]:
        """The operator and the value of each reduction, or of the statement itself."""
        return tuple((r.op, r.value) for r in self.reductions) or ((self.op, self.value),)


def reduces(loop: For, c: Compute) -> bool:
    """Whether `loop` is one of those that `c` reduces over."""
    return bool(set(loop.axes) & set(c.reduce))


@node
class Store(Stmt):
    """Loop level: `buffer[offset] op= value`; `op` empty sets."""

    buffer: Buffer
    index: tuple[Expr, ...]
    value: Expr
    op: str = ""
    atomic: bool = False


@node
class CopyAsync(Store):
    """Loop level: starts a copy to shared memory, of a load or of zeros where its condition fails.
    The elements are written at any time until the thread waits for the group of the copy."""

    @property
    def source(self) -> tuple[Load, Expr]:
        """What is copied where the condition holds, and the offset of its first element."""
        load = self.value.a if isinstance(self.value, Select) else self.value
        at = load.index[0]  # type: ignore[attr-defined]
        return load, at.base if isinstance(at, Ramp) else at  # type: ignore[return-value]

    def read_at(self, offset: Expr) -> CopyAsync:
        """The copy with another offset of its first element, under the same condition."""
        load, value = self.source[0], self.value
        first = load.index[0]
        offset = replace(first, base=offset) if isinstance(first, Ramp) else offset
        load = replace(load, index=(offset,))
        return replace(self, value=replace(value, a=load) if isinstance(value, Select) else load)


@node
class Commit(Stmt):
    """The copies that a thread has started since its last `Commit` are a group."""


@node
class Wait(Stmt):
    """A thread waits until all of its groups but the latest `pending` have landed."""

    pending: int


@node
class Alloc(Stmt):
    """Loop level: declares a register, shared, fragment or row buffer until the end of its `Seq`.
    A fragment buffer is an array of float32 fragments, (slots, rows, columns), and starts at 0, as
    an address that a loop carries does.

    `extents`: the shape of a row buffer, which is known at run time only. `kept`: that of the part
    which a GPU keeps. The elements behind its first dimension are in an array: a row starts at
    `rest`, and its dimension n runs along dimension `along[n]` in steps of `steps[n]`."""

    buffer: Buffer
    extents: tuple[Expr, ...] = ()
    kept: tuple[Expr, ...] = ()
    rest: tuple[Load, ...] = ()
    along: tuple[int, ...] = ()
    steps: tuple[Expr, ...] = ()


@node
class Prefetch(Stmt):
    """Prefetches the cache line of `element`: a hint, on which no result depends."""

    element: Load


@node
class Sync(Stmt):
    """A barrier of all threads of the CTA, or of each group of `lanes` neighbours in a warp."""

    lanes: int = 0


@node
class Tile:
    """A `rows × cols` window of a buffer for `Mma`: element (r, c) lies at
    `offset + r*row_stride + c*col_stride`; rows beyond `row_limit` (cols: `col_limit`) read as
    0. `held`: the registers that a `LoadTile` loaded it into, from which products take it."""

    buffer: Buffer
    offset: Expr
    row_stride: Expr
    col_stride: Expr
    row_limit: Expr
    col_limit: Expr
    held: str = ""


@node
class Mma(Stmt):
    """acc[slot] += a (m × k) · b (k × n), float16/bfloat16 in, float32 out."""

    acc: Buffer
    slot: Expr
    a: Tile
    b: Tile
    shape: tuple[int, int, int]
    atom: Atom | None = None


@node
class LoadTile(Stmt):
    """Loads the left ("a") or the right operand of products of a shape into `tile.held`."""

    tile: Tile
    side: str
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Nest:
    """One launch, or one case of a launch over the parts of a decomposition.

    `part` is the index of the format in the composed format of `structure` whose parts it serves,
    or -1. `shared`: parts update the same elements.
    """

    name: str
    body: Stmt
    part: int = -1
    grid: tuple[Expr, ...] = ()
    grid_vars: tuple[Var, ...] = ()
    threads: tuple[int, int] = (1, 1)
    structure: str = ""
    shared: bool = False


class Placement(NamedTuple):
    """A temporary that is computed in the loop of an index of its reader, the scope of its memory,
    and the most elements of a row of it that a GPU keeps (0: all)."""

    temporary: str
    loop: str
    scope: str
    most: int


@dataclass(frozen=True, slots=True)
class Program:
    """A program at any level. `level` is coordinates, positions or loops.

    `stages` groups the nests that run in one launch: nests of a stage are independent of each
    other. `orders` holds loop orders asked for (output name, then axes); `fused` the structures
    whose two axes are walked as one; `merged` the outputs all of whose reductions run in one loop;
    `placed` the temporaries with a place; `sizes` dimensions that are fixed; `index` the type of
    coordinates.
    """

    name: str
    level: str
    tensors: tuple[Tensor, ...]
    body: tuple[Assign, ...] = ()
    stages: tuple[tuple[Nest, ...], ...] = ()
    buffers: tuple[Buffer, ...] = ()
    orders: tuple[tuple[str, ...], ...] = ()
    fused: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    placed: tuple[Placement, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    index: dtypes.DType = dtypes.int32

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.role == "input")

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.role == "output")

    @property
    def nests(self) -> tuple[Nest, ...]:
        """Of all stages, in order."""
        return tuple(n for stage in self.stages for n in stage)

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)

    def __str__(self) -> str:
        return program_text(self)

    __repr__ = __str__


# ---------------------------------------------------------------------------- traversal


def seq(*statements: Stmt) -> Stmt:
    """A flat sequence; a single statement stays itself."""
    flat: list[Stmt] = []
    for s in statements:
        flat.extend(s.body if isinstance(s, Seq) else (s,))
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


_HOLDS_ONE = frozenset({"Expr", "Stmt", "Var", "Access", "Load", "Tile", "Reduction"})
_HOLDS_MANY = frozenset(f"tuple[{t}, ...]" for t in _HOLDS_ONE)


@cache
def child_fields(cls: type) -> tuple[tuple[str, bool], ...]:
    """The fields of a node class that hold nodes, by their declared types; True for tuples."""
    held = [f for f in fields(cls) if f.type in _HOLDS_ONE | _HOLDS_MANY]
    return tuple((f.name, f.type in _HOLDS_MANY) for f in held)


def children(n: Any) -> Iterator[Any]:
    """The nodes in the fields of a node, in order, tuples flattened."""
    for name, many in child_fields(type(n)):
        if many:
            yield from getattr(n, name)
        else:
            yield getattr(n, name)
