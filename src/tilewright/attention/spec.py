"""What an attention kernel is compiled for, and the text that every family's kernels begin with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilewright.attention import render
from tilewright.attention.pool import Pool
from tilewright.attention.table import MAX_KEYS, Table, TableForm
from tilewright.attention.variant import Traced
from tilewright.codegen import prelude_files
from tilewright.codegen.params import C_TYPES
from tilewright.dtypes import DType
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import View

KERNELS = Path(__file__).parent / "kernels"

_ELEMENTS = """struct float32 { using type = float; };
struct float16 { using type = uint16_t; };
struct bfloat16 { using type = uint16_t; };"""


@dataclass(frozen=True, slots=True)
class Spec:
    """A kernel's types and sizes: `group` query heads of a KV head, rows of K and V, the dtypes of
    q, of the cache and of o, the variant, the form of the page table, and whether larger products
    are larger scores (sm_scale > 0)."""

    group: int
    head_dim: int
    head_dim_vo: int
    q: DType
    kv: DType
    o: DType
    traced: Traced
    table: TableForm
    ascending: bool = True
    _hash: int = field(init=False, compare=False, repr=False, default=0)

    def __post_init__(self) -> None:
        key = (self.group, self.head_dim, self.head_dim_vo, self.q, self.kv, self.o)
        object.__setattr__(self, "_hash", hash((key, self.traced, self.table, self.ascending)))

    def __hash__(self) -> int:
        return self._hash  # of the expressions of a variant, computed once


def params_struct(
    spec: Spec, work: tuple[tuple[str, ...], ...], first: tuple[tuple[str, ...], ...] = ()
) -> Struct:
    """The parameters of a kernel; strides in elements. `work`: the fields of its own plan; `first`:
    fields in front of all others."""
    q, kv, o = (C_TYPES[t.name] for t in (spec.q, spec.kv, spec.o))
    fields: list[tuple[str, ...]] = [
        *first,
        ("q", "ptr", f"const {q}*"), ("k", "ptr", f"const {kv}*"), ("v", "ptr", f"const {kv}*"),
        ("o", "ptr", f"{o}*"), ("lse", "ptr", "float*"), ("qo_indptr", "ptr", "const int32_t*"),
        ("partials", "ptr", "float*"), ("counters", "ptr", "int32_t*"),
        *spec.table.param_fields(), *work,
        *((n, "int64") for n in ("q_token", "q_head", "k_page", "k_slot", "k_head")),
        *((n, "int64") for n in ("v_page", "v_slot", "v_head", "pages")),
        ("page_size", "int32"), ("qo_heads", "int32"), ("kv_heads", "int32"),
        ("sm_scale", "float32"),
    ]  # fmt: skip
    return Struct("Params", [*fields, *render.param_fields(spec.traced)])


def param_values(
    q: View, pool: Pool, table: Table, outputs: tuple[View, View], sm_scale: float
) -> dict[str, Any]:
    """The values of `params_struct` that no plan and no variant decides."""
    o, lse = outputs
    numbers = {
        "q": q.pointer, "q_token": q.strides[0], "q_head": q.strides[1], "qo_heads": q.shape[1],
        "o": o.pointer, "lse": lse.pointer, "kv_heads": pool.kv_heads, "sm_scale": sm_scale,
    }  # fmt: skip
    return numbers | pool.params() | table.params()


@functools.cache
def template(name: str) -> str:
    """The text of a file of `kernels/`."""
    return (KERNELS / name).read_text(encoding="utf-8")


def constants(spec: Spec, more: dict[str, int]) -> str:
    """Namespace `flash` with the numbers and types that the float32 kernels read."""
    numbers = {
        "DK": spec.head_dim, "DV": spec.head_dim_vo, "G": spec.group, "MAX_KEYS": MAX_KEYS,
    } | more  # fmt: skip
    return "\n".join(
        (
            "namespace flash {",
            _ELEMENTS,
            *(f"constexpr int {name} = {value};" for name, value in numbers.items()),
            *(f"using {n} = {t.name};" for n, t in (("Q", spec.q), ("KV", spec.kv), ("O", spec.o))),
            "}  // namespace flash",
        )
    )


def cuda_headers() -> dict[str, str]:
    """Every file that CUDA kernels include, by name."""
    files = (
        "bounds.h", "table.h", "variant.h", "cuts.h", "plan_gpu.cuh", "flash_portable.cuh",
        "decode.cuh", "prefill_hopper.cuh", "hopper_load.cuh", "hopper_consume.cuh", "merge.cuh",
    )  # fmt: skip
    return prelude_files.headers() | {name: template(name) for name in files}
