"""The printer: every node, every level, as the text that `print` shows.

Nodes print themselves through this module, so it knows their classes by name only.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

_INFIX = {
    "*": 7, "/": 7, "//": 7, "%": 7, "+": 6, "-": 6, "<<": 5, ">>": 5,
    "<": 4, "<=": 4, ">": 4, ">=": 4, "==": 4, "!=": 4, "&": 3, "^": 2, "|": 1,
}  # fmt: skip


def expr_text(e: Any, outer: int = 0) -> str:
    """One expression, with the fewest parentheses below an operator of precedence `outer`."""
    if type(e).__name__ != "Binary":
        return _EXPRESSIONS[type(e).__name__](e)
    if e.op not in _INFIX:
        return f"{e.op}({expr_text(e.a)}, {expr_text(e.b)})"
    level = _INFIX[e.op]
    text = f"{expr_text(e.a, level)} {e.op} {expr_text(e.b, level + 1)}"
    return f"({text})" if level < outer else text


def _search(e: Any) -> str:
    verb = "find_last" if e.last else "find"
    return f"{verb}({expr_text(e.key)} in {e.keys.name}[{expr_text(e.lo)}:{expr_text(e.hi)}])"


_EXPRESSIONS: dict[str, Callable[[Any], str]] = {
    "Const": lambda e: f"{e.value:g}" if isinstance(e.value, float) else str(e.value).lower(),
    "Var": lambda e: e.name,
    "Index": lambda e: e.name,
    "Access": lambda e: f"{e.tensor.name}[{_commas(e.coords)}]",
    "Load": lambda e: f"{e.buffer.name}[{_commas(e.index)}]",
    "Unary": lambda e: f"-{expr_text(e.a, 8)}" if e.op == "-" else f"{e.op}({expr_text(e.a)})",
    "Select": lambda e: f"where({_commas((e.cond, e.a, e.b))})",
    "Cast": lambda e: f"{e.dtype}({expr_text(e.a)})",
    "Reduce": lambda e: f"{e.op}({expr_text(e.body)} over {' '.join(a.name for a in e.axes)})",
    "Search": _search,
    "Holds": lambda e: f"{expr_text(e.key)} in {e.workspace.name}",
    "Stored": lambda e: f"stored({expr_text(e.access)})",
    "Cursor": lambda e: (
        f"{e.loop.name}.{ {-1: 'coordinate', -2: 'value'}.get(e.operand, f'position{e.operand}') }"
    ),
    "Ramp": lambda e: f"{expr_text(e.base, 6)} +: {e.dtype.lanes}",
    "Broadcast": lambda e: f"broadcast({expr_text(e.a)}, {e.dtype.lanes})",
    "ReduceLanes": lambda e: f"{e.op}_lanes({expr_text(e.a)})",
    "ReduceThreads": lambda e: f"{e.op}_threads({expr_text(e.a)}, {e.axis}:{e.extent})",
}


def _commas(items: Sequence[Any]) -> str:
    return ", ".join(map(expr_text, items))


def stmt_text(s: Any, indent: int = 0) -> str:
    """A statement and all below it, one line each."""
    return "\n".join(_lines(s, indent))


def _lines(s: Any, depth: int) -> list[str]:
    kind = type(s).__name__
    if kind == "Seq":
        return [line for b in s.body for line in _lines(b, depth)]
    line = "  " * depth + _STATEMENTS[kind](s)
    return [line, *_lines(s.body, depth + 1)] if hasattr(s, "body") else [line]


def _for(s: Any) -> str:
    notes = [s.kind] if s.kind != "serial" else []
    notes += ["private"] if s.private else []
    notes += [f"unroll {s.unroll_hint}"] if s.unroll_hint else []
    notes += [f"{s.stages} stages"] if s.stages else []
    note = f"   # {', '.join(notes)}" if notes else ""
    return f"for {s.name} in {expr_text(s.begin)}:{expr_text(s.end)}{note}"


def _merge(s: Any) -> str:
    ranges = zip(s.runs, map(expr_text, s.ends), strict=True)
    lists = (f"{r.buffer.name}[{expr_text(r.index[0])}:{end}]" for r, end in ranges)
    return f"for {s.name} in {s.op}({', '.join(lists)})"


def _compute(s: Any) -> str:
    over = f"over {' '.join(s.reduce)}"
    how = f" mma({', '.join(s.mma)})" if s.mma else ""
    if not s.op:
        by = {r: f" by {r.factor.name}" if r.factor else "" for r in s.reductions}
        totals = (f"{r.total.name} = {r.op}({expr_text(r.value)} {over}){by[r]}" for r in by)
        where = f" where {', '.join(totals)}" if s.reductions else ""
        return f"{expr_text(s.out)} = {expr_text(s.value)}{where}{how}"
    how += " online" if s.online else ""
    how = (" in place" if s.in_place else "") + (" atomic" if s.atomic else "") + how
    return f"{expr_text(s.out)} = {s.op}({expr_text(s.value)} {over}){how}"


def _store(s: Any) -> str:
    op = {"": "=", "sum": "+=", "prod": "*="}.get(s.op, f"{s.op}=")
    line = f"{s.buffer.name}[{_commas(s.index)}] {op} {expr_text(s.value)}"
    return line + (" atomic" if s.atomic else "")


_STATEMENTS: dict[str, Callable[[Any], str]] = {
    "Assign": lambda s: f"{expr_text(s.out)} {'+=' if s.op else '='} {expr_text(s.value)}",
    "For": _for,
    "Merge": _merge,
    "Scatter": lambda s: f"{s.workspace.name}[{expr_text(s.key)}] += {expr_text(s.value)}",
    "Drain": lambda s: f"for {s.name} in {s.workspace.name}",
    "Let": lambda s: f"let {s.var.name} = {expr_text(s.value)}",
    "If": lambda s: f"if {expr_text(s.cond)}",
    "Compute": _compute,
    "Store": _store,
    "Alloc": lambda s: f"alloc {s.buffer}",
    "AllocRow": lambda s: (
        f"alloc {replace(s.buffer, shape=s.extents)}"
        + (f", behind {_commas(s.kept)} at {_commas(s.rest)}" if s.rest else "")
    ),
    "Prefetch": lambda s: f"prefetch {expr_text(s.element)}",
    "CopyAsync": lambda s: f"async {_store(s)}",
    "Commit": lambda s: "commit",
    "Wait": lambda s: f"wait {s.pending}",
    "Sync": lambda s: f"sync {s.lanes} lanes" if s.lanes else "sync",
    "LoadTile": lambda s: f"load {s.tile.held} = {_tile(replace(s.tile, held=''))}",
    "Mma": lambda s: (
        f"mma {s.acc.name}[{expr_text(s.slot)}] += {_tile(s.a)} @ {_tile(s.b)}   # {s.shape}"
    ),
}


def _tile(t: Any) -> str:
    if t.held:
        return t.held
    ends = ("r", t.row_limit), ("c", t.col_limit)
    limits = [f"{name} < {expr_text(e)}" for name, e in ends if type(e).__name__ != "Const"]
    where = f" where {', '.join(limits)}" if limits else ""
    at = (expr_text(t.offset), f"r*{expr_text(t.row_stride, 7)}", f"c*{expr_text(t.col_stride, 7)}")
    return f"{t.buffer.name}[{' + '.join(at)}{where}]"


def program_text(p: Any) -> str:
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
