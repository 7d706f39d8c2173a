"""Walking and rebuilding trees of nodes; substitution; simplification of index arithmetic."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

from tilewright import dtypes
from tilewright.ir import nodes as ir
from tilewright.ir.ranges import interval

N = TypeVar("N")


def rebuild(n: N, f: Callable[[Any], Any]) -> N:
    """`n` with `f` applied to each direct child; `n` itself when none changed."""
    changed: dict[str, Any] | None = None
    for name, many in ir.child_fields(type(n)):
        old = getattr(n, name)
        if many:
            new = tuple([f(o) for o in old])
            if all(map(operator.is_, new, old)):
                continue
        else:
            new = f(old)
            if new is old:
                continue
        if changed is None:
            changed = {}
        changed[name] = new
    if changed is None:
        return n
    if isinstance(n, ir.Seq):
        return ir.seq(*changed["body"])  # type: ignore[return-value]
    names = type(n).__match_args__  # type: ignore[attr-defined] - all fields of a node, in order
    return type(n)(*[changed[x] if x in changed else getattr(n, x) for x in names])


def rebuild_body(s: N, f: Callable[[Any], Any]) -> N:
    """A statement with `f` applied to those directly inside of it."""
    return rebuild(s, lambda x: f(x) if isinstance(x, ir.Stmt) else x)


def transform(n: N, f: Callable[[Any], Any]) -> N:
    """Bottom-up: children first, then `f` on the rebuilt node; `f` returns what it keeps."""

    def visit(x: Any) -> Any:
        return f(rebuild(x, visit) if ir.child_fields(type(x)) else x)

    return visit(n)


def walk(n: Any, *kinds: type) -> Iterator[Any]:
    """Every node below and including `n`, parents first; only those of `kinds` if there are any."""
    stack = [n]
    while stack:
        top = stack.pop()
        if not kinds or isinstance(top, kinds):
            yield top
        for name, many in reversed(ir.child_fields(type(top))):
            if many:
                stack.extend(reversed(getattr(top, name)))
            else:
                stack.append(getattr(top, name))


def driving(body: Any, axes: frozenset[str]) -> dict[tuple[str, tuple[str, ...]], ir.Access]:
    """The sparse operands of a reduction over `axes`, those of inner reductions left out, which are
    read at distinct plain indices of which one is reduced: by structure and names of indices."""
    if isinstance(body, ir.Reduce):
        return {}
    found = {key: x for child in ir.children(body) for key, x in driving(child, axes).items()}
    if isinstance(body, ir.Access) and body.tensor.is_sparse:
        names = tuple(c.name for c in body.stored_coords if isinstance(c, ir.Index))
        if len(set(names)) == len(body.stored_coords) and axes & set(names):
            found[body.tensor.structure, names] = body
    return found


def contains(n: Any, *kinds: type) -> bool:
    """Whether a node below `n`, or `n` itself, is of one of these kinds."""
    return next(walk(n, *kinds), None) is not None


def reads_memory(n: Any) -> bool:
    """Whether an expression loads or searches."""
    return contains(n, ir.Load, ir.Search)


def lines(s: ir.Stmt) -> tuple[ir.Stmt, ...]:
    """The statements of a sequence; any other one alone."""
    return s.body if isinstance(s, ir.Seq) else (s,)


def statements(s: Any, *kinds: type) -> Iterator[Any]:
    """As `walk`, but expressions are left out: statements only, outermost first."""
    stack = [s]
    while stack:
        top = stack.pop()
        if not kinds or isinstance(top, kinds):
            yield top
        if isinstance(top, (ir.For, ir.If)):
            stack.append(top.body)
        elif isinstance(top, ir.Seq):
            stack.extend(reversed(top.body))


def path_to(s: ir.Stmt, goal: ir.Compute) -> list[Any] | None:
    """The loops, guards and lets around `goal`, from `s` inwards."""
    if s is goal:
        return []
    if isinstance(s, (ir.For, ir.If)):
        below = path_to(s.body, goal)
        return None if below is None else [s, *below]
    if isinstance(s, ir.Seq):
        lets: list[ir.Stmt] = []
        for b in s.body:
            if isinstance(b, ir.Let):
                lets.append(b)
                continue
            below = path_to(b, goal)
            if below is not None:
                return [*lets, *below]
    return None


def used_lets(s: Any) -> Any:
    """`s` without the lets whose names nothing reads."""
    if not isinstance(s, ir.Seq):
        return rebuild_body(s, used_lets)
    kept: list[ir.Stmt] = []
    for b in map(used_lets, reversed(s.body)):
        if not isinstance(b, ir.Let) or any(b.var.name in free_vars(x) for x in kept):
            kept.insert(0, b)
    return ir.seq(*kept)


def map_bodies(program: ir.Program, f: Callable[[ir.Stmt], ir.Stmt]) -> ir.Program:
    """The program with `f` applied to the body of each nest."""
    stages = (tuple(replace(n, body=f(n.body)) for n in stage) for stage in program.stages)
    return replace(program, stages=tuple(stages))


def is_ordered(nest: ir.Nest) -> bool:
    """Loop level: whether its units must run one after the other, with those of its stage."""
    stores = (s for s in statements(nest.body, ir.Store) if s.buffer.scope in ("global", "part"))
    return nest.shared and any(s.op and not s.atomic for s in stores)


def substitute(n: N, values: Mapping[str, ir.Expr]) -> N:
    """Variables replaced by name. Names bound inside `n` (For, Let, Reduce) are to be fresh."""
    if not values:
        return n

    def visit(x: Any) -> Any:
        if isinstance(x, ir.Var):
            return values.get(x.name, x)
        if isinstance(x, ir.Reduce) and any(a.name in values for a in x.axes):
            kept = {k: v for k, v in values.items() if k not in {a.name for a in x.axes}}
            return ir.Reduce(x.op, x.axes, substitute(x.body, kept), x.dtype)
        return rebuild(x, visit)

    return visit(n)


def free_vars(n: Any) -> set[str]:
    """Names of variables `n` reads and does not bind."""
    return set(_free(n))


def free_indices(e: Any) -> dict[str, ir.Index]:
    """The program indices that an expression reads and does not bind, as they first occur."""
    return {name: x for name, x in _free(e).items() if isinstance(x, ir.Index)}


def _free(n: Any) -> dict[str, ir.Var]:
    free: dict[str, ir.Var] = {}

    def visit(x: Any, bound: frozenset[str]) -> None:
        if isinstance(x, ir.Var):
            if x.name not in bound:
                free.setdefault(x.name, x)
        elif isinstance(x, ir.Reduce):
            visit(x.body, bound | {a.name for a in x.axes})
        elif isinstance(x, ir.For):
            for child in ir.children(x):
                if child is not x.var:
                    visit(child, bound | {x.var.name} if child is x.body else bound)
        elif isinstance(x, ir.Seq):
            for s in x.body:
                visit(s.value if isinstance(s, ir.Let) else s, bound)
                bound = bound | {s.var.name} if isinstance(s, ir.Let) else bound
        else:
            for child in ir.children(x):
                visit(child, bound)

    visit(n, frozenset())
    return free


def conjuncts(cond: ir.Expr) -> list[ir.Expr]:
    """The conditions that `cond` joins by `&`, in order; none where it always holds."""
    if isinstance(cond, ir.Binary) and cond.op == "&":
        return [*conjuncts(cond.a), *conjuncts(cond.b)]
    return [] if isinstance(cond, ir.Const) and cond.value else [cond]


def all_of(conditions: Iterable[ir.Expr]) -> ir.Expr:
    """Conditions joined by `&`, each once."""
    joined = [*dict.fromkeys(conditions)] or [ir.Const(True, dtypes.bool_)]
    return reduce(lambda a, b: ir.binary("&", a, b), joined)


def zero_unless(cond: ir.Expr | None, value: ir.Expr) -> ir.Expr:
    """`value` where `cond` holds, else 0; `value` where there is no condition."""
    if cond is None:
        return value
    return ir.Select(cond, value, ir.cast(ir.Const(0, dtypes.int32), value.dtype), value.dtype)


def is_const(e: ir.Expr, value: Any = None) -> bool:
    return isinstance(e, ir.Const) and (value is None or e.value == value)


def simplify(n: N) -> N:
    """Folds constants and the identities of integer arithmetic (floats are left alone).

    before: (0*n + i)*1 + 0        after: i
    """
    return transform(n, _simplify_node)


def _simplify_node(x: Any) -> Any:
    if isinstance(x, ir.Binary):
        return _simplify_binary(x)
    if isinstance(x, ir.Cast) and isinstance(x.a, ir.Const):
        return ir.cast(x.a, x.dtype.scalar) if x.dtype.lanes == 1 else x
    if isinstance(x, ir.Select) and isinstance(x.cond, ir.Const):
        return x.a if x.cond.value else x.b
    if isinstance(x, ir.If) and isinstance(x.cond, ir.Const):
        return x.body if x.cond.value else ir.Seq(())
    if isinstance(x, ir.For) and x.extent is not None and x.extent <= 0:
        # A reduction over nothing still gives its identity: the loop stays until it has its store.
        return x if contains(x.body, ir.Compute) else ir.Seq(())
    if isinstance(x, ir.Seq):
        return ir.seq(*x.body) if x.body else x
    return x


FOLD: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv,
    "%": operator.mod, "min": min, "max": max, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_NEUTRAL = {"+": 0, "-": 0, "*": 1, "//": 1}  # right operands; of + and * left ones too


def _simplify_binary(x: ir.Binary) -> ir.Expr:
    a, b, op = x.a, x.b, x.op
    if x.dtype.kind == "b":
        if op == "&" and isinstance(a, ir.Const):
            return b if a.value else a
        if op == "&" and isinstance(b, ir.Const):
            return a if b.value else b
    if a.dtype.is_float or b.dtype.is_float:
        return x
    by_zero = op in ("//", "%") and is_const(b, 0)
    if isinstance(a, ir.Const) and isinstance(b, ir.Const) and op in FOLD and not by_zero:
        folded = FOLD[op](a.value, b.value)
        return ir.Const(folded if op in ir.COMPARISON else x.dtype.wrapped(folded), x.dtype)
    if op in ("+", "*") and is_const(a, _NEUTRAL[op]):
        return b
    if op in _NEUTRAL and is_const(b, _NEUTRAL[op]):
        return a
    if op == "-" and isinstance(a, ir.Binary) and a.op == "+" and a.a == b:
        return a.b
    if op == "+":
        return _simplify_sum(x)
    if op in ("//", "%") and isinstance(b, ir.Const) and isinstance(a, ir.Binary) and a.op == "+":
        return _simplify_digit(x)
    if op in ("<<", ">>") and _number(b) == 0:
        return a
    if op == "&" and (mask := _number(b)) is not None and _keeps(mask, a):
        return a
    is_zero = (op == "*" and (is_const(a, 0) or is_const(b, 0))) or (op == "%" and is_const(b, 1))
    return ir.Const(0, x.dtype) if is_zero and x.dtype.lanes == 1 else x


def _simplify_digit(x: ir.Binary) -> ir.Expr:
    """(i * 32 + j) // 8 is i * 4 + j // 8, and where j is in 0:32 (i * 32 + j) // 64 is i // 2: of
    numbers of loops, which stay in their arrays. Elements of arrays may wrap around."""
    high, low, by = x.a.a, x.a.b, int(x.b.value)  # type: ignore[attr-defined]
    size = _number(high.b) if isinstance(high, ir.Binary) and high.op == "*" else None
    if not size or size < 0 or by <= 0 or contains(x, ir.Load, ir.Access):
        return x
    bounds = interval(low)
    if by % size == 0 and bounds.low >= 0 and bounds.high < size:
        digit = _simplify_binary(ir.binary(x.op, high.a, by // size))  # type: ignore[arg-type]
        return digit if x.op == "//" else add(mul(digit, size), low)
    if size % by:
        return x
    low = _simplify_binary(ir.binary(x.op, low, by))  # type: ignore[arg-type]
    return low if x.op == "%" else add(mul(high.a, size // by), low)


def _number(e: ir.Expr) -> int | None:
    """The value of an integer constant, also of one in every lane."""
    e = e.a if isinstance(e, ir.Broadcast) else e
    return int(e.value) if isinstance(e, ir.Const) and e.dtype.is_int else None


def _keeps(mask: int, e: ir.Expr) -> bool:
    """Whether `e & mask` is `e`."""
    low, high = interval(e)
    return mask == -1 or (low >= 0 and not ~mask & ((1 << high.bit_length()) - 1))


def _simplify_sum(x: ir.Binary) -> ir.Expr:
    """(i + 1) + 2"""
    match x:
        case ir.Binary(_, ir.Binary("+", a, ir.Const(p)), ir.Const(q, kind)):
            both = ir.Const(kind.wrapped(int(p + q)), kind)
            return _simplify_binary(ir.Binary("+", a, both, x.dtype))
    return x


def add(*terms: Any) -> ir.Expr:
    """The simplified sum of integer terms."""
    total: ir.Expr = ir.as_expr(terms[0])
    for t in terms[1:]:
        total = _simplify_binary(ir.binary("+", total, t))  # type: ignore[arg-type]
    return total


def mul(a: Any, b: Any) -> ir.Expr:
    """The simplified product of integers."""
    out = ir.binary("*", a, b)
    return _simplify_binary(out) if isinstance(out, ir.Binary) else out


def ceil_div(a: Any, b: int) -> ir.Expr:
    return ir.as_expr(a) if b == 1 else simplify(ir.binary("//", add(a, b - 1), b))


def indices_of(*nodes: Any) -> list[ir.Index]:
    """The program indices below some nodes, once each, in order of occurrence."""
    return list({x.name: x for n in nodes for x in walk(n, ir.Index)}.values())
