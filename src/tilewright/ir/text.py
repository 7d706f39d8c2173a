"""The printer: every node, every level, as the text that `print` shows."""

from __future__ import annotations

from typing import Any

from tilewright.ir import nodes as n

_INFIX = {
    "*": 7, "/": 7, "//": 7, "%": 7, "+": 6, "-": 6, "<<": 5, ">>": 5,
    "<": 4, "<=": 4, ">": 4, ">=": 4, "==": 4, "!=": 4, "&": 3, "^": 2, "|": 1,
}  # fmt: skip


def expr_text(e: Any, outer: int = 0) -> str:
    """One expression, with the fewest parentheses."""
    if isinstance(e, n.Const):
        return f"{e.value:g}" if isinstance(e.value, float) else str(e.value).lower()
    if isinstance(e, n.Var):
        return e.name
    if isinstance(e, n.Access):
        return f"{e.tensor.name}[{_commas(e.coords)}]"
    if isinstance(e, n.Load):
        return f"{e.buffer.name}[{_commas(e.index)}]"
    if isinstance(e, n.Binary):
        if e.op not in _INFIX:
            return f"{e.op}({expr_text(e.a)}, {expr_text(e.b)})"
        level = _INFIX[e.op]
        text = f"{expr_text(e.a, level)} {e.op} {expr_text(e.b, level + 1)}"
        return f"({text})" if level < outer else text
    if isinstance(e, n.Unary):
        return f"-{expr_text(e.a, 8)}" if e.op == "-" else f"{e.op}({expr_text(e.a)})"
    if isinstance(e, n.Select):
        return f"where({expr_text(e.cond)}, {expr_text(e.a)}, {expr_text(e.b)})"
    if isinstance(e, n.Cast):
        return f"{e.dtype}({expr_text(e.a)})"
    if isinstance(e, n.Reduce):
        return f"{e.op}({expr_text(e.body)} over {' '.join(a.name for a in e.axes)})"
    if isinstance(e, n.Search):
        verb = "find_last" if e.last else "find"
        return f"{verb}({expr_text(e.key)} in {e.keys.name}[{expr_text(e.lo)}:{expr_text(e.hi)}])"
    if isinstance(e, n.Ramp):
        return f"{expr_text(e.base, 6)} +: {e.dtype.lanes}"
    if isinstance(e, n.Broadcast):
        return f"broadcast({expr_text(e.a)}, {e.dtype.lanes})"
    if isinstance(e, n.ReduceLanes):
        return f"{e.op}_lanes({expr_text(e.a)})"
    if isinstance(e, n.ReduceThreads):
        return f"{e.op}_threads({expr_text(e.a)}, {e.axis}:{e.extent})"
    raise AssertionError(type(e))


def _commas(items: tuple[n.Expr, ...]) -> str:
    return ", ".join(expr_text(i) for i in items)


def stmt_text(s: Any, indent: int = 0) -> str:
    """A statement and all below it, one line each."""
    return "\n".join(_lines(s, indent))


def _lines(s: Any, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(s, n.Seq):
        return [line for b in s.body for line in _lines(b, depth)]
    if isinstance(s, n.Assign):
        return [f"{pad}{expr_text(s.out)} {'+=' if s.op else '='} {expr_text(s.value)}"]
    if isinstance(s, n.For):
        notes = [s.kind] if s.kind != "serial" else []
        notes += ["private"] if s.private else []
        notes += [f"unroll {s.unroll_hint}"] if s.unroll_hint else []
        note = f"   # {', '.join(notes)}" if notes else ""
        head = f"{pad}for {s.name} in {expr_text(s.begin)}:{expr_text(s.end)}{note}"
        return [head, *_lines(s.body, depth + 1)]
    if isinstance(s, n.Let):
        return [f"{pad}let {s.var.name} = {expr_text(s.value)}"]
    if isinstance(s, n.If):
        return [f"{pad}if {expr_text(s.cond)}", *_lines(s.body, depth + 1)]
    if isinstance(s, n.Compute):
        if not s.op:
            return [f"{pad}{expr_text(s.out)} = {expr_text(s.value)}"]
        how = (" in place" if s.in_place else "") + (" atomic" if s.atomic else "")
        how += f" mma({', '.join(s.mma)})" if s.mma else ""
        return [
            f"{pad}{expr_text(s.out)} = {s.op}({expr_text(s.value)} over {' '.join(s.reduce)}){how}"
        ]
    if isinstance(s, n.Store):
        op = {"": "=", "sum": "+=", "prod": "*="}.get(s.op, f"{s.op}=")
        return [
            f"{pad}{s.buffer.name}[{_commas(s.index)}] {op} {expr_text(s.value)}"
            + (" atomic" if s.atomic else "")
        ]
    if isinstance(s, n.Alloc):
        return [f"{pad}alloc {s.buffer}"]
    if isinstance(s, n.Prefetch):
        return [f"{pad}prefetch {expr_text(s.place)}"]
    if isinstance(s, n.Sync):
        return [f"{pad}sync"]
    if isinstance(s, n.MmaZero):
        return [f"{pad}mma_zero {s.acc.name}[{expr_text(s.slot)}]"]
    if isinstance(s, n.Mma):
        return [
            f"{pad}mma {s.acc.name}[{expr_text(s.slot)}] += {_tile(s.a)} @ {_tile(s.b)}   # "
            f"{s.shape}"
        ]
    if isinstance(s, n.MmaStore):
        return [
            f"{pad}mma_store {_tile(s.to)} {'+' if s.op else ''}= {s.acc.name}[{expr_text(s.slot)}]"
        ]
    raise AssertionError(type(s))


def _tile(t: n.Tile) -> str:
    limits = [
        f"{name} < {expr_text(e)}"
        for name, e in (("r", t.row_limit), ("c", t.col_limit))
        if not isinstance(e, n.Const)
    ]
    where = f" where {', '.join(limits)}" if limits else ""
    at = (expr_text(t.offset), f"r*{expr_text(t.row_stride, 7)}", f"c*{expr_text(t.col_stride, 7)}")
    return f"{t.buffer.name}[{' + '.join(at)}{where}]"


def program_text(p: n.Program) -> str:
    """A program at its level: the tensors, then what is computed."""
    lines = [f"program {p.name}   # {p.level}"]
    if p.level == "coordinates":
        lines += [f"  {t.role:6} {t}" for t in p.tensors]
        lines += [line for s in p.body for line in _lines(s, 1)]
        return "\n".join(lines)
    lines += [f"  {b}" for b in p.buffers]
    for number, stage in enumerate(p.stages):
        for nest in stage:
            part = f" part {nest.part}" if nest.part >= 0 else ""
            grid = f" grid ({_commas(nest.grid)})" if nest.grid else ""
            lines.append(f"  stage {number}: {nest.name}{part}{grid}")
            lines += _lines(nest.body, 2)
    return "\n".join(lines)
