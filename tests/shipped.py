"""Every kernel that ships, in the forms that users get: the one list of the golden texts and of
the compilation to cubins."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.compiler.bsr_spmm import bsr_spmm_definition

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import variant
from tilewright.attention.spec import Spec
from tilewright.attention.table import TableForm
from tilewright.build import Definition
from tilewright.ops import rope, sparse_results
from tilewright.ops.embedding import PROGRAMS as EMBEDDINGS
from tilewright.ops.embedding import by_token
from tilewright.ops.gemm import gemm_definition
from tilewright.ops.linear import linear_definition
from tilewright.ops.paging import by_request, pages, positions_program
from tilewright.ops.rowwise import ARGMAX, BY_ROW, WITH_SUM, rmsnorm_add, silu_mul
from tilewright.ops.sddmm import sddmm_definition
from tilewright.ops.spmm import by_length, powers, spmm_definition

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
LENGTHS, SHORT = by_length(powers(32)), by_length(powers(4))
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CPU, CUDA = ("cpp",), ("cuda",)
BOTH = CPU + CUDA


@dataclass(frozen=True, slots=True)
class Shipped:
    """A definition with its schedule, and the kinds of target that it ships for."""

    definition: Definition
    targets: tuple[str, ...] = BOTH


def _spmm(
    fmt: Any, d: int, dtype: str = "float32", *, far: bool = False, many: bool = False,
    targets: Any = BOTH,
) -> Shipped:  # fmt: skip
    definition = spmm_definition(fmt, dtype, dtype, d, gathers_far=far, many=many)
    return Shipped(definition, targets)


def _sddmm(
    fmt: Any, d: int, dtype: str = "float32", *, index: str = "int32", targets: Any = BOTH
) -> Shipped:
    return Shipped(sddmm_definition(fmt, (dtype, dtype, dtype), d, index), targets)


def _linear(kind: str, many: bool = False, n: int = 576, k: int = 1536, after: Any = "") -> Shipped:
    definition = linear_definition(kind, many, n, k, after=after)
    return Shipped(definition, CPU if many else BOTH)  # a GPU has one schedule for both


def _fill(phases: sparse_results.Phases, dtype: str = "float32") -> Shipped:
    kind = dtypes.dtype(dtype)
    operands = ("A", tw.csr(), kind), ("B", tw.csr(), kind)
    return Shipped(sparse_results.definitions(phases, operands, dtypes.int32, kind)[1], CPU)


def _interleaved(kind: str, many: bool) -> Shipped:
    return Shipped(linear_definition(kind, many, 576, 1536, True), CPU)


def lesson(file: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(file[3:-3], EXAMPLES / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _example(file: str, name: str, recipe: str = "") -> Definition:
    module = lesson(file)
    definition = getattr(module, name)
    return definition.schedule(getattr(module, recipe)) if recipe else definition


def _blocks(op: str, fmt: str, b: int, **sizes: int) -> Shipped:
    """Products of lesson 10, 48 features wide."""
    module = lesson("10_blocks.py")
    operands = ("A", "X", "Y")[: 3 if op == "sddmm" else 2]
    typed = getattr(module, op).typed(**dict.fromkeys(operands, "float16"))
    made = getattr(tw, fmt, None) or getattr(module, fmt)
    pieces = sizes.pop("pieces", 0)
    schedule = getattr(module, f"{op}_on_tiles")
    chosen = module.in_pieces(made(b), pieces) if pieces else made(b)
    return Shipped(typed.decompose(A=chosen).schedule(lambda s: schedule(s, 48, **sizes)))


SHIPPED: dict[str, Shipped] = {
    # SpMM: the format that pack_for_spmm chooses on each target, then every other one
    "spmm csr f32 128": _spmm(tw.csr(), 128),
    "spmm csr f32 512 far": _spmm(tw.csr(), 512, far=True, targets=CPU),
    "spmm csr f32 any": _spmm(tw.csr(), 0, targets=CPU),
    "spmm csr f32 48": _spmm(tw.csr(), 48, targets=CPU),
    "spmm csr bf16 32": _spmm(tw.csr(), 32, "bfloat16"),
    "spmm csc f32 64": _spmm(tw.csc(), 64),
    "spmm coo f32 64": _spmm(tw.coo(), 64),
    "spmm ell f32 64": _spmm(tw.ell(8), 64),
    "spmm bsr f32 64": _spmm(tw.bsr(4), 64, targets=CPU),
    "spmm hyb f32 64": _spmm(tw.hyb(buckets=(1, 2, 4)), 64),
    "spmm hyb 2 f32 64": _spmm(tw.hyb(2, (1, 2)), 64),
    "spmm hyb f64 32": _spmm(tw.hyb(), 32, "float64", targets=CUDA),
    "spmm by_length f32 128": _spmm(LENGTHS, 128, targets=CUDA),
    "spmm by_length f32 64": _spmm(SHORT, 64, targets=CPU),
    "spmm by_length f16 128": _spmm(LENGTHS, 128, "float16", many=True, targets=CUDA),
    "spmm by_length f32 512 far": _spmm(LENGTHS, 512, far=True, targets=CUDA),
    **{f"spmm by_length f32 {d}": _spmm(SHORT, d, targets=CUDA) for d in (1, 7)},
    # SDDMM
    "sddmm csr f32 128": _sddmm(tw.csr(), 128),
    "sddmm csr f32 any": _sddmm(tw.csr(), 0, targets=CPU),
    "sddmm dcsr bf16 40": _sddmm(tw.dcsr(), 40, "bfloat16"),
    **{f"sddmm coo f32 {d}": _sddmm(tw.coo(), d) for d in (32, 33)},
    **{f"sddmm coo f32 {d}": _sddmm(tw.coo(), d, targets=CUDA) for d in (1, 7, 128, 512)},
    **{f"sddmm coo f16 {d}": _sddmm(tw.coo(), d, "float16", targets=CUDA) for d in (33, 512)},
    "sddmm coo f64 64 int64": _sddmm(tw.coo(), 64, "float64", index="int64"),
    # sparse results
    "add fill": _fill(sparse_results.add_phases),
    "multiply fill": _fill(sparse_results.multiply_phases),
    "spgemm fill f64": _fill(sparse_results.spgemm_phases, "float64"),
    # matrix tiles
    "gemm f16": Shipped(gemm_definition("float16")),
    "gemm bf16 512x256": Shipped(gemm_definition("bfloat16", 512, 256, "few")),
    "bsr_spmm 16 f16 64": Shipped(bsr_spmm_definition(tw.bsr(16), "float16", 64)),
    "bsr_spmm 128 bf16 any": Shipped(bsr_spmm_definition(tw.bsr(128), "bfloat16")),
    # layers of a model
    **{f"linear {kind}": _linear(kind) for kind in KINDS},
    # float16 differs from bfloat16 in the conversion of a weight alone, Q4_0 from Q4_1 in `m`.
    **{
        f"linear {kind} many": _linear(kind, many=True)
        for kind in KINDS
        if kind not in ("f16", "q4_0")
    },
    **{
        f"linear {kind} interleaved{' many' if many else ''}": _interleaved(kind, many)
        for kind in ("q8_0", "q4_0", "q4_1")
        for many in (False, True)
    },
    "linear bf16 gate": _linear("bf16", after="gate"),
    "linear q4_1 norm_gate": Shipped(
        linear_definition("q4_1", False, 1536, 576, after="norm_gate"), CUDA
    ),
    "pages": Shipped(pages.schedule(by_request)),
    "positions": Shipped(positions_program(16).schedule(by_request)),
    "linear f32 172x64": _linear("f32", n=172, k=64),
    "linear f32 odd": _linear("f32", n=13, k=37),
    "linear q4_1 odd": _linear("q4_1", n=13, k=96),
    **{f"embedding {kind}": Shipped(EMBEDDINGS[kind].schedule(by_token)) for kind in KINDS},
    "rmsnorm_add": Shipped(rmsnorm_add.schedule(WITH_SUM)),
    "silu_mul": Shipped(silu_mul.schedule(BY_ROW)),
    **{
        f"{name} {kind}": Shipped(
            rope._program(kind == "halves", name == "append").schedule(rope.by_token)
        )
        for name in ("rope", "append")
        for kind in ("pairs", "halves")
    },
    "append": Shipped(rope.append_plain.schedule(rope.by_token)),
    "append 12": Shipped(rope.append_plain.schedule(rope.by_token.of(width=12)), CUDA),
    **{
        f"{name} halves 12": Shipped(
            rope._program(True, name == "append").schedule(rope.by_token.of(width=12)), CUDA
        )
        for name in ("rope", "append")
    },
    "argmax": Shipped(ARGMAX),
    # the lessons
    "example 01 spmm": Shipped(_example("01_spmm.py", "scheduled")),
    "example 02 rgcn": Shipped(_example("02_rgcn.py", "rgcn", "fast"), CPU),
    "example 03 attend": Shipped(_example("03_graph_softmax.py", "attend", "by_row"), CPU),
    "example 04 band": Shipped(
        _example("04_band_attention.py", "attend").decompose(A=tw.band(-63, 0)), CPU
    ),
    "example 05 softmax": Shipped(
        _example("05_row_softmax.py", "softmax_on_gpu", "softmax_by_threads"), CUDA
    ),
    "example 06 graph attention": Shipped(
        lesson("06_graph_attention.py").graph_attention_definition(
            tw.csr(), ("float32",) * 4, (2, 64, 64)
        )
    ),
    "example 10 spmm dbsr": _blocks("spmm", "covering_dbsr", 16, features=16, warps=2),
    "example 10 spmm sr_bcrs": _blocks("spmm", "sr_bcrs", 8, features=16, warps=2),
    "example 10 sddmm bsr": _blocks("sddmm", "bsr", 16, warps=2, depth=16),
    "example 10 sddmm pieces": _blocks("sddmm", "sr_bcrs", 8, warps=2, depth=16, pieces=64),
}


def _attention(
    group: int, head_dim: int, q: str, kv: str, variant: Any, form: TableForm | None = None
) -> Spec:
    q_type, kv_type = dtypes.ALL[q], dtypes.ALL[kv]
    table = form or TableForm()
    return Spec(group, head_dim, head_dim, q_type, kv_type, q_type, variant.traced, table)


ATTENTION: dict[str, Spec] = {
    "causal f32": _attention(3, 64, "float32", "float32", variant.Causal()),
    "full bf16": _attention(1, 256, "bfloat16", "bfloat16", variant.Full()),
    "softcap f32 f16": _attention(8, 128, "float32", "float16", variant.Softcap()),
    "window f16": _attention(
        4,
        80,
        "float16",
        "float16",
        variant.SlidingWindow(window=19),
        TableForm(table_indptr="int32", table_entries="int64"),
    ),
    "softcap bf16": _attention(4, 128, "bfloat16", "bfloat16", variant.Softcap()),
    "alibi f32": _attention(12, 96, "float32", "float32", variant.Alibi()),
}
