"""Text of the loops over lists of coordinates, for the C family.

The union of two lists is a loop while both have coordinates left, without branches that depend on
the data, and one loop for the rest of each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tilewright.codegen.cfamily import Renderer
from tilewright.codegen.params import C_TYPES, c_name
from tilewright.ir import core as ir


class MergeRenderer(Renderer):
    """The part of a renderer that prints `Merge` loops and `Cursor`s."""

    unguarded: tuple[str, ...] = ()  # loops whose positions can all be read here
    is_picking = False  # positions are printed that can be read, not -1 for those that lack it

    def visit_Merge(self, s: ir.Merge) -> None:
        name, kind = c_name(s.name), C_TYPES[s.var.dtype.name]
        numbers = range(len(s.runs))
        with self.braces(""):
            for n, (run, end) in enumerate(zip(s.runs, s.ends, strict=True)):
                self.line(f"{kind} {name}__at{n} = {self.expr(run.index[0])};")
                self.line(f"const {kind} {name}__end{n} = {self.expr(end)};")
            self.line(f"{kind} {name} = 0;")
            (self._together if s.op == "intersection" else self._union)(s, numbers)

    def _together(self, s: ir.Merge, numbers: Sequence[int]) -> None:
        """The loop over the coordinates that lists `numbers` have in common; a list behind the
        greatest of their coordinates moves on."""
        name = c_name(s.name)
        with self._walk(s, numbers, "max"):
            if len(numbers) > 1:
                moved = " ".join(f"{name}__at{n} += {name}__key{n} < {name}__key;" for n in numbers)
                differ = " || ".join(f"{name}__key{n} != {name}__key" for n in numbers)
                self.line(f"if ({differ}) {{ {moved} continue; }}")
            self._positions(s, {n: f"{name}__at{n}" for n in numbers})

    def _union(self, s: ir.Merge, numbers: Sequence[int]) -> None:
        """The loops over the coordinates that any of lists `numbers` has: while all of them have
        some left, then over the others when one has ended."""
        if len(numbers) == 1:
            return self._together(s, numbers)
        name = c_name(s.name)
        before, self.unguarded = self.unguarded, (*self.unguarded, s.name)
        with self._walk(s, numbers, "min"):
            has = {n: f"{name}__key{n} == {name}__key ? {name}__at{n} : -1" for n in numbers}
            self._positions(s, has)
        self.unguarded = before
        for ended in numbers:
            self._union(s, [n for n in numbers if n != ended])

    def _positions(self, s: ir.Merge, found: dict[int, str]) -> None:
        """The position in each list, -1 in those that have no text in `found`."""
        name, kind = c_name(s.name), C_TYPES[s.var.dtype.name]
        for n in range(len(s.runs)):
            self.line(f"const {kind} {name}__position{n} = {found.get(n, '-1')};")

    @contextmanager
    def _walk(self, s: ir.Merge, numbers: Sequence[int], chosen: str) -> Iterator[None]:
        """A loop that runs while all lists `numbers` have coordinates left, at their least or
        greatest current coordinate; what is printed inside comes before the body."""
        name, kind = c_name(s.name), C_TYPES[s.var.dtype.name]
        left = " && ".join(f"{name}__at{n} < {name}__end{n}" for n in numbers)
        with self.braces(f"while ({left})"):
            for n in numbers:
                keys = s.runs[n].buffer
                key = self.load_scalar(keys, f"{self.pointer(keys)}[{name}__at{n}]")
                self.line(f"const {kind} {name}__key{n} = {key};")
            key = f"{name}__key{numbers[0]}"
            for n in numbers[1:]:
                key = f"tw::{chosen}<{kind}>({key}, {name}__key{n})"
            self.line(f"const {kind} {name}__key = {key};")
            yield
            self.stmt(s.body)
            step = (f"{name}__at{n} += {name}__key{n} == {name}__key;" for n in numbers)
            self.line(f"{' '.join(step)} ++{name};")

    def visit_Drain(self, s: ir.Drain) -> None:
        """The loop over a row workspace, which is sorted unless it is only counted."""
        assert s.workspace is not None
        row, name, kind = c_name(s.workspace.name), c_name(s.name), C_TYPES[s.var.dtype.name]
        is_read = ir.contains(s.body, ir.Cursor)
        if is_read:
            self.line(f"{row}.gather();")
        with self.braces(f"for ({kind} {name} = 0; {name} < {row}.count; ++{name})"):
            for part in ("key", "value") if is_read else ():
                self.line(f"const auto {name}__{part} = {row}.entries[{name}].{part};")
            self.stmt(s.body)
        self.line(f"{row}.clear();")

    def visit_Cursor(self, e: ir.Cursor) -> str:
        name = c_name(e.loop.name)
        if e.operand == ir.VALUE:
            return f"{name}__value"
        if e.operand == ir.KEY:
            return f"{name}__key"
        return f"{name}__{'at' if self.is_picking else 'position'}{e.operand}"

    def visit_Select(self, e: ir.Select) -> str:
        """Where a value is chosen by whether a list has the coordinate, and the position in that
        list can be read anyway, it is read in any case: the choice needs no branch."""
        cond = e.cond
        if not (
            isinstance(cond, ir.Binary) and cond.op == ">=" and isinstance(cond.a, ir.Cursor)
            and cond.b == ir.Const(0, cond.b.dtype) and cond.a.loop.name in self.unguarded
        ):  # fmt: skip
            return super().visit_Select(e)
        name, kind = c_name(cond.a.loop.name), C_TYPES[e.dtype.name]
        has = f"{name}__key{cond.a.operand} == {name}__key"
        self.is_picking = True
        value = self.stored(e.a)
        self.is_picking = False
        return self.choice(kind, has, value, self.stored(e.b))

    def choice(self, kind: str, cond: str, a: str, b: str) -> str:
        return f"({cond} ? {a} : {b})"
