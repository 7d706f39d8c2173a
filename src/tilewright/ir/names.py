"""Names that the compiler gives: what a call brings, beside the arrays that a user named.

A size belongs to a dimension, a stride to a dense array, counts and coordinate arrays to a
structure, values to a sparse tensor, an accumulator to an output. The name of each is
`owner.kind` with a number; names of users have no dots, so that none can be met by accident.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

SIZE, STRIDE, COUNT = "size", "stride", "count"  # numbers
INDPTR, INDICES, VALUES = "indptr", "indices", "values"  # arrays of one part
ACCUMULATOR, TOTAL = "acc", "total"  # registers
COPIES = "copies"  # an array: of an output, one for each group of units
PRIME = "'"  # j': the index of a reduction inside the scope of another j
KINDS = (SIZE, STRIDE, COUNT, INDPTR, INDICES, VALUES, ACCUMULATOR, TOTAL, COPIES)


_USERS = re.compile(r"(?!.*__)[A-Za-z][A-Za-z0-9_]*")


def is_users(name: str) -> bool:
    """Whether a user may give this name. In C the dot of ours becomes two underscores."""
    return _USERS.fullmatch(name) is not None


class Given(NamedTuple):
    """A given name, taken apart: `Given("A", "count", 1)` is `A.count1`. `number` is a dimension
    (strides), a level (counts, coordinate arrays), or -1 where there is one of its kind."""

    owner: str
    kind: str
    number: int = -1

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.kind}{self.number if self.number >= 0 else ''}"


@cache
def given(name: str) -> Given | None:
    """The parts of a given name; None for a name of a user, or of a loop."""
    owner, dot, rest = name.rpartition(".")
    kind = rest.rstrip("0123456789")
    if not dot or kind not in KINDS:
        return None
    return Given(owner, kind, int(rest[len(kind) :] or -1))


def is_given(name: str, *kinds: str) -> bool:
    """Whether a name is a given one, of one of these kinds."""
    found = given(name)
    return found is not None and found.kind in kinds


def size_name(dim: str) -> str:
    """The variable that holds the size of a dimension."""
    return Given(dim, SIZE).name


def stride_name(array: str, dim: int) -> str:
    """The variable that holds a stride of a dense array, in elements."""
    return Given(array, STRIDE, dim).name


def count_name(structure: str, level: int) -> str:
    """The variable that holds how many positions a level of a sparse structure has."""
    return Given(structure, COUNT, level).name


def values_name(tensor: str) -> str:
    """The buffer of the values of a sparse tensor."""
    return Given(tensor, VALUES).name
