"""Pass: from coordinates to positions. Statements become nests of loops over stored positions, one
for each format of a decomposition; outputs that no nest covers get their initial values first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tilewright import dtypes
from tilewright.errors import ProgramError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import loads, rebuild, simplify
from tilewright.lower.drivers import check_reduction, driver_of, list_key, outer_driver
from tilewright.lower.epilogues import Fused, fused
from tilewright.lower.joins import join_nest, join_of
from tilewright.lower.nests import BuiltNest, NestBuilder
from tilewright.lower.placed import with_roles
from tilewright.lower.tables import (  # fmt: skip
    Driver,
    Statement,
    Tables,
    indices_in,
    names_read,
    shares_rows,
)


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
    stages: list[tuple[ir.Nest, ...]] = []
    for root, inline, also in _roots(program, builder.placed):
        stages += builder.stages(root, inline, also)
    read = (x.buffer for stage in stages for nest in stage for x in loads(nest.body))
    buffers = {b.name: b for b in read if b.scope in ("global", "part")}
    return replace(
        builder.program, level="positions", stages=tuple(stages), buffers=tuple(buffers.values())
    )


def _roots(
    program: ir.Program, placed: set[str]
) -> Iterable[tuple[ir.Assign, list[ir.Assign], tuple[Statement, ...]]]:
    """Each statement that is stored, with the inline ones that it reads and the lists behind it
    that are appended to in the same loops."""
    inside = placed | {t.name for t in program.tensors if t.role == "inline"}
    inline = {a.out.tensor.name: a for a in program.body if a.out.tensor.name in inside}
    roots = [a for a in program.body if a.out.tensor.name not in inline]
    while roots:
        root, also = roots.pop(0), []
        key = list_key(Statement.of(root))
        while key and roots and list_key(Statement.of(roots[0])) == key:
            also.append(roots.pop(0))
        read = {
            t.out.tensor.name: t for a in (root, *also) for t in _read_by(a, [*inline.values()])
        }
        yield root, list(read.values()), tuple(map(Statement.of, also))


def _read_by(root: Any, temps: list[Any]) -> list[Any]:
    """The statements of `temps` whose values the statement `root` reads, itself or through other
    ones."""
    read = names_read(root.value, root.out)
    while more := names_read(*(t.value for t in temps if t.out.tensor.name in read)) - read:
        read |= more
    return [t for t in temps if t.out.tensor.name in read]


class _Builder:
    """Statements to stages of nests."""

    def __init__(self, program: ir.Program) -> None:
        self.program = program
        self.tensors = {t.name: t for t in program.tensors}
        self.placed = {name for name, _, _ in program.placed}

    def stages(
        self, root: ir.Assign, inline: list[ir.Assign], also: tuple[Statement, ...] = ()
    ) -> list[tuple[ir.Nest, ...]]:
        statement = Statement.of(root)
        if join := join_of(root.value):
            return [(join_nest(Tables(self.program), [statement, *also], join),)]
        temps = [Statement.of(a) for a in inline]
        structure, names = _root_driver(statement, temps)
        composition: Any = self.tensors[structure].format if structure else None
        formats = composition.formats if composition is not None else (None,)
        composed = composition if getattr(composition, "parts", ()) else None
        own_rows = bool(names) and names[0] in {x.name for x in indices_in(root.out.coords)}
        shared = composed is not None and not (composed.unique_rows and own_rows)
        for st in (statement, *also, *temps):
            check_reduction(st, self.tensors)
        overlaps = composed is not None and composed.repeats
        if (shared or overlaps) and any(t.out.tensor.name in self.placed for t in temps):
            raise shares_rows(statement.out.tensor.name, composition)
        built: list[BuiltNest] = []
        merged = root.out.tensor.name in self.program.merged
        joined, rest = fused(statement, temps, structure, merged)
        if isinstance(joined, Fused):
            if not (shared or overlaps):
                built = self._built((joined, also), rest, structure, formats, shared=False)
            if not built or any(nest.in_place for nest in built):
                if _is_separable(joined, temps):
                    return self._separate(root, inline, joined)
                built = []
        if overlaps:
            self._check_overlap(statement, temps, composition)
        built = built or self._built((statement, also), temps, structure, formats, shared=shared)
        nests: list[ir.Nest] = []
        empty: list[ir.Nest] = []
        in_place, covers, driver = False, True, None
        parts: dict[str, Any] = {}
        for number, fmt in enumerate(formats):
            parts = {structure: fmt} if structure else {}
            part = number if composed else -1
            nest = built[number]
            in_place |= nest.in_place
            covers &= nest.covers
            driver, follows = nest.driver, structure if composed else ""
            is_shared = shared and nest.in_place
            name, body = statement.out.tensor.name, simplify(nest.body)
            nests.append(ir.Nest(name, body, part, structure=follows, shared=is_shared))
            if statement.out.tensor.is_sparse and nest.in_place:
                empty.append(self._init(statement, temps, driver, part, parts))
        if in_place and temps:
            raise shares_rows(statement.out.tensor.name, composition)
        if covers and not in_place:
            return [tuple(nests)]
        return [tuple(empty or [self._init(statement, temps, driver, -1, parts)]), tuple(nests)]

    def _built(
        self,
        roots: tuple[Statement, tuple[Statement, ...]],
        temps: list[Statement],
        structure: str,
        formats: tuple[Any, ...],
        *,
        shared: bool,
    ) -> list[BuiltNest]:
        """The nest of a statement, with the lists that are appended to beside it, for each
        format."""
        st, also = roots
        tables = (Tables(self.program, {structure: f} if structure else {}) for f in formats)
        return [
            NestBuilder(t, st, temps, structure, shared=shared, also=also).build() for t in tables
        ]

    def _separate(
        self, root: ir.Assign, inline: list[ir.Assign], joined: Fused
    ) -> list[tuple[ir.Nest, ...]]:
        """Stages for the totals of a statement, as arrays, and then for the statement. Loops come
        back to an element of the output: no accumulator could hold its totals."""
        names = {t.out.tensor.name for t in joined.totals}
        self.tensors |= {n: replace(self.tensors[n], role="temp") for n in names}
        self.program = replace(self.program, tensors=tuple(self.tensors.values()))
        stages: list[tuple[ir.Nest, ...]] = []
        for a in (a for a in inline if a.out.tensor.name in names):
            out = replace(a.out, tensor=self.tensors[a.out.tensor.name])
            stages += self.stages(replace(a, out=out), [])
        rest = [a for a in inline if a.out.tensor.name not in names]
        return [*stages, *self.stages(root, _read_by(root, rest))]

    def _check_overlap(self, st: Statement, temps: list[Statement], fmt: Any) -> None:
        """A part with blocks may store zeros where another has an entry: only reductions that they
        do not change are computed on it."""
        if st.out.tensor.is_sparse or temps or not st.op:
            raise ProgramError(
                "P107",
                f"{st.out.tensor.name} is no plain reduction, and parts of {fmt} store "
                "coordinates more than once",
                hint="compose formats without blocks, or use one format for all",
            )

    def _init(
        self,
        st: Statement,
        temps: list[Statement],
        driver: Driver | None,
        part: int,
        parts: dict[str, Any],
    ) -> ir.Nest:
        """The nest that stores the initial value of all elements of the output (of a part of it, if
        sparse): the value of the statement where `driver` stores no entry. Reductions over its
        entries are then the identity. A composed format reads as its fill, since its parts are read
        at their own rows only."""
        structure = driver.structure if driver else ""
        composed = bool(structure) and hasattr(self.tensors[structure].format, "parts")
        followers = {
            t.out.tensor.name: ir.identity_of(t.op, t.out.dtype)
            for t in temps
            if driver and t.op and driver in (driver_of(t), outer_driver(t))
        }

        def visit(e: Any) -> Any:
            if isinstance(e, ir.Access) and e.tensor.name in followers:
                return followers[e.tensor.name]
            if isinstance(e, ir.Access) and composed and e.tensor.structure == structure:
                return ir.cast(ir.Const(e.tensor.fill, dtypes.float64), e.dtype)
            return rebuild(e, visit)

        if st.op and driver_of(st):
            value = ir.cast(ir.identity_of(st.op, st.value.dtype), st.out.dtype)
            plain, rest = Statement(st.out, "", (), value), []
        else:
            plain = replace(st, value=visit(st.value))
            rest = _read_by(plain, [replace(t, value=visit(t.value)) for t in temps])
        tables = Tables(self.program, parts)
        body = simplify(NestBuilder(tables, plain, rest, "", shared=False).build().body)
        follows = structure if part >= 0 else ""
        return ir.Nest(f"{st.out.tensor.name}.init", body, part, structure=follows)


def _is_separable(joined: Fused, temps: list[Statement]) -> bool:
    """Whether the totals can be arrays: dense ones, computed from no other reduction."""
    read = names_read(*(t.value for t in joined.totals))
    return not joined.out.tensor.is_sparse and not any(t.out.tensor.name in read for t in temps)


def _root_driver(st: Statement, temps: list[Statement]) -> Driver:
    """The structure that the loops of a root statement follow, and its indices; or nothing."""
    own = driver_of(st)
    if own:
        return own
    axes = {x.name for x in indices_in(st.out.coords)}
    for driver in map(outer_driver, temps):
        if driver and axes & set(driver.indices):
            return driver
    return Driver("", ())
