"""The digest of a frozen value: equal values of the package, and only those, have the same one.

Digests do not depend on the process, so that they serve as keys of a cache on disk.
"""

import hashlib
from dataclasses import fields
from functools import cache
from typing import Any

PLAIN = (str, int, bool, float, type(None))  # `repr` tells all their values apart, and types too


def digest(value: Any) -> str | None:
    """A sha256 over types and fields of a program, a format, a schedule's steps or plain data.

    None where the value holds anything else, a class of a user's included: what its methods do is
    not part of its fields."""
    try:
        return hashlib.sha256(_text(value, {}).encode()).hexdigest()
    except TypeError:
        return None


def _text(x: Any, known: dict[int, str]) -> str:
    """A value as text; a frozen dataclass as its digest, computed once for each object."""
    kind = type(x)
    if kind in PLAIN:
        return repr(x)
    if isinstance(x, tuple):
        return f"{kind.__qualname__}({','.join([_text(item, known) for item in x])})"
    text_digest = known.get(id(x))
    if text_digest is None:
        parts = [_text(getattr(x, name), known) for name in _fields(kind)]
        text = f"{kind.__module__}.{kind.__qualname__}({','.join(parts)})"
        text_digest = known[id(x)] = hashlib.sha256(text.encode()).hexdigest()
    return text_digest


@cache
def _fields(kind: type) -> tuple[str, ...]:
    """The fields of a frozen dataclass of the package. Raises TypeError for other classes."""
    params = getattr(kind, "__dataclass_params__", None)
    if params is None or not params.frozen or not kind.__module__.startswith("tilewright."):
        raise TypeError(kind)
    return tuple(f.name for f in fields(kind))
