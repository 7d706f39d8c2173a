"""Variants of attention: which keys a query sees, and how their scores are changed.

    @variant
    class Softcap:
        soft_cap = scalar("float32", 30.0)
        def logits(self, s, at): return self.soft_cap * tanh(s / self.soft_cap)
        def mask(self, at):      return at.kv <= at.qo

A class is traced when it is defined. A call of it gives a frozen value, a `Variant`, which may fix
scalars and compose:

    Causal() & SlidingWindow(1024) | Softcap(soft_cap=50.0)

The hooks `sink`, `query`, `key` and `output`, and `softmax = False`, are described in
docs/attention/variant.md: a logit of the denominator, changed rows, and no softmax.

`a & b` sees the keys that both see; scores and rows pass through the hooks of a, then those of b.
`a | b` sees what a sees: of b it takes every hook but the mask. `&` binds tighter than `|`, so
`a & b | c` is `(a & b) | c`; `a | (b & c)` is refused, because the masks of b and c would be lost.
"""

import reprlib
from dataclasses import dataclass, field
from typing import Any

from tilewright.attention.checks import is_integer, is_number
from tilewright.attention.tracing import NO_SINK, SCORE, Traced, Value, chained, per_head, trace
from tilewright.errors import ArgumentError, ProgramError
from tilewright.ir.nodes import Load
from tilewright.ir.rewrite import all_of, conjuncts, substitute, walk
from tilewright.sparse.trace import scalar, tanh

_MAX_FLOAT32 = 2**128 - 2**104


@dataclass(frozen=True, repr=False)
class Variant:
    """The value of a variant: its expressions, the scalars that it fixes, and its text. `by`: the
    operator that has composed it of two others, "&" or "|"."""

    traced: Traced
    fixed: tuple[tuple[str, float], ...]
    text: str = field(compare=False)
    by: str = field(default="", compare=False)

    def __hash__(self) -> int:
        return hash((self.traced.name, self.fixed))  # that of all expressions takes longer

    def __and__(self, other: Any) -> "Variant":
        return _combined(self, other, "&")

    def __or__(self, other: Any) -> "Variant":
        return _combined(self, other, "|")

    def __rand__(self, other: Any) -> "Variant":  # of something else: it is refused
        return _combined(other, self, "&")

    def __ror__(self, other: Any) -> "Variant":
        return _combined(other, self, "|")

    def __repr__(self) -> str:
        return self.text


def variant(cls: type) -> Any:
    """Class decorator: traces `logits(self, s, at)`, `mask(self, at)`, `sink(self, at)`,
    `query(self, q, at)`, `key(self, k, at)` and `output(self, o, at)`, each of which may be absent.

    Class attributes `scalar(dtype, default)`, `per_head(dtype)`, `per_request`, `per_token`,
    `per_key`, `per_channel` and `bit_mask()` are read from memory at run time (float32 or int32).
    `softmax = False` is none. A call of the class gives a `Variant`, which may fix scalars, by name
    or in the order of definition: `SlidingWindow(window=512)`, `SlidingWindow(512)`. Raises
    ProgramError (P codes).
    """
    if not isinstance(cls, type):
        raise ProgramError("P101", f"{cls!r} is no class", hint="@tw.variant above a class")
    traced = trace(cls)
    scalars = {v.name: v for v in traced.values if not v.by}

    def __new__(_: type, *positional: float, **values: float) -> Variant:
        first = dict(zip(scalars, positional, strict=False))  # in the order of definition
        hint = f"scalars: {', '.join(scalars) or 'none'}, each once; tensors go to run()"
        if len(first) < len(positional) or first.keys() & values.keys():
            text = f"{cls.__name__} has {len(scalars)} scalars, and got one too many"
            raise ArgumentError("A101", text, where=cls.__name__, hint=hint)
        values |= first
        for name, value in values.items():
            if name not in scalars:
                text = f"{cls.__name__} has no scalar {name!r}"
                raise ArgumentError("A101", text, where=name, hint=hint)
            check_number(scalars[name], value)
        known = {n: v.default for n, v in scalars.items() if v.default is not None} | values
        fixed = tuple(sorted(known.items()))
        return Variant(traced, fixed, f"{cls.__name__}({', '.join(f'{n}={v}' for n, v in fixed)})")

    cls.__new__, cls.traced = __new__, traced  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def check_number(value: Value, number: Any) -> None:
    """A Python or NumPy number fits a scalar. Raises ArgumentError[A102, A109]."""
    if not (is_integer if value.dtype.is_int else is_number)(number):
        text = f"{value.name}={number!r} is not a number of {value.dtype}"
        raise ArgumentError("A102", text, where=value.name)
    least, most = (-(2**31), 2**31 - 1) if value.dtype.is_int else (-_MAX_FLOAT32, _MAX_FLOAT32)
    if not (least <= number <= most or number != number or abs(number) == float("inf")):
        text = f"{value.name} = {reprlib.repr(number)} does not fit {value.dtype}"
        raise ArgumentError("A109", text, where=value.name)


def traced_of(variant: Any) -> Traced:
    """The expressions of a variant. Raises ArgumentError[A107]."""
    if not isinstance(variant, Variant):
        hint = "decorate the class with @tw.variant, and call it: MyVariant()"
        raise ArgumentError("A107", f"{variant!r} is not a variant", where="variant", hint=hint)
    return variant.traced


# ---------------------------------------------------------------------------- composition


def _combined(a: Any, b: Any, by: str) -> Variant:
    """`a & b` or `a | b`. Raises ArgumentError[A107], ProgramError[P101]."""
    left, right = traced_of(a), traced_of(b)
    mask = left.mask
    if by == "&":
        mask = all_of([*conjuncts(left.mask), *conjuncts(right.mask)])
    elif b.by == "&":
        text = f"{b} on the right of | would lose its masks"
        raise ProgramError("P101", text, hint="(a | b) & c: masks by &")
    elif right.logits == SCORE and right.sink == NO_SINK and not right.extras():
        hint = "a | b adds b's hooks; a & b counts scores that both masks count"
        raise ProgramError("P101", f"{b} has no hooks but a mask to add to {a}", hint=hint)
    if NO_SINK not in (left.sink, right.sink):
        raise ProgramError("P101", f"{a} and {b} both have a sink")
    hooks = {"logits": substitute(right.logits, {"s": left.logits}), "mask": mask}
    hooks |= {"sink": right.sink if left.sink == NO_SINK else left.sink} | chained(left, right)
    softmax = left.softmax if right.softmax is None else right.softmax
    if left.softmax not in (None, softmax) or (softmax is False and hooks["sink"] != NO_SINK):
        text = f"of {a} and {b} one has no softmax, and the other needs it"
        raise ProgramError("P101", text, hint="softmax = False in both, and no sink")
    read = {x.buffer.name for hook in hooks.values() for x in walk(hook, Load)}
    values = {v.name: v for v in left.values}
    fixed = dict(a.fixed)
    for v in right.values:
        number = dict(b.fixed).get(v.name)
        if v.name not in values and v.name in read:
            values[v.name] = v
            fixed |= {v.name: number} if number is not None else {}
        elif v.name in read and (values[v.name] != v or fixed.get(v.name) != number):
            text = f"{a} and {b} have different values named {v.name}"
            hint = "they share a value that both declare and fix alike; rename one in a class"
            raise ProgramError("P101", text, where=v.name, hint=hint)
    outer = {"&": "|", "|": ""}[by], "&|"  # operators that need parentheses: left, right
    name, text = (
        f" {by} ".join(
            f"({s})" if x.by in set(needs) else s
            for x, s, needs in zip((a, b), parts, outer, strict=True)
        )
        for parts in ((left.name, right.name), (str(a), str(b)))
    )
    traced = Traced(name, values=tuple(values.values()), softmax=softmax, **hooks)
    return Variant(traced, tuple(sorted(fixed.items())), text, by)


# ---------------------------------------------------------------------------- presets


@variant
class Full:
    """Every query sees every key."""


@variant
class Causal:
    """A query sees the keys up to its own position; one before position 0 (more queries than keys)
    sees none: o = 0, lse = −inf."""

    def mask(self, at: Any) -> Any:
        """Whether a key's position is at most its query's (bool)."""
        return at.kv <= at.qo


@variant
class SlidingWindow(Causal):
    """Causal, and only the last `window` positions, the query's own included."""

    window = scalar("int32")

    def mask(self, at: Any) -> Any:
        """Whether a key is one of the last `window` positions up to its query (bool)."""
        return super().mask(at) & (at.qo - at.kv < self.window)


@variant
class Softcap(Causal):
    """Causal, with scores bent into (−soft_cap, soft_cap) by a tanh."""

    soft_cap = scalar("float32", 30.0)

    def logits(self, s: Any, at: Any) -> Any:
        """The scaled score `s`, within ±`soft_cap` (float32)."""
        return self.soft_cap * tanh(s / self.soft_cap)


@variant
class Alibi(Causal):
    """Causal, with a bias that falls with the distance, by a slope for each query head."""

    slopes = per_head("float32")

    def logits(self, s: Any, at: Any) -> Any:
        """The scaled score `s` less the slope times the distance in positions (float32)."""
        return s + self.slopes[at.qo_head] * (at.kv - at.qo)
