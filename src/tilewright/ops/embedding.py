"""Token embeddings: gathers rows of a table and dequantises them."""

from __future__ import annotations

from functools import cache

from tilewright.build import Definition, named_recipe, program
from tilewright.errors import ModelError
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.trace import dense, indices, out


@program
def embed_dense(ids=dense("t", "int32"), W=dense("n k", kind="weight")):
    t, k = indices("t:t k:k")
    return out.typed("float32")[t, k](W[ids[t], k].cast("float32"))


@program
def embed_q8_0(
    ids=dense("t", "int32"),
    D=dense("n b", "float16", kind="weight", strided=True),
    Q=dense("n b 32", "int8", kind="weight"),
):
    t, b, e = indices("t:t b:b e:32")
    return out.typed("float32")[t, b, e](Q[ids[t], b, e].cast("float32") * D[ids[t], b])


@program
def embed_q4_0(
    ids=dense("t", "int32"),
    D=dense("n b", "float16", kind="weight", strided=True),
    Q=dense("n b 16", "uint8", kind="weight"),
):
    t, b, half, lane = indices("t:t b:b h:2 l:16")
    nibble = (Q[ids[t], b, lane].cast("int32") >> (half * 4)) & 15
    return out.typed("float32")[t, b, half, lane]((nibble - 8).cast("float32") * D[ids[t], b])


@program
def embed_q4_1(
    ids=dense("t", "int32"),
    D=dense("n b", "float16", kind="weight", strided=True),
    M=dense("n b", "float16", kind="weight", strided=True),
    Q=dense("n b 16", "uint8", kind="weight"),
):
    t, b, half, lane = indices("t:t b:b h:2 l:16")
    nibble = (Q[ids[t], b, lane].cast("int32") >> (half * 4)) & 15
    return out.typed("float32")[t, b, half, lane](
        nibble.cast("float32") * D[ids[t], b] + M[ids[t], b]
    )


PROGRAMS: dict[str, Definition] = {
    "f32": embed_dense,
    "bf16": embed_dense.typed(W="bfloat16"),
    "f16": embed_dense.typed(W="float16"),
    "q8_0": embed_q8_0,
    "q4_0": embed_q4_0,
    "q4_1": embed_q4_1,
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
