"""The class of a tile under a mask, empty, full or partial, by interval arithmetic.

One analysis, `bound`, of two kinds of operations: `Text` writes C for the kernels,
`extents.Program` steps for the planner; both name the functions of kernels/bounds.h. An interval is
a pair (lo, hi) of integers, a condition an interval in {0, 1}. What cannot be bounded (floats,
loads from tensors, results that may leave int32) is everything, so that a tile counts as partial.
"""

from typing import Any

from tilewright import dtypes
from tilewright.ir.nodes import BITWISE, Binary, Cast, Const, Load, Select, Unary
from tilewright.ir.nodes import Var as VarNode

# The operations `bound_…` of kernels/bounds.h, by those of the IR.
_UNARY = {"-": "neg", "not": "not", "abs": "abs"}
_BINARY = {
    "+": "add", "-": "sub", "*": "mul", "min": "lower", "max": "upper", "//": "div", "%": "mod",
    "<": "less", "<=": "less_equal", "==": "same", "&": "and", "|": "or", "^": "xor",
}  # fmt: skip
NAMES = (*_UNARY.values(), *_BINARY.values())
_MIRRORED = {">": "<", ">=": "<="}


def bound(e: Any, ops: Any) -> Any:
    """The interval of an integer or a condition, by `ops` (Text or Program)."""
    everything = ops.bound_bool() if e.dtype == dtypes.bool_ else ops.bound_int()
    if e.dtype.is_float or (isinstance(e, (Cast, Binary)) and e.a.dtype.is_float):
        return everything
    if isinstance(e, Const):
        return ops.constant(int(e.value))
    if isinstance(e, VarNode):
        return ops.position(e, everything)
    if isinstance(e, Load):
        return ops.value(e, everything)
    if isinstance(e, Cast):
        narrows = e.dtype == dtypes.bool_ and e.a.dtype != dtypes.bool_
        return ops.bound_truth(bound(e.a, ops)) if narrows else bound(e.a, ops)
    if isinstance(e, Unary) and e.op in _UNARY:
        return getattr(ops, f"bound_{_UNARY[e.op]}")(bound(e.a, ops))
    if isinstance(e, Select):
        return ops.bound_select(*(bound(x, ops) for x in (e.cond, e.a, e.b)))
    if isinstance(e, Binary) and (e.op not in BITWISE or e.dtype == dtypes.bool_):
        a, b = bound(e.a, ops), bound(e.b, ops)
        if e.op == "!=":
            return ops.bound_not(ops.bound_same(a, b))
        if e.op in _MIRRORED:
            a, b = b, a
        return getattr(ops, f"bound_{_BINARY[_MIRRORED.get(e.op, e.op)]}")(a, b)
    return everything


class Text:
    """Writes C expressions of type `tw::Bound` over the positions of `tw::Tile`, and ranges over
    the lines `kv` and `key`: the positions and the numbers of keys. Scalars are the members
    `v_NAME` of the variant's struct."""

    key, kv = "tile.key", "kv"

    def line_key(self) -> str:
        return "key"

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: f"tw::{name}({', '.join(arguments)})"

    def constant(self, value: int) -> str:
        return f"tw::bound({value}ll)"

    def position(self, e: VarNode, everything: str) -> str:
        name = e.name.removeprefix("at.")
        return everything if name == "q_token" else f"tile.{name}"

    def value(self, e: Load, everything: str) -> str:
        """Scalars are known, and so are values of the tile's request if it is of one; of its keys
        a kernel may read a few; no others."""
        name = f"v_{e.buffer.name}"
        if not e.index:
            return f"tw::bound({name})"
        first, *rest = e.index
        if not isinstance(first, VarNode) or first.name != "at.request":
            return everything
        if rest:
            return f"tw::bound_elements({name}, tile.request, {bound(rest[0], self)})"
        known = f"tw::bound({name}.at(static_cast<int32_t>(tile.request.lo), 0))"
        return f"(tile.request.lo == tile.request.hi ? {known} : {everything})"
