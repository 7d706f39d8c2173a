"""Passes on addresses and names: flat offsets, inlined arithmetic."""

from dataclasses import replace
from typing import Any

from tilewright import dtypes
from tilewright.ir import core as ir


def inline_lets(program: ir.Program) -> ir.Program:
    """Lets of plain arithmetic are replaced by their values; lets that load or search stay.

    before: let k = k_o * 64 + k_i; let j = indices[p]; … X[j, k]
    after:  let j = indices[p]; … X[j, k_o * 64 + k_i]
    """
    return ir.map_bodies(program, lambda s: ir.simplify(_inline(s, {})))


def _inline(s: Any, known: dict[str, ir.Expr]) -> Any:
    if isinstance(s, ir.Seq):
        out: list[ir.Stmt] = []
        for b in s.body:
            if isinstance(b, ir.Let):
                value = ir.substitute(b.value, known)
                if ir.reads_memory(value):
                    out.append(ir.Let(b.var, value))
                else:
                    known = {**known, b.var.name: value}
            else:
                out.append(_inline(b, known))
        return ir.seq(*out)
    if isinstance(s, (ir.For, ir.If)):
        return ir.rebuild(
            s, lambda c: _inline(c, known) if isinstance(c, ir.Stmt) else ir.substitute(c, known)
        )
    return ir.substitute(s, known)


IN_MEMORY = ("global", "part", "shared", "row")


def flatten_addresses(program: ir.Program) -> ir.Program:
    """Loads and stores of memory get one offset; registers keep their indices.

    before: X[j, k]        after: X[int64(j) * X_stride0 + int64(k)]
    """

    def visit(x: Any) -> Any:
        if isinstance(x, (ir.Load, ir.Store)) and x.buffer.scope in IN_MEMORY:
            return replace(x, index=(flat_offset(x),))
        return x

    return ir.map_bodies(program, lambda s: ir.simplify(ir.transform(s, visit)))


def flat_offset(x: ir.Load | ir.Store) -> ir.Expr:
    """The offset of an access, in elements: 64 bits, in shared memory 32."""
    buffer = x.buffer
    width = dtypes.int32 if buffer.scope == "shared" else dtypes.int64
    if buffer.scope == "part" and len(x.index) == 1:
        return x.index[0]
    strides = buffer.strides
    if strides is None:
        packed: list[ir.Expr] = []
        step: ir.Expr = ir.Const(1, width)
        for extent in reversed(buffer.shape):
            packed.insert(0, step)
            step = ir.mul(step, ir.cast(extent, width))
        strides = tuple(packed)
    total: ir.Expr = ir.Const(0, width)
    for i, s in zip(x.index, strides, strict=True):
        total = ir.add(total, ir.mul(ir.cast(i, width), ir.cast(s, width)))
    return total
