"""Every error a user can meet: coded, located, hinted.

An error says *what rule was broken by which value* (the message), *where* (the argument, or the
line of the traced program) and *how to mend it* (the hint). The code is stable and listed
in `CATALOG`.

    FormatError[F104]: indices of A: column 9 is outside 0..7
      --> argument A
      hint: the matrix has 8 columns; check that rows and columns are not swapped

Public functions check their arguments once and raise from here; inside, assertions.
"""

from __future__ import annotations

CATALOG: dict[str, str] = {
    # F: formats and packing
    "F101": "a format is not well formed",
    "F102": "the matrix handed to pack is not one",
    "F103": "indptr is wrong",
    "F104": "a coordinate is out of range",
    "F105": "a coordinate is stored twice",
    "F106": "the parts of a decomposition do not cover each entry exactly once",
    "F107": "repacked values do not fit the structure",
    "F108": "the format cannot hold this matrix",
    # P: programs (tracing and verification)
    "P101": "a program is not well formed",
    "P102": "an index is used over two different dimensions",
    "P103": "a tensor is accessed with the wrong number of coordinates",
    "P104": "an index is not bound by the output or by a reduction",
    "P106": "data types do not go together",
    "P107": "the decomposition does not apply to this program",
    # S: schedules
    "S101": "no such loop",
    "S102": "the schedule verb is not legal here",
    "S103": "the schedule does not fit the target",
    # A: arguments of a call
    "A101": "wrong number of arguments or an unknown name",
    "A102": "wrong dtype",
    "A103": "wrong shape",
    "A104": "wrong stride",
    "A105": "wrong device",
    "A106": "the packed tensor has another format than the kernel was built for",
    "A107": "not an array",
    "A108": "the output overlaps an input",
    "A109": "contents out of range",
    "A110": "not possible while a CUDA graph is captured",
    # B: building and running
    "B101": "the compiler refused generated code",
    "B102": "a compiler or a driver is missing",
    "B103": "unknown target",
    "B104": "a launch failed",
    "B105": "the kernel cache cannot be used",
    # K: knobs
    "K101": "an environment knob has a bad value",
    # E: extras
    "E101": "an optional dependency is missing",
    # M: models and serving
    "M101": "the model file is damaged or not a GGUF file",
    "M102": "unknown architecture",
    "M103": "a tensor is missing or has the wrong shape",
    "M104": "unsupported weight type",
    "M105": "the prompt does not fit the context",
    "M106": "a request is not well formed",
    "M107": "the tokenizer or the chat template cannot be used",
    # I: internal
    "I101": "Tilewright broke one of its own rules",
    "I102": "generated code has a race or a barrier that some threads do not reach",
}


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
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self):
        return (_rebuild, (type(self), self.code, self.message, self.where, self.hint))


def _rebuild(cls: type[TilewrightError], code: str, message: str, where: str, hint: str):
    return cls(code, message, where=where, hint=hint)


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


class ModelError(TilewrightError, ValueError):
    """A model file or a request to a model (M codes)."""


class InternalError(TilewrightError, AssertionError):
    """A bug of Tilewright itself (I codes); please report it."""
