"""The decode family: few query rows over long KV on tensor cores, sm_80 and newer.

Template: kernels/decode.cuh. `attention/ranges.py` cuts the work of a batch. Keys that requests
share are read by a launch in front, of this family or of the Hopper family (`Plan.block`)."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from tilewright.attention import spec as specs
from tilewright.attention.families import hopper
from tilewright.attention.families.family import Call, Family, Prepared, check_alignment, refusal
from tilewright.attention.plan import Plan
from tilewright.attention.pool import Pool
from tilewright.attention.ranges import CUT, ROWS, TILE, head_block, of_front
from tilewright.attention.spec import Spec
from tilewright.attention.table import MAX_KEYS
from tilewright.errors import ArgumentError
from tilewright.ir.body import Body
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import view

KEYS = 16  # of a tile, for each warp
WARPS = TILE // KEYS
# Stages of a warp's ring, of rows up to SHORT_ROW elements (more bytes in flight lengthen the queue
# at the memory) and of longer ones, whose K and V come in turns.
STAGES, SHORT_ROW = (2, 1), 128
THREADS = WARPS * 32
ALONE, BEHIND, FRONT = range(3)  # kinds of launches where requests share keys (decode.cuh)


def refuses(spec: Spec, rows: int, pool: Pool | None, _arch: str = "") -> str:
    """Why the kernel cannot run a call, or "" where it can."""
    own = () if spec.table.shared else ("query",)  # a launch in front has none
    if reason := refusal(spec, rows, pool, "", "output", *own):
        return reason
    if spec.head_dim_vo > spec.head_dim:
        return "rows of V are longer than those of K"
    if spec.head_dim > SHORT_ROW and spec.table.shared:
        return f"keys are shared and head_dim is above {SHORT_ROW}"
    return f"a request has {rows} rows (queries × group), more than {ROWS}" if rows > ROWS else ""


# ---------------------------------------------------------------------------- the kernel


def blocks_of(rows: int) -> int:
    """Blocks of 8 packed rows of a unit, for at most `rows` of a request."""
    return 1 if rows <= 8 else 2


def ctas_per_sm(head_dim: int) -> int:
    """CTAs at once, whose registers are limited so: short rows are more tiles for as many bytes."""
    return 3 if head_dim <= 64 else 2


def _columns(head_dim: int) -> int:
    """Elements of a row that the kernel computes with; in shared memory it has 8 more."""
    return -(-head_dim // 16) * 16


def smem_bytes(spec: Spec, blocks: int, kind: int = ALONE) -> int:
    """Dynamic shared memory of a CTA: SMEM_BYTES of decode.cuh."""
    k, v, rows = _columns(spec.head_dim), _columns(spec.head_dim_vo), blocks * 8
    ring = WARPS * STAGES[spec.head_dim > SHORT_ROW] * KEYS * (k + v + 16) * 2
    ring += (blocks * k > 256) * rows * (k + 8) * 2  # q, where it takes too many registers
    return ring + WARPS * rows * 8 + 16 + WARPS * rows * 16 * (kind == FRONT)


def partial_floats(head_dim: int, blocks: int, ctas: int, rows: int = 0) -> tuple[int, int]:
    """float32 words of the partial states, two of each CTA, and of the states of `rows` that a
    launch in front leaves."""
    columns = _columns(head_dim)
    return 2 * ctas * blocks * 8 * (columns + 2), rows * (columns + 8)


def shared_block(spec: Spec, pool: Pool | None, arch: str, tokens: int) -> int:
    """Queries of an item of the launch in front that does shared keys on GPUs of `arch`, for at
    most `tokens` of a batch: of the Hopper family where that can run it (`pool`: None where it is
    not known) and one item of this family does not have them all, else of this one."""
    can = tokens * spec.group > ROWS and not hopper.refuses(spec, 0, pool, arch)
    return (hopper.rows_of(spec) if can else ROWS) // spec.group


def params_struct(spec: Spec) -> Struct:
    """The parameters of the kernel."""
    plan = ("cuts", "ptr", "const Cut*"), *specs.PARTIALS, ("front_ctas", "int32")
    return specs.params_struct(spec, plan)


ORDERS = {  # where requests share keys the launches of a step end in their order, but work at once
    ALONE: ("start", "wait", "run"),
    BEHIND: ("start", "run", "wait"),  # it waits for states where it reads them, too
    FRONT: ("wait", "start", "run"),
}


@functools.lru_cache(256)
def body(spec: Spec, together: int, blocks: int, kind: int = ALONE, block: int = 1) -> Body:
    """One kernel; `together`: KV heads of one range; `blocks` of 8 packed rows; `block`: queries of
    an item of a launch in front."""
    numbers = {
        "DK": spec.head_dim, "DV": spec.head_dim_vo, "G": spec.group, "BLOCKS": blocks,
        "HEAD_BLOCK": together, "WARPS": WARPS, "STAGES": STAGES[spec.head_dim > SHORT_ROW],
        "CTAS": ctas_per_sm(spec.head_dim), "MAX_KEYS": MAX_KEYS, "ALONE": ALONE,
        "BEHIND": BEHIND, "FRONT": FRONT, "KIND": kind, "BLOCK": block,
    }  # fmt: skip
    types = f"using Element = uint16_t;\nusing Kind = tw::{spec.kv.name}_bits;"
    text = specs.namespace("attention", *specs.constants(numbers), types)
    text = specs.cuda_text(spec, text, CUT, params_struct(spec), "decode.cuh")
    ctas = ctas_per_sm(spec.head_dim)
    return Body(
        text, "attention::run", THREADS, THREADS * ctas, smem_bytes(spec, blocks, kind),
        ("gpu.cuh", "mma.cuh", "async.cuh"), *params_struct(spec).buffers,
        order=ORDERS[kind], ctas=ctas, alone=kind != ALONE,
    )  # fmt: skip


def _prepare(call: Call) -> Prepared:
    spec, plan, ordinal, values = call.spec, call.plan, call.ordinal, call.values
    check_alignment(values, 4)
    together, shared = head_block(values["kv_heads"]), spec.table.shared > 0
    blocks = blocks_of(plan.longest * spec.group)
    if isinstance(plan, Plan):
        ctas, last = (len(plan.cuts) - 1) * together, plan.nodes[-1:]  # none without requests
        indptr, cuts, nodes = plan.on_device(ordinal)
        rows = int(last["row"].sum()) * values["qo_heads"]
        floats, states = partial_floats(spec.head_dim, blocks, ctas, rows)
        memory = call.scratch.grown(call.like, floats + states, ctas + 1)
        one_each = bool((np.diff(plan.qo_indptr) == 1).all())
        work = {"qo_indptr": 0 if one_each else indptr.pointer, "cuts": cuts.pointer}
        partials, counters = (view(x).pointer for x in memory)
        work |= specs.partial_params(partials, floats, counters, ctas)
        work |= {"nodes": nodes.pointer} if shared else {}
        front = min(int(last["item"].sum()), of_front(plan.block, plan.group, plan.workers))
        keep: tuple[Any, ...] = (indptr, cuts, nodes, memory)
    else:
        ctas, work, keep, front = plan.ctas, plan.params(), (plan,), plan.front
    block = params_struct(spec).pack(**values, **work, front_ctas=front)

    behind, planned = shared and front > 0 < plan.tokens, (plan.requests, plan.tokens)
    b = body(spec, together, blocks, BEHIND if behind else ALONE, plan.block)
    made = Prepared.on_gpu(b, ordinal, ctas, block, keep)
    if behind:
        other = body(spec, together, blocks_of(ROWS), FRONT, plan.block)
        before = hopper.shared_launch(call, front, work)
        made.launch.before = before or specs.launch_of(other, ordinal, front, block)

    def run() -> None:
        if (plan.requests, plan.tokens) != planned:
            now = f"{plan.requests} requests and {plan.tokens} rows of q"
            text = f"the workspace is planned for {now}, this call is bound for {planned}"
            hint = "bind again, or plan the same numbers"
            raise ArgumentError("A103", text, where="plan", hint=hint)
        made.run()

    return replace(made, run=run)


FAMILY = Family("decode", "cuda", lambda _: ROWS, "", ctas_per_sm, refuses, _prepare, shares=True)
