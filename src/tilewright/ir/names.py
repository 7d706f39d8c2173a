"""Names that the compiler generates for what a call passes beside the arrays that a user named.

A size belongs to a dimension, a stride to a dense array, counts and coordinate arrays to a
structure, values to a sparse tensor, an accumulator to an output. The name of each is
`owner.kind` with a number; names of users have no dots, so the two cannot be equal.
"""

import re
from functools import cache, partial
from typing import NamedTuple

SIZE, STRIDE, COUNT = "size", "stride", "count"  # numbers
VALUES = "values"  # an array of one part; the others have the names that their levels give them
ACCUMULATOR, TOTAL = "acc", "total"  # registers
ADDRESS = "address"  # a register: where in an array a loop copies from
COPIES = "copies"  # an array: of an output, one for each group of units
PRIME = "'"  # j': the index of a reduction inside the scope of another j


_USERS = re.compile(r"(?!.*__)[A-Za-z][A-Za-z0-9_]*")


def is_users(name: str) -> bool:
    """Whether `name` is allowed as a user's name. Generated names contain a dot, which becomes two
    underscores in C, so that the two kinds never collide."""
    return isinstance(name, str) and _USERS.fullmatch(name) is not None


class GeneratedName(NamedTuple):
    """The parts of a generated name: `GeneratedName("A", "count", 1)` is `A.count1`. `number` is a
    dimension (strides), a level (counts, coordinate arrays), or -1 where there is one of its
    kind."""

    owner: str
    kind: str
    number: int = -1

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.kind}{self.number if self.number >= 0 else ''}"


@cache
def parse_name(name: str) -> GeneratedName | None:
    """The parts of a generated name; None for a name of a user, or of a loop."""
    owner, dot, rest = name.rpartition(".")
    kind = rest.rstrip("0123456789")
    return GeneratedName(owner, kind, int(rest[len(kind) :] or -1)) if dot else None


def is_generated(name: str, *kinds: str) -> bool:
    """Whether a name is generated and of one of these kinds."""
    parts = parse_name(name)
    return parts is not None and parts.kind in kinds


def _generated(kind: str, owner: str, number: int = -1) -> str:
    return GeneratedName(owner, kind, number).name


# The names of a dimension's size, of an array's stride in a dimension (in elements), of how many
# positions a structure has in a level, and of the values of a sparse tensor.
size_name, stride_name, count_name, values_name = (
    partial(_generated, kind) for kind in (SIZE, STRIDE, COUNT, VALUES)
)
