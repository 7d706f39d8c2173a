"""What a level is: its declared properties, what loops ask it, and how its arrays are built."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from tilewright import dtypes
from tilewright.errors import FormatError
from tilewright.ir.nodes import Buffer, Const, Expr, binary, select
from tilewright.ir.rewrite import add, is_const, mul

Arrays = dict[str, np.ndarray]
Types = Mapping[str, dtypes.DType | None]
Built = tuple[Arrays, np.ndarray, int]
INT32_MAX = 2**31 - 1  # the IR counts blocks, widths and chunks in int32


def integer(of: str, name: str, value: Any, least: int = 0, most: int = INT32_MAX) -> int:
    """The argument `name` of the format or level `of` as an integer. Raises FormatError[F101]."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        rule = f"{of}: {name} {value!r} is not an integer from {least} to {most}"
        raise FormatError("F101", rule, where=name)
    return number


@dataclass(frozen=True, slots=True)
class Storage:
    """The IR side of one level of one tensor; `s["indices"]` is the buffer of that array.

    `size` is the extent of the coordinate; `count` the number of positions (known on the host);
    `above(dim)` the coordinate of the nearest level above that stores dimension `dim`."""

    size: Expr
    count: Expr
    arrays: Mapping[str, Buffer]
    above: Callable[[int], Expr]

    def __getitem__(self, name: str) -> Buffer:
        return self.arrays[name]


@dataclass(frozen=True, slots=True)
class Parents:
    """What a level is packed below: how many positions there are above it, the extent of its
    coordinate, and of each entry the coordinates of the levels above, by dimension, and whether it
    is the first of its block (all entries where a format has no blocks)."""

    count: int
    extent: int
    above: Mapping[int, np.ndarray]
    units: np.ndarray


@dataclass(frozen=True, slots=True)
class Level:
    """`dim` is the dimension of the tensor it stores: all of it, or, with `block` b, the quotient
    by b (`inner` False) or the remainder (`inner` True). Raises FormatError[F101]."""

    dim: int
    block: int = 0
    inner: bool = False

    arrays: ClassVar[Types] = {}  # their types; None: that of coordinates
    keys: ClassVar[str] = ""  # the array that has the coordinate of each position, if there is one
    is_dense: ClassVar[bool] = False  # position q * size + c: it can be walked before its parents
    full: ClassVar[bool] = False  # every coordinate of its dimension is visited below a parent
    exact: ClassVar[bool] = True  # no explicit zeros are stored beside the entries
    ordered: ClassVar[bool] = True  # coordinates below a parent do not fall
    unique: ClassVar[bool] = True  # one position per coordinate below a parent
    padded: ClassVar[bool] = False  # a loop also visits what `guard` rules out
    shared: ClassVar[bool] = False  # parents may have positions in common: outputs are refused
    single: ClassVar[bool] = False  # one coordinate for each parent, at its position: no loop
    outermost: ClassVar[bool] = False  # it can be the first level of a format
    least: ClassVar[dict[str, int]] = {}  # of its integers, where it is not 0

    def __post_init__(self) -> None:
        of = type(self).__name__.lower()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, "int"):
                least = self.least.get(f.name, 0)
                object.__setattr__(self, f.name, integer(of, f.name, value, least))
            elif f.type in (bool, "bool") and not isinstance(value, bool):
                rule = f"{of}: {f.name} is {value!r}"
                raise FormatError("F101", rule, where=f.name, hint="True or False")
        if self.inner and not self.block:
            rule = f"{of}: inner True with block {self.block}"
            raise FormatError("F101", rule, where="inner", hint="the remainder is that by a block")

    def misfit(self, above: Sequence["Level"]) -> str:
        """Why the level does not fit below these levels of a format; "" if it does."""
        return ""

    def extent_of(self, shape: tuple[int, ...]) -> int:
        """How many values the coordinate of this level can take, for a tensor of `shape`."""
        if self.inner:
            return self.block
        n = shape[self.dim]
        return -(-n // self.block) if self.block else n

    def coordinate_of(self, coords: np.ndarray) -> np.ndarray:
        """The coordinate of this level from the coordinates of its dimension."""
        if not self.block:
            return coords
        return coords % self.block if self.inner else coords // self.block

    # IR
    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        """Begin and end of the loop over v below parent position q: all coordinates."""
        return Const(0, dtypes.int32), s.size

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        """The coordinate at v: that of its position in `keys`, else v itself."""
        return s[self.keys][self.pos(s, q, v)] if self.keys else v

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(mul(q, s.size), v)

    def guard(self, s: Storage, q: Expr, v: Expr, c: Expr) -> Expr:
        """Of a padded level: whether something is stored at v, whose coordinate is c."""
        return binary(">=", c, 0)

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        """The position of coordinate c below q, or -1: where loops are over coordinates."""
        begin, end = self.loop(s, q)
        inside = binary("<", c, end)
        if not is_const(begin, 0):
            inside = binary("&", binary(">=", c, begin), inside)
        return select(inside, self.pos(s, q, c), -1)

    def elements(self, array: str, count: Expr) -> Expr:
        """The extent of an array as programs print it, of a level with `count` positions."""
        return add(count, 1) if array == "indptr" else count

    # data
    def positions(self, parents: int, extent: int) -> int:
        """The number of positions as far as it is known before packing."""
        return parents

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        """Packs one level. `q` and `c`, sorted, are the parent position and the coordinate of each
        entry. Returns the level's arrays, the position of each entry, the number of positions."""
        raise NotImplementedError

    def __str__(self) -> str:
        part = f"{'%' if self.inner else '/'}{self.block}" if self.block else ""
        return f"{type(self).__name__.lower()}(d{self.dim}{part}{self._extra()})"

    __repr__ = __str__

    def _extra(self) -> str:
        return ""


@dataclass(frozen=True, slots=True, repr=False)
class Slots(Level):
    """A level of `width` positions below each parent."""

    width: int = 0

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        return Const(0, dtypes.int32), Const(self.width, dtypes.int32)

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(mul(q, self.width), v)

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        position: Expr = Const(-1, dtypes.int32)
        for slot in range(self.width):
            v = Const(slot, dtypes.int32)
            position = select(binary("==", self.coord(s, q, v), c), self.pos(s, q, v), position)
        return position

    def positions(self, parents: int, extent: int) -> int:
        return parents * self.width

    def _extra(self) -> str:
        return f", {self.width}"
