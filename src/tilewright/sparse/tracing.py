"""The program being traced: its tensors, statements and indices, and where the user wrote them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tilewright.errors import ProgramError
from tilewright.ir.names import is_users
from tilewright.ir.nodes import Assign, Index, Tensor


@dataclass(slots=True)
class Trace:
    """What the function that is being traced has declared and computed so far."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    body: list[Assign] = field(default_factory=list)
    indices: list[Index] = field(default_factory=list)


_active: list[Trace] = []
_LIBRARIES = "tilewright.", "numpy.", "torch."


@contextmanager
def tracing(name: str) -> Iterator[Trace]:
    """Starts the trace of the function `name`; `current` returns it until the block ends."""
    _active.append(Trace(name))
    try:
        yield _active[-1]
    finally:
        _active.pop()


def current() -> Trace:
    """The innermost active trace. Raises ProgramError[P101] outside of one."""
    if not _active:
        raise refusal("P101", "this only has a meaning inside a function under @program")
    return _active[-1]


def refusal(code: str, message: str, hint: str = "", frame: Any = None) -> ProgramError:
    """A ProgramError at the line of the user's code that called this package, or led to `frame`."""
    frame = frame or sys._getframe(1)
    while frame and frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
        frame = frame.f_back
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
    return ProgramError(code, message, where=where, hint=hint)


def checked_name(name: str, role: str, code: str = "P101") -> str:
    """`name`, which a user chose for `role`. Raises ProgramError where generated code cannot use it
    or a generated name could equal it."""
    if not is_users(name):
        hint = "letters, digits and single underscores, a letter first"
        raise refusal(code, f"{name!r} is no name for {role}", hint=hint)
    return name
