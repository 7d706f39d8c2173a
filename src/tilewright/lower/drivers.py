"""What a statement iterates over: the structures whose stored coordinates its loops follow.

The rule does not depend on the order of operands. An axis that one structure has is driven by it.
Where several have it, one that makes the body the identity of the reduction where it is missing
drives it (products: the intersection); else all do, if the body is the identity where all are
missing (sums: the union); else the program is refused.
"""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from tilewright import dtypes
from tilewright.errors import ProgramError
from tilewright.ir import core as ir
from tilewright.ir.levels import is_list_of_pairs
from tilewright.lower.tables import Driver, Statement, drivers, names_read


@dataclass(frozen=True, slots=True)
class Iteration:
    """The structures that a statement iterates over. `op`: "" for one that is followed, the others
    being searched; "intersection": the first is followed, the others may be merged with it;
    "union": all are merged. `exact`: the condition of the body holds wherever the loops come to."""

    drivers: tuple[Driver, ...]
    op: str = ""
    exact: bool = False


def driver_of(st: Statement) -> Driver | None:
    """The structure whose stored coordinates the loops of a statement follow, if it is one."""
    it = iteration(st)
    return it.drivers[0] if it and it.op != "union" else None


def outer_driver(t: Statement) -> Driver | None:
    """The driver of a reduction as the loops around it can follow it: its own indices are none of
    theirs, though they may have the same names."""
    driver, reduced = driver_of(t), {a.name for a in t.axes}
    if driver is None:
        return None
    return Driver(driver.structure, tuple("" if n in reduced else n for n in driver.indices))


def drivers_read(st: Statement) -> list[Driver]:
    """The composed structures that an element of a dense output is computed from at its own
    indices. The loops follow their parts, which cannot be searched; where nothing is stored an
    earlier nest has computed the value."""
    name, own = st.out.tensor.name, {x.name for x in ir.indices_of(st.out)}
    if st.op or st.out.tensor.is_sparse or name in names_read(st.value):
        return []
    return [
        Driver.of(x) for x in ir.walk(st.value, ir.Access) if x.tensor.is_sparse
        and x.tensor.format.is_composed and not x.tensor.format.repeats
        and set(Driver.of(x).indices) <= own
    ]  # fmt: skip


def iteration(st: Statement) -> Iteration | None:
    """What a statement iterates over beside whole dimensions. Raises ProgramError[P107] where its
    value would depend on the order of operands."""
    if st.out.tensor.is_sparse:
        return Iteration((Driver.of(st.out),))
    shared = drivers(st)
    if not shared:
        return None
    if len(shared) == 1 and st.op != "append":
        return Iteration(tuple(shared))
    reduced = {a.name for a in st.axes}
    ranked = sorted(shared, key=lambda d: (*_rank(d, shared[d].format, reduced), d))
    zero = [d for d in ranked if is_identity(st, {d})]
    if zero:
        op = "intersection" if len(zero) > 1 or st.op == "append" else ""
        return Iteration(tuple(zero), op, _holds(st, zero))
    if is_identity(st, set(ranked)):
        return Iteration(tuple(ranked), "union", all(_holds(st, [d]) for d in ranked))
    names = " and ".join(shared[d].name for d in ranked)
    first = f"{shared[ranked[0]].name}[{', '.join(ranked[0].indices)}]"
    over = f"{st.op} over {', '.join(a.name for a in st.axes)}"
    rule = f"the structures of {names} share an axis of {over}; where they are missing"
    hint = f"name the coordinates: where=tw.stored({first}), or | and & of several"
    raise ProgramError("P107", f"{rule} {st.value} is not its identity", hint=hint)


def check_reduction(st: Statement, tensors: dict[str, ir.Tensor]) -> None:
    """Raises ProgramError[P107] where the value of a statement is not well defined."""
    it, structure = iteration(st), st.out.tensor.structure
    if structure and any(x.shared for f in tensors[structure].format.formats for x in f.levels):
        rule = f"{st.out} is stored like {structure}, whose rows may have pages in common"
        raise ProgramError("P107", rule, hint="store it in a dense output, or in its own format")
    if not it or not st.op or structure:
        return
    if st.op == "append" and not it.exact:
        rule = f"{st.out} is a list of the coordinates at which {_condition(st.value)}"
        hint = "the condition is stored(…) of tensors with that index, joined by | or by &"
        raise ProgramError("P107", rule, hint=hint)
    fmt = tensors[it.drivers[0].structure].format
    if fmt.repeats and not is_identity(st, {it.drivers[0]}):
        rule = f"{fmt} stores explicit zeros more than once, and they change {st.op} of {st.value}"
        hint = "a body that is the identity for zeros, or a format of entries only: csr, dcsr, hyb"
        raise ProgramError("P107", rule, hint=hint)


def _rank(driver: Driver, fmt: Any, reduced: set[str]) -> tuple[int, bool]:
    """The structures that are followed first: those that cannot be searched, then those whose rows
    are in one piece, and of these the ones that have the reduced axis below the others."""
    if fmt.is_composed:
        return 0, True
    if is_list_of_pairs(fmt.levels):
        return 2, False
    return int(all(x.unique for x in fmt.levels)), driver.indices[fmt.levels[-1].dim] not in reduced


def _condition(body: ir.Expr) -> ir.Expr:
    """The condition of a body that has one; else one that nothing is known of."""
    return body.cond if isinstance(body, ir.Select) else ir.Var("", dtypes.bool_)


def is_identity(st: Statement, missing: Container[Driver]) -> bool:
    """Whether the body changes nothing where these structures store no entry."""

    def read(x: ir.Access | ir.Stored) -> Any:
        if isinstance(x, ir.Stored):
            return False if Driver.of(x.access) in missing else None
        return x.tensor.fill if x.tensor.role == "input" and Driver.of(x) in missing else None

    if st.op == "append":
        return constant(_condition(st.value), read) is False
    value = constant(st.value, read)
    return value is not None and value == ir.identity_of(st.op, st.value.dtype).value


def _holds(st: Statement, stored: list[Driver]) -> bool:
    """Whether the condition of a body holds where these structures store an entry."""

    def read(x: ir.Access | ir.Stored) -> Any:
        return True if isinstance(x, ir.Stored) and Driver.of(x.access) in stored else None

    return constant(_condition(st.value), read) is True


def list_key(st: Statement) -> Any:
    """What lists that are appended to in one loop have in common; None for other statements."""
    return (st.out.coords, st.axes, _condition(st.value)) if st.op == "append" else None


def constant(e: ir.Expr, read: Callable[[ir.Access | ir.Stored], Any]) -> Any:
    """The value of an expression in which `read` knows the value of some accesses, and whether some
    are stored, else None. 0 · x is 0, and ∞ + x is ∞, whatever x is."""
    if isinstance(e, ir.Const):
        return e.value
    if isinstance(e, (ir.Access, ir.Stored)):
        return read(e)
    if isinstance(e, ir.Cast):
        value = constant(e.a, read)
        return value if value is None or e.dtype.is_float or math.isfinite(value) else None
    if isinstance(e, ir.Unary):
        value = constant(e.a, read)
        return None if value is None else _UNARY.get(e.op, lambda _: None)(value)
    if isinstance(e, ir.Select):
        cond, a, b = (constant(x, read) for x in (e.cond, e.a, e.b))
        return (a if a == b else None) if cond is None else (a if cond else b)
    if isinstance(e, ir.Binary):
        return _binary(e.op, constant(e.a, read), constant(e.b, read))
    return None


_UNARY: dict[str, Callable[[Any], Any]] = {
    "-": lambda a: -a, "abs": abs, "not": lambda a: not a, "tanh": math.tanh,
    "exp": lambda a: math.exp(a) if a < 700 else math.inf,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else None,
    "sin": lambda a: math.sin(a) if math.isfinite(a) else None,
}  # fmt: skip


def _binary(op: str, a: Any, b: Any) -> Any:
    if op in ("&", "|") and (a is (op == "|") or b is (op == "|")):
        return op == "|"
    if a is not None and b is not None:
        if op in ("&", "|") and isinstance(a, bool):
            return op == "&"
        if op == "/":
            return a / b if b != 0 else None
        return ir.FOLD[op](a, b) if op in ir.FOLD and not (op in ("//", "%") and b == 0) else None
    if op in ("*", "/") and a == 0:
        return a
    if op == "*" and b == 0:
        return b
    known = b if a is None else a
    if op in ("+", "-") and known is not None and math.isinf(known):
        return -known if op == "-" and a is None else known
    return known if (op, known) in (("min", -math.inf), ("max", math.inf)) else None
