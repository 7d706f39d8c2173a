"""Pass: where a GPU keeps the rows of temporaries that `compute_at` placed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tilewright.errors import illegal
from tilewright.ir import core as ir


def keep_rows(program: ir.Program) -> ir.Program:
    """Rows become shared memory or registers; what is behind the end of these is in an array.

    before: alloc w: row[end - begin]      after: alloc w.row: shared[256]
            w[p - begin] = exp(…)                 let v = exp(…)
            sync                                  if p - begin < 256: w.row[p - begin] = v
            … w[p - begin] …                      if p - begin >= 256: w.values[p] = v
                                                  sync
                                                  … where(p - begin < 256, w.row[…], w.values[p]) …

    In loops bound to threads each has a row. Where a serial loop comes to the memory again, a
    barrier after its readers separates it from the next row.
    """
    return ir.map_bodies(program, lambda body: _Rows().visit(body, ()))


class _Rows:
    def __init__(self) -> None:
        # By name: the declaration, what is in the place of its buffer, and the first indices in it.
        self.rows: dict[str, tuple[ir.Alloc, ir.Buffer, tuple[ir.Expr, ...]]] = {}
        self.values = 0

    def visit(self, s: Any, around: tuple[ir.For, ...]) -> Any:
        if isinstance(s, ir.Alloc) and s.memory != "row":
            return self.declared(s, around)
        inside = (*around, s) if isinstance(s, ir.For) else around
        s = ir.rebuild(s, partial(self.visit, around=inside))
        if isinstance(s, ir.Seq) and any(f.kind not in ir.THREADS for f in around):
            shared = any(isinstance(x, ir.Alloc) and x.buffer.scope == "shared" for x in s.body)
            return ir.seq(*s.body, ir.Sync()) if shared and s.body[-1] != ir.Sync() else s
        is_access = isinstance(s, (ir.Load, ir.Store)) and s.buffer.scope == "row"
        return self.access(s, around) if is_access and s.buffer.name in self.rows else s

    def declared(self, s: ir.Alloc, around: tuple[ir.For, ...]) -> ir.Alloc:
        threads = [f for f in around if f.kind in ir.THREADS and s.memory == "shared"]
        first = ir.as_expr(s.most) if s.most else s.extents[0]
        shape = (*(f.end for f in threads), first, *s.extents[1:])
        b = replace(s.buffer, name=f"{s.buffer.name}.row", shape=shape, scope=s.memory)
        self.rows[s.buffer.name] = s, b, tuple(f.var for f in threads)
        return ir.Alloc(b)

    def access(self, x: Any, around: tuple[ir.For, ...]) -> Any:
        """A load or store of an element, or of one in the array."""
        alloc, buffer, first = self.rows[x.buffer.name]
        names = {f.name for f in around if f.kind in ir.THREADS}
        if buffer.scope == "register" and any(ir.free_vars(i) & names for i in x.index):
            why = f"threads share a row of {alloc.buffer.name}, and a register belongs to one"
            raise illegal(why, f'compute_at({alloc.buffer.name!r}, …, "shared")')
        kept = replace(x, buffer=buffer, index=(*first, *x.index))
        if not alloc.rest:
            return kept
        at = list(alloc.rest[0].index)
        for n, i in zip(alloc.along, x.index, strict=True):
            at[n] = ir.add(at[n], i)
        behind = replace(x, buffer=alloc.rest[0].buffer, index=tuple(at))
        is_kept = ir.binary("<", x.index[0], alloc.most)
        if isinstance(x, ir.Load):
            return ir.select(is_kept, kept, behind)
        self.values += 1
        value = ir.Var(f"{buffer.name}.value{self.values}", x.value.dtype)
        return ir.seq(
            ir.Let(value, x.value),
            ir.If(is_kept, replace(kept, value=value)),
            ir.If(ir.binary(">=", x.index[0], alloc.most), replace(behind, value=value)),
        )
