"""Pass: where a GPU keeps the rows of temporaries that `compute_at` placed."""

from dataclasses import replace
from typing import Any

from tilewright.errors import illegal
from tilewright.ir import core as ir

Rows = dict[str, tuple[ir.AllocRow, ir.Buffer]]  # declarations, and the buffers that replace them


def keep_rows(program: ir.Program) -> ir.Program:
    """Rows become shared memory, or registers where all loops over them are unrolled.

    before: alloc w: row[end - begin]      after: alloc w.row: shared[256]
            w[p - begin] = exp(…)                 let v = exp(…)
            … w[p - begin] …                      if p - begin < 256: w.row[p - begin] = v
                                                  if p - begin >= 256: w.values[p] = v
                                                  sync
                                                  … where(p - begin < 256, w.row[…], w.values[p]) …

    Inside a loop bound to threads each iteration has a row of its own. A barrier follows the last
    store to a row; a second one ends an iteration of a serial loop if the next one would overwrite
    a row that is still being read.
    """
    return ir.map_bodies(program, lambda body: _visit(body, (), {}))


def _visit(s: Any, around: tuple[ir.For, ...], rows: Rows) -> Any:
    if isinstance(s, ir.Seq):
        return _seq(s, around, rows)
    inside = (*around, s) if isinstance(s, ir.For) else around
    s = ir.rebuild(s, lambda x: _visit(x, inside, rows))
    is_access = isinstance(s, (ir.Load, ir.Store)) and s.buffer.scope == "row"
    return _access(s, around, *rows[s.buffer.name]) if is_access else s


def _seq(s: ir.Seq, around: tuple[ir.For, ...], rows: Rows) -> ir.Stmt:
    out: list[ir.Stmt] = []
    shared: set[str] = set()
    ends: list[int] = []  # the lines before a barrier
    for n, b in enumerate(s.body):
        if isinstance(b, ir.AllocRow):
            kept = _kept(b, s, around)
            rows = rows | {b.buffer.name: (b, kept)}
            shared |= {b.buffer.name} if kept.scope == "shared" else set()
            b = ir.Alloc(kept)
        out.append(_visit(b, around, rows))
        if shared & _used(ir.Store, s.body[n : n + 1]) - _used(ir.Store, s.body[n + 1 :]):
            out.append(ir.Sync())
            ends.append(n + 1)
    if ends and any(f.kind not in ir.THREADS for f in around):
        again = _used(ir.Store, s.body[: ends[0]]) & _used(ir.Load, s.body[ends[-1] :])
        out += [ir.Sync()] if again & shared else []
    return ir.seq(*out)


def _used(kind: type, statements: tuple[ir.Stmt, ...]) -> set[str]:
    """The rows that statements store to, or load from."""
    nodes = (x for s in statements for x in ir.walk(s, kind))
    return {x.buffer.name for x in nodes if x.buffer.scope == "row"}


def _kept(alloc: ir.AllocRow, body: ir.Seq, around: tuple[ir.For, ...]) -> ir.Buffer:
    """The buffer in the place of a row. Raises ScheduleError[S102] where its size is not known."""
    row, threads = alloc.buffer, [f.end for f in around if f.kind in ir.THREADS]
    if not all(isinstance(e, ir.Const) for e in alloc.kept):
        sizes = " · ".join(map(str, alloc.extents))
        hint = f'specialize(), compute_at({row.name!r}, …, most=1024) or scope="global"'
        raise illegal(f"a GPU keeps a constant number of {row.name}, and there are {sizes}", hint)
    accesses = (x for x in ir.walk(body, ir.Load, ir.Store) if x.buffer == row)
    used = {name for x in accesses for i in x.index for name in ir.free_vars(i)}
    loops = ir.statements(body, ir.For)
    if used - ir.free_vars(body) <= {f.name for f in loops if f.kind in ("unroll", "vector")}:
        return replace(row, name=f"{row.name}.row", shape=alloc.kept, scope="register")
    return replace(row, name=f"{row.name}.row", shape=(*threads, *alloc.kept), scope="shared")


def _access(x: Any, around: tuple[ir.For, ...], alloc: ir.AllocRow, buffer: ir.Buffer) -> Any:
    """A load or store of an element of a row, or of the one in the array."""
    threads = [f.var for f in around if f.kind in ir.THREADS]
    first = threads[: len(buffer.shape) - len(x.index)]
    kept = replace(x, buffer=buffer, index=(*first, *x.index))
    if not alloc.rest:
        return kept
    at = list(alloc.rest[0].index)
    for n, i, step in zip(alloc.along, x.index, alloc.steps, strict=True):
        at[n] = ir.add(at[n], ir.mul(i, step))
    behind = replace(x, buffer=alloc.rest[0].buffer, index=tuple(at))
    is_kept, is_behind = (ir.binary(op, x.index[0], alloc.kept[0]) for op in ("<", ">="))
    if isinstance(x, ir.Load):
        return ir.select(is_kept, kept, behind)
    value = ir.Var(f"{buffer.name}.value", x.value.dtype)
    both = (is_kept, kept), (is_behind, behind)
    stores = (ir.If(cond, replace(store, value=value)) for cond, store in both)
    return ir.seq(ir.Let(value, x.value), *stores)
