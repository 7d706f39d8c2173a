"""Every error that a user can see: coded, located, hinted.

An error says *what rule was broken by which value* (the message), *where* (the argument, or the
line of the traced program) and *how to mend it* (the hint). The code is stable and listed
in `errors.txt`.

    FormatError[F104]: indices of A: column 9 is outside 0..7
      --> argument A
      hint: the matrix has 8 columns; check that rows and columns are not swapped

Public functions check their arguments once and raise from here; inside, assertions.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import dedent

TEXT = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
CATALOG: dict[str, str] = dict(re.findall(r"^([A-Z]\d\d\d) (.+)$", TEXT, re.MULTILINE))
"""What each code means."""
ADVICE: dict[str, str] = {
    code: dedent(lines).rstrip()
    for code, lines in re.findall(r"^([A-Z]\d\d\d) .+\n((?: .+\n)+)", TEXT, re.MULTILINE)
}
"""What the text says of most codes: the hint of errors without one of their own."""


class TilewrightError(Exception):
    """Base of all errors. `code` is a key of `CATALOG`; `where` and `hint` may be empty."""

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "") -> None:
        assert code in CATALOG, f"error code {code} is not in the catalog"
        self.code, self.message, self.where, self.hint = code, message, where, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.message}"]
        if self.where:
            lines.append(f"  --> {self.where}")
        if hint := self.hint or " ".join(ADVICE.get(self.code, "").split()):
            lines.append(f"  hint: {hint}")
        return "\n".join(lines)

    def __reduce__(self):
        keywords = {"where": self.where, "hint": self.hint}
        return partial(type(self), **keywords), (self.code, self.message)


class FormatError(TilewrightError, ValueError):
    """A format or the data packed into it (F codes)."""


class ProgramError(TilewrightError, ValueError):
    """A traced program (P codes)."""


class ScheduleError(TilewrightError, ValueError):
    """A schedule verb that was refused (S codes). The program is unchanged."""


def illegal(why: str, hint: str = "", where: str = "") -> ScheduleError:
    """The error for a schedule that is not legal: S102."""
    return ScheduleError("S102", why, where=where, hint=hint)


class ArgumentError(TilewrightError, ValueError):
    """An argument of a call (A codes). Nothing was written."""


class BuildError(TilewrightError, RuntimeError):
    """Compiling, loading or launching (B codes)."""


class KnobError(TilewrightError, ValueError):
    """An environment variable of Tilewright (K codes)."""


class MissingExtra(TilewrightError, ImportError):
    """A part of Tilewright needs an extra that is not installed (E codes)."""


@contextmanager
def needed_for(use: str, extra: str) -> Iterator[None]:
    """Imports of optional packages: one that fails in the block raises MissingExtra[E101], which
    names the package, what it is needed for, and the extra that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        rule = f"{error.name} is needed for {use}"
        raise MissingExtra("E101", rule, hint=f"pip install 'tilewright[{extra}]'") from None


class ModelError(TilewrightError, ValueError):
    """A model file or a request to a model (M codes)."""


class InternalError(TilewrightError, AssertionError):
    """A bug of Tilewright itself (I codes); please report it."""
