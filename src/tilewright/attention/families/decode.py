"""The decode family: few query rows over long KV on tensor cores, sm_80 and newer.

Template: kernels/decode.cuh. `attention/ranges.py` cuts the work of a batch."""

import functools
from typing import Any

import numpy as np

from tilewright.attention import spec as specs
from tilewright.attention.families.family import Call, Family, Prepared, check_alignment, refusal
from tilewright.attention.plan import Plan
from tilewright.attention.pool import Pool
from tilewright.attention.ranges import CUT, NARROW_ROWS, TILE, WIDE_ROWS, head_block
from tilewright.attention.spec import Spec
from tilewright.attention.table import MAX_KEYS
from tilewright.errors import ArgumentError
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import view

KEYS, ROWS = 16, NARROW_ROWS  # keys of a tile for each warp; packed rows of a request
MOST_ROWS = 32  # packed rows where a plan says so, keys are not shared and rows are short
WARPS = TILE // KEYS
# Stages of a warp's ring, of rows up to SHORT_ROW elements (more bytes in flight lengthen the queue
# at the memory) and of longer ones, whose K and V come in turns.
STAGES, SHORT_ROW = (2, 1), 128
THREADS = WARPS * 32
# Resident at once: what the registers of a CTA are limited to. Three are no faster.
CTAS_PER_SM = 2
WIDE_BLOCKS = WIDE_ROWS // WARPS // 8  # of 8 packed rows, for a warp where many requests share keys
WIDE_GROUPS = 4  # of 16 keys that such a warp works on at once


def refuses(spec: Spec, rows: int, pool: Pool | None) -> str:
    """Why the kernel cannot run a call, or "" where it can."""
    if reason := refusal(spec, rows, pool):
        return reason
    if spec.head_dim_vo > spec.head_dim:
        return "rows of V are longer than those of K"
    long, shared = spec.head_dim > SHORT_ROW, spec.table.shared
    if long and shared:
        return f"keys are shared and head_dim is above {SHORT_ROW}"
    most = ROWS if long or shared else MOST_ROWS
    return f"a request has {rows} rows (queries × group), more than {most}" if rows > most else ""


# ---------------------------------------------------------------------------- the kernel


def blocks_of(rows: int, shared: int = 0) -> int:
    """Blocks of 8 packed rows of a narrow unit, for at most `rows` of a request; where requests
    share keys their rows fill two."""
    return 4 if rows > ROWS else 1 if rows <= 8 and not shared else 2


def _columns(head_dim: int) -> int:
    """Elements of a row that the kernel computes with; in shared memory it has 8 more."""
    return -(-head_dim // 16) * 16


def smem_bytes(spec: Spec, blocks: int) -> int:
    """Dynamic shared memory of a CTA: SMEM_BYTES of decode.cuh."""
    k, v = _columns(spec.head_dim), _columns(spec.head_dim_vo)
    ring = (
        WARPS * STAGES[spec.head_dim > SHORT_ROW] * KEYS * (k + v + 16) * 2
        + WARPS * blocks * 8 * 8
        + 16
    )
    ring += (blocks * k > 256) * blocks * 8 * (k + 8) * 2  # q, where it takes too many registers
    return ring + bool(spec.table.shared) * (WARPS * 16 + 20 + 16 * spec.table.shared) * WIDE_ROWS


def partial_floats(head_dim: int, blocks: int, ctas: int, shared: int = 0) -> int:
    """float32 words of the partial states: two of each CTA."""
    rows = WIDE_ROWS if shared else blocks * 8
    return 2 * ctas * rows * (_columns(head_dim) + 2)


def state_floats(head_dim: int, rows: int, shared: int) -> int:
    """float32 words of the states of all levels; `rows` of o and levels of `shared` keys."""
    return (shared + 1) * rows * (_columns(head_dim) + 4) if shared else 0


def params_struct(spec: Spec) -> Struct:
    """The parameters of the kernel."""
    return specs.params_struct(spec, (("cuts", "ptr", "const Cut*"), *specs.PARTIALS))


@functools.lru_cache(256)
def source(spec: Spec, together: int, blocks: int) -> str:
    """The CUDA C++ of one kernel; `together`: KV heads of one range; `blocks` of 8 packed rows."""
    numbers = {
        "DK": spec.head_dim, "DV": spec.head_dim_vo, "G": spec.group, "BLOCKS": blocks,
        "WIDE_BLOCKS": WIDE_BLOCKS, "WIDE_GROUPS": WIDE_GROUPS, "HEAD_BLOCK": together,
        "WARPS": WARPS, "STAGES": STAGES[spec.head_dim > SHORT_ROW], "CTAS": CTAS_PER_SM,
        "MAX_KEYS": MAX_KEYS,
    }  # fmt: skip
    types = f"using Element = uint16_t;\nusing Kind = tw::{spec.kv.name}_bits;"
    text = specs.namespace("attention", *specs.constants(numbers), types)
    files = ("gpu.cuh", "mma.cuh", "async.cuh")
    return specs.cuda_text(spec, files, text, CUT, params_struct(spec), "decode.cuh")


def _prepare(call: Call) -> Prepared:
    from tilewright.runtime import cuda

    spec, plan, ordinal, values = call.spec, call.plan, call.ordinal, call.values
    check_alignment(values, 4)
    together, shared = head_block(values["kv_heads"]), spec.table.shared
    blocks = blocks_of(plan.longest * spec.group, shared)
    if isinstance(plan, Plan):
        ctas, rows = (len(plan.cuts) - 1) * together, plan.tokens * values["qo_heads"]
        indptr, cuts, nodes = plan.on_device(ordinal)
        floats = partial_floats(spec.head_dim, blocks, ctas, shared)
        counts = max(ctas, 1) + (plan.tokens * values["kv_heads"] if shared else 0)
        states = state_floats(spec.head_dim, rows, shared)
        partials, counters = call.scratch.grown(call.like, floats + states, counts)
        one_each = bool((np.diff(plan.qo_indptr) == 1).all())
        work = {"qo_indptr": 0 if one_each else indptr.pointer, "cuts": cuts.pointer}
        memory = (view(partials).pointer, floats, view(counters).pointer, max(ctas, 1))
        work |= specs.partial_params(*memory, rows) | ({"nodes": nodes.pointer} if shared else {})
        keep: tuple[Any, ...] = (indptr, cuts, nodes, partials, counters)
    else:
        ctas, work, keep = plan.ctas, plan.params(), (plan,)
    text = source(spec, together, blocks)
    block, cta = params_struct(spec).pack(**values, **work), (THREADS, 1, 1)
    smem, planned = smem_bytes(spec, blocks), (plan.requests, plan.tokens)
    launch = specs.loaded(text, ordinal).prepare((ctas, 1, 1), cta, smem, block, overlaps=True)

    def run() -> None:
        if (plan.requests, plan.tokens) != planned:
            now = f"{plan.requests} requests and {plan.tokens} rows of q"
            text = f"the workspace is planned for {now}, this call is bound for {planned}"
            hint = "bind again, or plan the same numbers"
            raise ArgumentError("A103", text, where="plan", hint=hint)
        launch.run(cuda.current_stream(ordinal))

    return Prepared(launch, run, text, (*keep, block))


FAMILY = Family(
    "decode", "cuda", lambda spec: ROWS, "", CTAS_PER_SM, refuses, _prepare, shares=True
)
