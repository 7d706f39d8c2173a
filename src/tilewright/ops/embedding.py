"""Token embeddings: gathers rows of a table and dequantises them."""

from functools import cache
from typing import Any

from tilewright.build import Definition, named_recipe, program_of
from tilewright.errors import ModelError
from tilewright.ops import schedules
from tilewright.ops.linear import KINDS, LAYOUTS, STORED, Layout
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.trace import dense, indices, out


def _embedding(name: str, layout: Layout) -> Definition:
    """Rows of a weight in a layout of `linear`."""

    def embed(ids: Any, **arrays: Any) -> Any:
        t, *at = indices(f"t:t {layout.depth}")
        _, w = layout.weight(arrays, (ids[t],), *at)
        return out.typed("float32")[t, *at](w)

    return program_of(f"embed_{name}", {"ids": dense("t", "int32"), **layout.arrays}, embed)


_DENSE = _embedding("dense", LAYOUTS["dense"])
PROGRAMS = {kind: _DENSE.typed(W=dtype) for kind, dtype in STORED.items()}
PROGRAMS |= {kind: _embedding(kind, LAYOUTS[kind]) for kind in KINDS if kind not in STORED}


@named_recipe
def by_token(s: Schedule) -> Schedule:
    if not s.target.is_cuda:
        return s.parallel("t")
    if not s.has("h"):
        return schedules.rows.of(row="t", elements=("k",))(s)
    s = s.fuse("h", "l", into="k")  # the 32 numbers of a block
    s = s.bind("t", "cta.x").split("b", schedules.THREADS_Y, into=("b_o", "b_y"))
    return s.bind("b_y", "thread.y").split("k", 32, into=("x_o", "x_i")).bind("x_i", "thread.x")


@cache
def embedding_kernel(kind: str, target: str = "cpp") -> Kernel:
    """Builds a kernel of ids (t,) and the arrays of `weight_views` that returns rows of the table,
    (t, k), or (t, k / 32, 2, 16) for quantised weights. Raises ModelError[M104]."""
    if kind not in PROGRAMS:
        hint = f"kinds: {', '.join(PROGRAMS)}"
        raise ModelError("M104", f"no embedding for weights of kind {kind}", hint=hint)
    return PROGRAMS[kind].schedule(by_token).build(target)
