"""Pass: from coordinates to positions. Statements become nests of loops over stored positions, one
for each format of a decomposition; outputs that no nest covers get their initial values first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from tilewright import dtypes
from tilewright.errors import ProgramError
from tilewright.ir import core as ir
from tilewright.lower import drivers
from tilewright.lower.joins import JoinBuilder, join_of
from tilewright.lower.nests import BuiltNest, Fused, NestBuilder, fused
from tilewright.lower.placed import with_roles
from tilewright.lower.tables import Driver, Statement, Tables, names_read, unsearchable

Parts = dict[str, Any]  # the format of a part, by its structure
Stages = list[tuple[ir.Nest, ...]]
Statements = Sequence[Statement]


def coordinates_to_positions(program: ir.Program) -> ir.Program:
    """Loops over positions, one nest for each statement and each format of a decomposition.

    before: Y[i, k] = sum(A[i, j] * X[j, k] over j)                  A: csr
    after:  for i in 0:m.size
              for k in 0:d.size
                for j_p in A.indptr1[i]:A.indptr1[i + 1]
                  let j = A.indices1[j_p]
                  Y[i, k] = sum(A.values[j_p] * X[j, k] over j)
    """
    program = with_roles(program)
    builder = _Builder(program)
    stages: Stages = []
    for root, inline, also in _roots(program, builder.placed):
        stages += builder.stages(root, inline, also)
    nodes = (x for s in stages for nest in s for x in ir.walk(nest.body, ir.Load, ir.Search))
    read = (x.keys if isinstance(x, ir.Search) else x.buffer for x in nodes)
    buffers = {b.name: b for b in read if b.scope in ("global", "part")}
    return replace(
        builder.program, level="positions", stages=tuple(stages), buffers=tuple(buffers.values())
    )


def _roots(
    program: ir.Program, placed: set[str]
) -> Iterable[tuple[Statement, list[Statement], Statements]]:
    """Each statement that is stored, with the inline ones that it reads and the lists behind it
    that are appended to in the same loops."""
    inside = placed | {t.name for t in program.tensors if t.role == "inline"}
    every = [Statement.of(a) for a in program.body]
    inline = [st for st in every if st.out.tensor.name in inside]
    roots = [st for st in every if st.out.tensor.name not in inside]
    while roots:
        root, also = roots.pop(0), []
        key = drivers.list_key(root)
        while key and roots and drivers.list_key(roots[0]) == key:
            also.append(roots.pop(0))
        yield root, _read_by((root, *also), inline), also


def _read_by(readers: Statements, temps: list[Statement]) -> list[Statement]:
    """The statements of `temps` whose values the readers read, themselves or through other ones."""
    read = names_read(*(e for st in readers for e in (st.value, st.out)))
    while more := names_read(*(t.value for t in temps if t.out.tensor.name in read)) - read:
        read |= more
    return [t for t in temps if t.out.tensor.name in read]


class _Builder:
    """Statements to stages of nests."""

    def __init__(self, program: ir.Program) -> None:
        self.program = program
        self.tensors = {t.name: t for t in program.tensors}
        self.placed = {p.temporary for p in program.placed}
        self.arrays: set[str] = set()  # totals with stages of their own

    def stages(self, root: Statement, temps: list[Statement], also: Statements = ()) -> Stages:
        """The nests of a statement, of the inline ones `temps` that it reads, and of the lists that
        are appended to in its loops."""
        if join := join_of(root):
            return [(JoinBuilder(Tables(self.program), [root, *also], join).build(),)]
        around = _root_driver(root, temps)
        structure = around.structure
        fmt: Any = self.tensors[structure].format if structure else None
        parts = [{structure: f} for f in fmt.formats] if structure else [{}]
        composed = fmt if fmt and fmt.is_composed else None
        for st in (root, *also, *temps):
            drivers.check_reduction(st, self.tensors)
        placed = [t for t in temps if t.out.tensor.name in self.placed]
        is_like = root.out.tensor.structure == structure and not placed
        shared = composed is not None and not _keeps_rows(composed, root.out, around, is_like)
        in_parts = shared or bool(drivers.drivers_read(root))
        pieces = [t for t in temps if self._is_in_pieces(t, around, in_parts)]
        if pieces or (placed and shared):
            if placed or not all(self._is_separable(t, root, temps) for t in pieces):
                t = (pieces or placed)[0]
                structure = (drivers.driver_of(t) or around).structure
                raise _shares_rows(root, t, self.tensors[structure].format)
            return self._separate(root, temps, pieces, also)

        def build(st: Statement, temps: list[Statement]) -> list[BuiltNest]:
            """The nest of a statement for each format."""
            tables = (Tables(self.program, p, structure, shared=shared) for p in parts)
            return [NestBuilder(t, st, temps, also).build() for t in tables]

        is_sparse, merged = root.out.tensor.is_sparse, root.out.tensor.name in self.program.merged
        joined, rest = fused(root, temps, structure, merged)
        built: list[BuiltNest] = []
        if isinstance(joined, Fused):
            other = getattr(drivers.driver_of(joined), "structure", structure) != structure
            built = [] if shared or (composed and other) else build(joined, rest)
            if not built or any(nest.in_place for nest in built):
                if not is_sparse:
                    return self._separate(root, temps, joined.totals)
                built = []
        built = built or build(root, temps)
        numbers, follows = (range(len(built)), structure) if composed else ((-1,), "")
        nests = tuple(
            ir.Nest(
                root.out.tensor.name, ir.simplify(nest.body), part, structure=follows,
                shared=shared and nest.in_place,
            )
            for part, nest in zip(numbers, built, strict=True)
        )  # fmt: skip
        if all(nest.covers and not nest.in_place for nest in built):
            return [nests]
        own = [n for n in numbers if is_sparse and built[n].in_place] or [-1]
        return [tuple(self._init(root, temps, built[-1].driver, n, parts[n]) for n in own), nests]

    def _is_in_pieces(self, t: Statement, around: Driver, shared: bool) -> bool:
        """Whether a reduction inside loops that follow `around` would see a piece of a row only:
        the loops, or other parts of its format, come to the row again. `shared`: other parts have
        entries of the rows of `around`."""
        driver, reduced = drivers.driver_of(t), {a.name for a in t.axes}
        if driver is None:
            return False
        fmt = self.tensors[driver.structure].format
        row = driver.indices[0]
        is_whole = driver.structure == around.structure and row == around.indices[0] and not shared
        return (fmt.is_composed and (row in reduced or not is_whole)) or any(
            not level.unique and driver.indices[level.dim] not in reduced
            for f in fmt.formats for level in f.levels
        )  # fmt: skip

    def _is_separable(self, t: Statement, root: Statement, temps: list[Statement]) -> bool:
        """Whether a reduction inside `root` can be an array: no larger than the output, or along
        one of the axes of structures."""
        own = {x.name for x in ir.indices_of(t.out)}
        first = len(root.out.stored_coords) if root.out.tensor.is_sparse else 0
        dense = {x.name for x in ir.indices_of(*root.out.coords[first:])}
        values = (root.out, *(st.value for st in (root, *temps)))
        read = (x for e in values for x in ir.walk(e, ir.Access))
        sparse = {n for x in read if x.tensor.is_sparse for n in Driver.of(x).indices}
        return own <= dense or len(own & sparse) <= 1

    def _separate(
        self, root: Statement, temps: list[Statement], totals: Statements, also: Statements = ()
    ) -> Stages:
        """Stages for totals of a statement, as arrays, and then for the statement. Loops come back
        to an element of them: no accumulator could hold it."""
        names = {t.out.tensor.name for t in totals}
        self.arrays |= names
        self.tensors |= {n: replace(self.tensors[n], role="temp") for n in names}
        self.program = replace(self.program, tensors=tuple(self.tensors.values()))

        def inside(*readers: Statement) -> list[Statement]:
            """What these statements read that is no array by now."""
            return _read_by(readers, [t for t in temps if t.out.tensor.name not in self.arrays])

        stages: Stages = []
        for t in (t for t in temps if t.out.tensor.name in names):
            out = replace(t.out, tensor=self.tensors[t.out.tensor.name])
            stages += self.stages(replace(t, out=out), inside(t))
        return [*stages, *self.stages(root, inside(root, *also), also)]

    def _init(
        self, st: Statement, temps: list[Statement], driver: Driver | None, part: int, parts: Parts
    ) -> ir.Nest:
        """The nest that stores the initial value of all elements of the output (of a part of it, if
        sparse): the value of the statement where `driver` stores no entry. Reductions over its
        entries are then the identity. A composed format reads as its fill, since its parts are read
        at their own rows only."""
        structure = driver.structure if driver else ""
        composed = bool(structure) and self.tensors[structure].format.is_composed
        sums = [(t, drivers.driver_of(t), drivers.outer_driver(t)) for t in temps if t.op]
        own = [t for t, *drivers_of in sums if driver and driver in drivers_of]
        followers = {t.out.tensor.name: ir.identity_of(t.op, t.out.dtype) for t in own}

        def visit(e: Any) -> Any:
            if isinstance(e, ir.Access) and e.tensor.name in followers:
                return followers[e.tensor.name]
            if isinstance(e, ir.Stored) and composed and e.access.tensor.structure == structure:
                return ir.Const(False, e.dtype)
            if isinstance(e, ir.Access) and composed and e.tensor.structure == structure:
                if Driver.of(e) != driver:  # may be stored where `driver` stores nothing
                    raise unsearchable(e, self.tensors[structure].format)
                return ir.cast(ir.Const(e.tensor.fill, dtypes.float64), e.dtype)
            return ir.rebuild(e, visit)

        if st.op and drivers.driver_of(st):
            value = ir.cast(ir.identity_of(st.op, st.value.dtype), st.out.dtype)
            plain, rest = Statement(st.out, "", (), value), []
        else:
            plain = replace(st, value=visit(st.value))
            others = [replace(t, value=visit(t.value)) for t in temps if t not in own]
            rest = _read_by((plain,), others)
        body = ir.simplify(NestBuilder(Tables(self.program, parts), plain, rest).build().body)
        follows = structure if part >= 0 else ""
        return ir.Nest(f"{st.out.tensor.name}.init", body, part, structure=follows)


def _shares_rows(root: Statement, t: Statement, fmt: Any) -> ProgramError:
    value = f"{t.op} of {t.value} over {', '.join(a.name for a in t.axes)}" if t.op else t.out
    rule = f"{root.out} reads {value} in its loops, and {fmt} keeps rows in pieces"
    hint = "use a format that keeps rows whole: csr, or hyb with col_parts=1 and long_rows='csr'"
    return ProgramError("P107", rule, hint=hint)


def _keeps_rows(fmt: Any, out: ir.Access, around: Driver, is_like: bool) -> bool:
    """Whether no two parts of a composed format store elements of one row of the output. `is_like`:
    all that loops store is stored like it; they come to elements of their part only."""
    has_row = around.indices[0] in {x.name for x in ir.indices_of(out)}
    return has_row and (fmt.unique_rows or (is_like and fmt.disjoint_rows and not fmt.repeats))


def _root_driver(st: Statement, temps: list[Statement]) -> Driver:
    """The structure that the loops of a root statement follow, and its indices; or nothing."""
    axes = {x.name for x in ir.indices_of(st.out)}
    inside = chain(drivers.drivers_read(st), map(drivers.outer_driver, temps))
    followed = (d for d in inside if d and axes & set(d.indices))
    return drivers.driver_of(st) or next(followed, Driver("", ()))
