"""Token embeddings: gathers rows of a table and dequantises them."""

from __future__ import annotations

from functools import cache
from typing import Any

from tilewright.build import Definition, named_recipe, program, program_of
from tilewright.errors import ModelError
from tilewright.ops.linear import LAYOUTS, Layout
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


@program
def embed_q8_0(
    ids=dense("t", "int32"),
    D=dense("n b", "float16", kind="weight", strided=True),
    Q=dense("n b 32", "int8", kind="weight"),
):
    t, b, e = indices("t:t b:b e:32")
    return out.typed("float32")[t, b, e](Q[ids[t], b, e].cast("float32") * D[ids[t], b])


_DENSE = _embedding("dense", LAYOUTS["dense"])
PROGRAMS: dict[str, Definition] = {
    "f32": _DENSE,
    "bf16": _DENSE.typed(W="bfloat16"),
    "f16": _DENSE.typed(W="float16"),
    "q8_0": embed_q8_0,
    "q4_0": _embedding("q4_0", LAYOUTS["q4_0"]),
    "q4_1": _embedding("q4_1", LAYOUTS["q4_1"]),
}


@named_recipe
def by_token(s: Schedule) -> Schedule:
    if not s.target.is_cuda:
        return s.parallel("t")
    inner = next(x for x in ("e", "l", "k") if s.has(x))
    return s.bind("t", "cta.x").split(inner, 32, into=("x_o", "x_i")).bind("x_i", "thread.x")


@cache
def embedding_kernel(kind: str, target: str = "cpp") -> Kernel:
    """ids (t,), the arrays of `weight_views` → (t, k), or (t, blocks, …) for quantised tables."""
    if kind not in PROGRAMS:
        hint = f"kinds: {', '.join(PROGRAMS)}"
        raise ModelError("M104", f"no embedding for weights of kind {kind}", hint=hint)
    return PROGRAMS[kind].schedule(by_token).build(target)
