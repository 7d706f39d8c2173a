"""Extents of a mask: at most three ranges of keys outside which no row of a tile sees a key.

The mask is taken as a disjunction of at most three conjunctions (of more: everything). A comparison
that is linear in the key, `c · at.kv + row ≤ row`, also with one side below `//`, bounds the range
of its conjunction; a condition of the row alone empties it or does not; any other leaves it as it
is. Integers wrap around, so a comparison counts only where none of its parts can.

One analysis, written twice: as C text for the kernels, and as a program of the same functions
(kernels/variant.h) for the planner, which must not wait for a compiler at each new mask.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from tilewright import dtypes
from tilewright.attention.bounds import NAMES, bound
from tilewright.ir import core as ir

MAX_RANGES = 3
TILE = ("qo", "kv", "qo_head", "kv_head", "request", "key", "qo_len", "kv_len")
"""The fields of `tw::Tile` (kernels/bounds.h), in order."""
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_LINES = {"+": "line_add", "-": "line_sub", "*": "line_mul", "//": "line_div"}

Case = tuple[ir.Expr, ...]
"""Conditions that all hold."""


def cases(e: Any, wanted: bool = True) -> list[Case]:
    """Conjunctions of which one holds where the mask does, or where it does not."""
    if isinstance(e, ir.Const):
        return [()] if bool(e.value) == wanted else []
    if isinstance(e, ir.Unary) and e.op == "not":
        return cases(e.a, not wanted)
    if isinstance(e, ir.Select):
        then, other = ir.binary("&", e.cond, e.a), ir.binary("&", ir.unary("not", e.cond), e.b)
        return cases(ir.binary("|", then, other), wanted)
    if isinstance(e, ir.Binary) and e.op in ("&", "|"):
        a, b = cases(e.a, wanted), cases(e.b, wanted)
        both = [x + y for x in a for y in b] if (e.op == "&") == wanted else [*a, *b]
        return both if len(both) <= MAX_RANGES else [()]
    if isinstance(e, ir.Binary) and e.op in ir.COMPARISON and e.a.dtype == dtypes.int32:
        return [(e if wanted else ir.binary(_NEGATED[e.op], e.a, e.b),)]
    return [(e if wanted else ir.unary("not", e),)]


def ranges(mask: ir.Expr, ops: Any) -> list[Any]:
    """The range of keys of each case, as `ops` (Text or Program) writes it; at least one."""
    ranges = []
    for case in cases(mask):
        keys = ops.key
        for condition in case:
            if not _reads_key(condition):
                keys = ops.keys_both(keys, ops.keys_if(bound(condition, ops), ops.key))
            elif isinstance(condition, ir.Binary) and condition.op in ("<", "<=", ">", ">=", "=="):
                keys = ops.keys_both(keys, _compared(condition, ops))
        ranges.append(keys)
    return ranges or [ops.keys_none()]


def _reads_key(e: ir.Expr) -> bool:
    return any(isinstance(x, ir.Var) and x.name in ("at.kv", "at.key") for x in ir.walk(e))


def _compared(e: ir.Binary, ops: Any) -> Any:
    a, b = _line(e.a, ops), _line(e.b, ops)
    if e.op in (">", ">="):
        a, b = b, a
    if e.op == "==":
        return ops.keys_both(ops.keys_up_to(a, b, ops.key), ops.keys_up_to(b, a, ops.key))
    return (ops.keys_up_to if "=" in e.op else ops.keys_below)(a, b, ops.key)


def _line(e: Any, ops: Any) -> Any:
    """An integer as a linear function of the key."""
    if not _reads_key(e):
        return ops.line(bound(e, ops))
    if isinstance(e, ir.Var):
        return ops.line_key() if e.name == "at.key" else ops.kv
    if isinstance(e, ir.Binary) and e.op in _LINES:
        return getattr(ops, _LINES[e.op])(_line(e.a, ops), _line(e.b, ops), ops.key)
    if isinstance(e, ir.Unary) and e.op == "-":
        return ops.line_sub(ops.line(ops.constant(0)), _line(e.a, ops), ops.key)
    return ops.line_unknown()


OPERATIONS = (
    "constant", "position", "line", "line_key", "line_unknown", *_LINES.values(), "keys_none",
    "keys_both", "keys_if", "keys_up_to", "keys_below", "bound_int", "bound_bool", "bound_truth",
    "bound_select", *(f"bound_{name}" for name in NAMES),
)  # fmt: skip
"""What a program may do, by its number: the functions of kernels/mask.h."""

Steps = tuple[int, ...]


class Program:
    """Writes ranges as steps in postfix order, each an operation and its argument. `values`: the
    integer scalars that are known; others may be anything."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.key, self.kv = self.step("position", TILE.index("key")), self.step("line_key")

    def step(self, name: str, argument: int = 0) -> Steps:
        return OPERATIONS.index(name), argument

    def __getattr__(self, name: str) -> Callable[..., Steps]:
        return lambda *operands: (*itertools.chain(*operands), *self.step(name))

    def constant(self, value: int) -> Steps:
        return self.step("constant", value)

    def position(self, e: ir.Var, everything: Steps) -> Steps:
        name = e.name.removeprefix("at.")
        return self.step("position", TILE.index(name)) if name in TILE else everything

    def value(self, e: ir.Load, everything: Steps) -> Steps:
        known = not e.index and e.buffer.name in self.values
        return self.constant(int(self.values[e.buffer.name])) if known else everything
