"""Matrix tile operations of a warp: their shapes, and what they multiply into float32.

Of a 16 × n fragment lane 4·g + t holds, for each eight columns, elements (g, 2t), (g, 2t + 1),
(g + 8, 2t), (g + 8, 2t + 1). float32 operands are rounded to tf32: 10 bits of mantissa.
Reference: PTX ISA, mma.sync, fragments of m16n8k16 and m16n8k8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

QUAD = 4  # lanes that share a row of a fragment
HALVES = ("float16", "bfloat16")
# (rows, columns, depth): the types of both operands. 16 columns: one load of four matrices for both
# halves of b.
ATOMS: dict[tuple[int, int, int], tuple[str, ...]] = {
    (16, 8, 16): HALVES,
    (16, 16, 16): HALVES,
    (16, 8, 8): ("float32",),
}
SHAPES = ", ".join(" × ".join(map(str, shape)) for shape in ATOMS)


@dataclass(frozen=True, slots=True)
class Atom:
    """A user's tile operation for `Schedule.mma`: `name(acc, a, b)` adds a · b to `acc`.

    `shape` is that of a built-in operation, whose fragments it takes; `operands`: their dtypes.
    `cuda`: the source of the function on a `tw::fragment<columns>&`, a `tw::fragment_a` and a
    `tw::fragment_b<columns>`; `cpp`: that on a pointer to rows × columns floats and two
    `tw::window`s. `numpy(a, b)` returns the product of float32 arrays (…, rows, depth) and
    (…, depth, columns). Kernels that use it are lowered anew at each build."""

    name: str
    shape: tuple[int, int, int]
    operands: tuple[str, ...]
    cuda: str
    cpp: str
    numpy: Callable[[Any, Any], Any]
