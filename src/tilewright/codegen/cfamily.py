"""The C-family renderer: text for the nodes of the loop level that is both C++ and CUDA.

Each nest of a stage becomes a function, a *body* of (params, row, unit). The entry of the stage
finds the row of the work table that a unit belongs to and calls its body. The targets override
memory access and matrix tiles, and write the entry.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tilewright import dtypes
from tilewright.codegen.params import C_TYPES, STORED_AS_BITS, Params, c_name
from tilewright.errors import InternalError, ScheduleError
from tilewright.ir import core as ir


@dataclass
class Renderer:
    """Renders a nest of a program. `params` says which names are fields of which struct."""

    program: ir.Program
    params: Params
    lines: list[str] = field(default_factory=list)
    depth: int = 0

    def __post_init__(self) -> None:
        self.row_fields = {f[1] for f in self.params.row}
        self.param_fields = {f[1] for f in self.params.params}
        self.inline_scalars = {f[1] for f in self.params.params if f[2] != "ptr"}

    # -- types -----------------------------------------------------------------------------------

    def type(self, t: dtypes.DType) -> str:
        return C_TYPES[t.name] if t.lanes == 1 else f"tw::vec<{_lanes_of(t)}>"

    # -- statements ------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    @contextmanager
    def braces(self, head: str) -> Iterator[None]:
        """Puts what is printed inside in braces behind `head`."""
        self.line(f"{head} {{".lstrip())
        self.depth += 1
        yield
        self.depth -= 1
        self.line("}")

    def block(self, head: str, body: ir.Stmt) -> None:
        with self.braces(head):
            self.stmt(body)

    def text(self, e: Any) -> Any:
        """Returns the text of an expression; adds the lines of a statement. Raises
        InternalError[I101] for a node that only other targets have."""
        method = getattr(self, f"visit_{type(e).__name__}", None)
        if method is None:
            raise InternalError("I101", f"{type(self).__name__}: no text for {type(e).__name__}")
        return method(e)

    stmt = expr = text

    def visit_Seq(self, s: ir.Seq) -> None:
        for b in s.body:
            self.stmt(b)

    def visit_Scatter(self, s: ir.Scatter) -> None:
        self.line(f"{c_name(s.workspace.name)}.add({self.expr(s.key)}, {self.expr(s.value)});")

    def visit_If(self, s: ir.If) -> None:
        self.block(f"if ({self.expr(s.cond)})", s.body)

    def visit_Let(self, s: ir.Let) -> None:
        kind, name = self.type(s.var.dtype), c_name(s.var.name)
        self.line(f"const {kind} {name} = {self.stored(s.value)};")

    def visit_For(self, s: ir.For) -> None:
        kind, name = self.type(s.var.dtype), c_name(s.name)
        if s.unroll_hint or s.kind == "unroll":
            self.line(f"{self.unroll_pragma} {s.unroll_hint or 16}")
        begin, end = self.expr(s.begin), self.expr(s.end)
        limit = end
        if not isinstance(s.end, (ir.Const, ir.Var)):  # evaluated once
            begin, limit = f"{begin}, {name}__end = {end}", f"{name}__end"
        self.block(f"for ({kind} {name} = {begin}; {name} < {limit}; ++{name})", s.body)

    unroll_pragma = "#pragma GCC unroll"

    def visit_Alloc(self, s: ir.Alloc) -> None:
        b = s.buffer
        name, kind = c_name(b.name), self.type(b.dtype)
        if b.scope == "workspace":
            rule = "a row of a sparse product is gathered in memory of a CPU"
            raise ScheduleError("S103", rule, hint='build for "cpp", or an output that is dense')
        if b.shape:
            total = math.prod(int(e.value) for e in b.shape)  # type: ignore[attr-defined]
            self.line(f"{kind} {name}[{total}];")
        else:
            self.line(f"{kind} {name};")

    def register(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> str:
        if not b.shape:
            return c_name(b.name)
        flat = self.expr(index[0])
        for i, extent in zip(index[1:], b.shape[1:], strict=True):
            flat = f"({flat}) * {self.expr(extent)} + {self.expr(i)}"
        return f"{c_name(b.name)}[{flat}]"

    def visit_Store(self, s: ir.Store) -> None:
        value, lanes = self.stored(s.value), s.value.dtype.lanes
        in_registers = s.buffer.scope in ("register", "fragment")
        if in_registers or (lanes == 1 and not s.atomic):
            place = self.register if in_registers else self.element
            element = place(s.buffer, s.index)
            return self.line(f"{element} = {self.combine(s.op, element, value, s.buffer.dtype)};")
        pointer, offset = self.pointer(s.buffer), s.index[0]
        if s.atomic:
            self.atomic(s, pointer, value)
        elif isinstance(offset, ir.Ramp):
            if s.op:
                old = self.load_vector(s.buffer, offset.base, lanes)
                value = self.combine(s.op, old, value, s.value.dtype)
            self.line(self.store_vector(s.buffer, offset.base, value, lanes))
        else:
            kind, index = f"{C_TYPES[s.buffer.dtype.name]}, {lanes}", self.expr(offset)
            if s.op:
                old = f"tw::gather<{kind}>({pointer}, {index})"
                value = self.combine(s.op, old, value, s.value.dtype)
            self.line(f"tw::scatter<{kind}>({pointer}, {index}, {value});")

    def combine(self, op: str, old: str, value: str, dtype: dtypes.DType) -> str:
        if not op:
            return value
        if op in ("sum", "prod"):
            return f"{old} {'+' if op == 'sum' else '*'} {value}"
        return self.function(op, dtype, old, value)

    def atomic(self, s: ir.Store, pointer: str, value: str) -> None:
        index = self.expr(s.index[0])
        if s.value.dtype.lanes == 1:
            return self.line(f"tw::atomic_{s.op}(&{pointer}[{index}], {value});")
        self.line(f"{{ const auto value__ = {value}; const auto at__ = {index};")
        self.line(f"  for (int l__ = 0; l__ < {s.value.dtype.lanes}; ++l__)")
        self.line(f"    tw::atomic_{s.op}(&{pointer}[at__[l__]], value__[l__]); }}")

    def visit_Prefetch(self, s: ir.Prefetch) -> None:
        address = self.address(s.element.buffer, s.element.index[0])
        self.line(f"{self.prefetch_function}({address});")

    prefetch_function = "__builtin_prefetch"

    def visit_CopyAsync(self, s: ir.CopyAsync) -> None:
        self.visit_Store(s)  # complete at once

    # -- expressions -----------------------------------------------------------------------------

    def pointer(self, b: ir.Buffer) -> str:
        if b.scope == "shared":
            return c_name(b.name)
        name = c_name(b.name)
        return f"r.{name}" if name in self.row_fields else name

    def visit_Const(self, e: ir.Const) -> str:
        if e.dtype.kind == "b":
            return "true" if e.value else "false"
        if not e.dtype.is_float:
            return _integer(int(e.value), e.dtype)
        suffix = "" if e.dtype.bits == 64 else "f"
        value = float(e.value)
        if value != value:
            return f'__builtin_nan{suffix}("")'
        if value in (float("inf"), float("-inf")):
            return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
        text = repr(value)
        return f"{text}{suffix}" if "." in text or "e" in text else f"{text}.0{suffix}"

    def visit_Var(self, e: ir.Var) -> str:
        name = c_name(e.name)
        if name in self.row_fields:
            return f"r.{name}"
        if e.name in self.params.packed:
            return f"TW_STRIDE(p.{name}, {self.params.packed[e.name]})"
        return f"p.{name}" if name in self.param_fields else name

    def visit_Search(self, e: ir.Search) -> str:
        verb = "find_last" if e.last else "find"
        kind, bounds = C_TYPES[e.keys.dtype.name], ", ".join(map(self.expr, (e.lo, e.hi, e.key)))
        return f"tw::{verb}<{self.type(e.dtype)}, {kind}>({self.pointer(e.keys)}, {bounds})"

    def visit_Holds(self, e: ir.Holds) -> str:
        return f"{c_name(e.workspace.name)}.holds({self.expr(e.key)})"

    def visit_Ramp(self, e: ir.Ramp) -> str:
        return f"tw::ramp<{_lanes_of(e.dtype)}>({self.expr(e.base)})"

    def visit_Broadcast(self, e: ir.Broadcast) -> str:
        return f"tw::splat<{_lanes_of(e.dtype)}>({self.expr(e.a)})"

    def visit_ReduceLanes(self, e: ir.ReduceLanes) -> str:
        return f"tw::fold_{e.op}<{_lanes_of(e.a.dtype)}>({self.expr(e.a)})"

    def visit_ReduceThreads(self, e: ir.ReduceThreads) -> str:
        return self.expr(e.a)  # on a CPU the loop over threads has run in order

    def visit_Load(self, e: ir.Load) -> str:
        b = e.buffer
        if b.scope in ("register", "fragment"):
            return self.register(b, e.index)
        if b.shape == () and c_name(b.name) in self.inline_scalars:
            return f"p.{c_name(b.name)}"
        pointer, offset, lanes = self.pointer(b), e.index[0], e.dtype.lanes
        if lanes == 1:
            return self.load_scalar(b, self.element(b, e.index))
        if isinstance(offset, ir.Ramp):
            return self.load_vector(b, offset.base, lanes)
        kind = f"{C_TYPES[b.dtype.name]}, {lanes}"
        return f"tw::gather<{kind}>({pointer}, {self.expr(offset)})"

    def load_scalar(self, b: ir.Buffer, element: str) -> str:
        return element

    def at(self, b: ir.Buffer, offset: ir.Expr) -> str:
        """Where an element lies in its array."""
        return self.expr(offset)

    def element(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> str:
        return f"{self.pointer(b)}[{self.at(b, index[0])}]"

    def address(self, b: ir.Buffer, offset: ir.Expr) -> str:
        return f"{self.pointer(b)} + {self.at(b, offset)}"

    def load_vector(self, b: ir.Buffer, base: ir.Expr, lanes: int) -> str:
        return f"tw::load<{C_TYPES[b.dtype.name]}, {lanes}>({self.address(b, base)})"

    def store_vector(self, b: ir.Buffer, base: ir.Expr, value: str, lanes: int) -> str:
        kind = f"{C_TYPES[b.dtype.name]}, {lanes}"
        return f"tw::store<{kind}>({self.address(b, base)}, {value});"

    def stored(self, e: ir.Expr) -> str:
        """The text of a value as a variable or memory holds it. A comparison of vectors gives lanes
        as wide as its operands; a stored vector of bool has bytes that are 0 or 1."""
        text = self.expr(e)
        kept = e.dtype.kind != "b" or e.dtype.lanes == 1
        return text if kept or isinstance(e, _BYTES) else self.mask(text, e.dtype.lanes)

    def mask(self, text: str, lanes: int) -> str:
        return f"tw::mask<{lanes}>({text})"

    def visit_Binary(self, e: ir.Binary) -> str:
        if e.op in ("&", "|") and _mask_bits(e.a) == _mask_bits(e.b):
            a, b = self.expr(e.a), self.expr(e.b)
        else:
            a, b = self.stored(e.a), self.stored(e.b)
        if e.op in ("min", "max"):
            return self.function(e.op, e.dtype, a, b)
        if e.op in ("//", "%"):
            return self.floor(e, a, b)
        if e.op in ("<<", ">>") and not _within_width(e):
            return self.function("shift_left" if e.op == "<<" else "shift_right", e.dtype, a, b)
        if e.dtype.kind == "b" and e.dtype.lanes == 1 and e.op in ("&", "|"):
            return f"({a} {e.op}{e.op} {b})"
        text = f"({a} {e.op} {b})"
        narrow = e.dtype.is_int and e.dtype.bits < 32 and e.dtype.lanes == 1
        return f"static_cast<{self.type(e.dtype)}>{text}" if narrow else text

    def floor(self, e: ir.Binary, a: str, b: str) -> str:
        n = int(e.b.value) if isinstance(e.b, ir.Const) and e.dtype.is_int else 0
        if n > 0 and n & (n - 1) == 0 and e.dtype.lanes == 1:
            return f"({a} >> {n.bit_length() - 1})" if e.op == "//" else f"({a} & {n - 1})"
        return self.function("floor_div" if e.op == "//" else "floor_mod", e.dtype, a, b)

    def function(self, name: str, dtype: dtypes.DType, a: str, b: str) -> str:
        """A function of the prelude; `v` before its name takes vectors."""
        if dtype.lanes > 1:
            return f"tw::v{name}<{_lanes_of(dtype)}>({a}, {b})"
        return f"tw::{name}<{self.type(dtype)}>({a}, {b})"

    def visit_Unary(self, e: ir.Unary) -> str:
        a = self.expr(e.a)
        if e.op == "-":
            text = f"(-({a}))" if a.startswith("-") else f"(-{a})"
            narrow = e.dtype.is_int and e.dtype.bits < 32 and e.dtype.lanes == 1
            return f"static_cast<{self.type(e.dtype)}>{text}" if narrow else text
        if e.op == "not":
            return f"(!{a})"
        template = f"<{e.dtype.lanes}>" if e.dtype.lanes > 1 and e.op != "abs" else ""
        return f"tw::{e.op}{template}({a})"

    def visit_Select(self, e: ir.Select) -> str:
        a, b = self.stored(e.a), self.stored(e.b)
        if e.cond.dtype.lanes > 1:
            return f"tw::select({self.expr(e.cond)}, {a}, {b})"
        return f"({self.expr(e.cond)} ? {a} : {b})"

    def visit_Cast(self, e: ir.Cast) -> str:
        source, to, a = e.a.dtype, e.dtype, self.expr(e.a)
        lanes = f"<{to.lanes}>" if to.lanes > 1 else ""
        if source.name in STORED_AS_BITS:
            a, source = f"tw::from_{source.name}{lanes}({a})", dtypes.float32.vector(to.lanes)
        if source == to:
            return a
        if source.is_float and to.is_int:
            return f"tw::to_integer<{_lanes_of(to) if to.lanes > 1 else self.type(to)}>({a})"
        if to.name in STORED_AS_BITS:
            single = dtypes.float32.vector(to.lanes)
            a = self.stored(e.a) if source.kind == "b" else a  # true in a mask is -1
            narrow = a if source.name == "float32" else self.convert(a, single)
            return f"tw::to_{to.name}{lanes}({narrow})"
        if source.is_int and source.bits < 32 and to.is_float and to.lanes > 1:
            a = self.convert(a, dtypes.int32.vector(to.lanes))  # one step would go lane by lane
        if source.kind == "b" and source.lanes > 1:
            ones = f"tw::splat<{_lanes_of(to)}>(1)"
            return f"tw::select({a}, {ones}, {self.type(to)}{{}})"
        return self.convert(a, to)

    def convert(self, text: str, to: dtypes.DType) -> str:
        if to.kind == "b" and to.lanes > 1:
            return self.mask(text, to.lanes)
        if to.lanes > 1:
            return f"tw::convert<{_lanes_of(to)}>({text})"
        return f"({text} != 0)" if to.kind == "b" else f"static_cast<{C_TYPES[to.name]}>({text})"

    # -- bodies ----------------------------------------------------------------------------------

    def body(self, nest: ir.Nest) -> str:
        """The lines of the function of a nest."""
        self.depth = 1
        self.stmt(nest.body)
        head = (f"  {line}" for line in (*self.body_pointers(nest), *self.unit_to_grid(nest)))
        return "\n".join((*head, *self.lines))

    def body_pointers(self, nest: ir.Nest) -> list[str]:
        """Local names for the pointers that a body reads from `params`."""
        buffers = [x.buffer for x in ir.walk(nest.body, ir.Load, ir.Store, ir.Tile)]
        buffers = [b for b in buffers if b.scope != "row"]
        buffers += [x.keys for x in ir.walk(nest.body, ir.Search)]
        lines = {
            name: f"{types[-1]} {self.restrict} {own} = p.{own};"
            for name, own, *types in self.params.params if types[0] == "ptr"
        }  # fmt: skip
        return [lines[name] for name in dict.fromkeys(b.name for b in buffers) if name in lines]

    restrict = "__restrict"

    def unit_to_grid(self, nest: ir.Nest) -> list[str]:
        """The grid variables of a unit: the last runs fastest."""
        text: list[str] = []
        rest = "unit"
        for n in reversed(range(len(nest.grid))):
            var, kind = c_name(nest.grid_vars[n].name), self.type(nest.grid_vars[n].dtype)
            if n == 0:
                text.append(f"const {kind} {var} = static_cast<{kind}>({rest});")
            else:
                extent = f"extent__{n}"
                text.append(f"const int64_t {extent} = {self.expr(nest.grid[n])};")
                text.append(f"const {kind} {var} = static_cast<{kind}>({rest} % {extent});")
                rest = f"({rest} / {extent})"
        return text


def has(stage: Iterable[ir.Nest], *kinds: type) -> bool:
    """Whether a nest of the stage has statements of these kinds."""
    return any(ir.contains(n.body, *kinds) for n in stage)


def atom_texts(program: ir.Program, target: str) -> list[str]:
    """The functions of the atoms of a program, each once."""
    atoms = [x.atom for n in program.nests for x in ir.walk(n.body, ir.Mma) if x.atom]
    return list(dict.fromkeys(getattr(atom, target) for atom in atoms))


def operand_kind(t: dtypes.DType) -> str:
    """How a tile operation reads the elements of its operands."""
    return "tw::tf32_bits" if t.name == "float32" else f"tw::{t.name}_bits"


# Expressions whose vectors of bool hold one byte per lane.
_BYTES = (ir.Load, ir.Var, ir.Broadcast, ir.Select, ir.Cast)


def _mask_bits(e: ir.Expr) -> int:
    """The width of the lanes that generated text has for a vector of bool; 0 for anything else."""
    if e.dtype.kind != "b" or e.dtype.lanes == 1:
        return 0
    if isinstance(e, ir.Binary) and e.op in ir.COMPARISON and e.a.dtype.kind != "b":
        return e.a.dtype.bits
    if isinstance(e, ir.Binary) and _mask_bits(e.a) == _mask_bits(e.b):
        return _mask_bits(e.a)
    return _mask_bits(e.a) if isinstance(e, ir.Unary) else 8


def _within_width(e: ir.Binary) -> bool:
    """Whether a shift has a constant count that C defines."""
    count = e.b.a if isinstance(e.b, ir.Broadcast) else e.b
    return isinstance(count, ir.Const) and 0 <= count.value < e.dtype.bits


def _integer(value: int, dtype: dtypes.DType) -> str:
    """An integer literal of the type that C gives to a narrower one, or of its own."""
    if abs(value) < 2**31:
        return str(value)
    if dtype.kind == "u":
        return f"{value}u" if dtype.bits <= 32 else f"UINT64_C({value})"
    if value == dtype.least:  # C has no negative literals
        return f"({_integer(value + 1, dtype)} - 1)"
    return f"INT64_C({value})"


def _lanes_of(t: dtypes.DType) -> str:
    """The template arguments of a vector type: its element and the number of lanes."""
    return f"{C_TYPES[t.name]}, {t.lanes}"
