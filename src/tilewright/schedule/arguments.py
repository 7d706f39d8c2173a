"""Rules for the arguments of the verbs, checked once: at the methods of `Schedule`.

    @takes(loop=A_NAME, factor=integer(0, NEAR))
    def unroll(self, loop, factor=0): ...

    s.unroll("b", "x")   [S102] unroll('b', 'x'): factor is 'x', not a whole number from 0 to 32768

The functions behind the methods do not check their arguments again.
"""

import inspect
import operator
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from tilewright.errors import ScheduleError
from tilewright.ir.atoms import Atom

P = ParamSpec("P")
R = TypeVar("R")

INT64_MAX = 2**63 - 1
FAR = 1 << 30  # twice as much overflows the int32 that loops count in
NEAR = 1 << 15  # iterations at a time, or ahead: g++ writes out no more than 65534


@dataclass(frozen=True, slots=True)
class Rule:
    """The values that an argument may have: in words, and as a function that converts one for the
    verb and raises TypeError or ValueError for any other."""

    words: str
    take: Callable[[Any], Any]


def integer(least: int, most: int) -> Rule:
    """An integer of Python, NumPy or any framework; no bool."""

    def take(value: Any) -> int:
        number = operator.index(value)
        if "bool" in str(getattr(value, "dtype", type(value).__name__)):
            raise TypeError
        if not least <= number <= most:
            raise ValueError
        return number

    return Rule(f"a whole number from {least} to {most}", take)


def one_of(*words: str) -> Rule:
    def take(value: Any) -> str:
        word = _name(value)
        if word not in words:
            raise ValueError
        return word

    return Rule(f"one of {', '.join(words)}", take)


def several(rule: Rule, words: str, least: int = 0) -> Rule:
    """The values of `*args`, at least `least` of them, each as `rule` says."""

    def take(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(values) < least:
            raise ValueError
        return tuple(rule.take(v) for v in values)

    return Rule(words, take)


def optional(rule: Rule) -> Rule:
    """None, or a value as `rule` says."""
    return Rule(f"{rule.words}, or None", lambda v: None if v is None else rule.take(v))


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _pair(value: Any) -> tuple[str, str]:
    if not isinstance(value, (tuple, list)):  # a string of two letters is no pair
        raise TypeError
    first, second = value
    return _name(first), _name(second)


A_NAME = Rule("a name", _name)
AN_ATOM = Rule("a tw.Atom", lambda value: {Atom: value}[type(value)])
NAMES = several(A_NAME, "one or more names", 1)
TWO_NAMES = Rule("two names", _pair)


def takes(**rules: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A method whose arguments are as `rules` say, one rule for each. A call of it on a schedule
    with any others raises ScheduleError[S102], which its docstring then says."""
    known = "; ".join(f"{name}: {rule.words}" for name, rule in rules.items())

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        verb, signature = method.__name__, inspect.signature(method)
        assert ["self", *rules] == list(signature.parameters), verb

        def refused(args: Any, options: Any, why: str, where: str = "") -> ScheduleError:
            shown = [reprlib.repr(a) for a in args[1:]]
            shown += [f"{name}={reprlib.repr(a)}" for name, a in options.items()]
            message = f"{verb}({', '.join(shown)}): {why}"
            return ScheduleError("S102", message, where=where, hint=f"{verb}({known})")

        @wraps(method)
        def checked(*args: P.args, **options: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **options)
            except TypeError as e:
                raise refused(args, options, str(e)) from None
            bound.apply_defaults()
            for name, rule in rules.items():
                value = bound.arguments[name]
                try:
                    bound.arguments[name] = rule.take(value)
                except Exception:  # each library refuses in its own way
                    why = f"{name} is {reprlib.repr(value)}, not {rule.words}"
                    raise refused(args, options, why, name) from None
            return method(*bound.args, **bound.kwargs)

        checked.__doc__ = f"{inspect.getdoc(method)}\n\nRaises ScheduleError[S101, S102]."
        return checked

    return decorate
