"""What an attention kernel is compiled for, and the text that every family's kernels begin with."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tilewright.attention import render
from tilewright.attention.pool import Pool
from tilewright.attention.table import MAX_KEYS, Table, TableForm
from tilewright.attention.variant import Traced
from tilewright.build import compile_cuda
from tilewright.codegen import shell
from tilewright.codegen.params import C_TYPES
from tilewright.dtypes import DType
from tilewright.ir.body import Body
from tilewright.runtime import cuda
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import View

KERNELS = Path(__file__).parent / "kernels"

PARTIALS: tuple[tuple[str, ...], ...] = (
    ("partials", "ptr", "float*"), ("counters", "ptr", "int32_t*"),
    ("states", "ptr", "float*"), ("arrivals", "ptr", "int32_t*"), ("state_rows", "int64"),
)  # fmt: skip
"""Fields of families that cut work along the keys: partial results and who has written them; of
nodes that share keys the states, on CPUs `state_rows` rows of each level, and who has arrived."""

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


@functools.lru_cache(256)
def params_struct(
    spec: Spec, work: tuple[tuple[str, ...], ...], first: tuple[tuple[str, ...], ...] = (),
    align: int = 0,
) -> Struct:  # fmt: skip
    """The parameters of a kernel; strides in elements. `work`: the fields of its own plan; `first`:
    fields in front of all others; `align`: as of a Struct."""
    q, kv, o = (C_TYPES[t.name] for t in (spec.q, spec.kv, spec.o))
    fields: list[tuple[str, ...]] = [
        *first,
        ("q", "ptr", f"const {q}*"), ("k", "ptr", f"const {kv}*"), ("v", "ptr", f"const {kv}*"),
        ("o", "ptr", f"{o}*"), ("lse", "ptr", "float*"), ("qo_indptr", "ptr", "const int32_t*"),
        *spec.table.param_fields(), *work,
        *((n, "int64") for n in ("q_token", "q_head", "k_page", "k_slot", "k_head")),
        *((n, "int64") for n in ("v_page", "v_slot", "v_head", "pages")),
        ("page_size", "int32"), ("qo_heads", "int32"), ("kv_heads", "int32"),
        ("sm_scale", "float32"),
    ]  # fmt: skip
    return Struct("Params", [*fields, *render.param_fields(spec.traced)], align)


def param_values(
    q: View, pool: Pool, table: Table, outputs: tuple[View, ...], sm_scale: float
) -> dict[str, Any]:
    """The values of `params_struct` that no plan or variant decides; `outputs`: o, perhaps lse."""
    o, *lse = outputs
    numbers = {
        "q": q.pointer, "q_token": q.strides[0], "q_head": q.strides[1], "qo_heads": q.shape[1],
        "o": o.pointer, "lse": lse[0].pointer if lse else 0, "kv_heads": pool.kv_heads,
        "sm_scale": sm_scale,
    }  # fmt: skip
    return numbers | pool.params() | table.params()


def partial_params(
    partials: int, floats: int, counters: int, counts: int, rows: int = 0
) -> dict[str, int]:
    """The values of `PARTIALS`: `floats` of partial results come before the states, `counts`
    of their counters in front of the arrivals."""
    return {
        "partials": partials, "counters": counters, "states": partials + 4 * floats,
        "arrivals": counters + 4 * counts, "state_rows": rows,
    }  # fmt: skip


@functools.cache
def template(name: str) -> str:
    """The text of a file of `kernels/`."""
    return (KERNELS / name).read_text(encoding="utf-8")


@functools.cache
def expanded(name: str) -> str:
    """The text of a file of `kernels/`, and of those that it includes where it does."""
    include = re.compile('^#include "(.+)"$', re.MULTILINE)
    return f"// {name}\n" + include.sub(lambda found: expanded(found[1]), template(name))


def namespace(name: str, *lines: str) -> str:
    """A C++ namespace."""
    return "\n".join((f"namespace {name} {{", *lines, f"}}  // namespace {name}"))


def constants(numbers: Mapping[str, int]) -> Iterator[str]:
    """The declarations of integer constants."""
    return (f"constexpr int {name} = {value};" for name, value in numbers.items())


def flash_constants(spec: Spec, more: dict[str, int]) -> str:
    """Namespace `flash` with the numbers and types that the float32 kernels read."""
    numbers = {
        "DK": spec.head_dim, "DV": spec.head_dim_vo, "G": spec.group, "MAX_KEYS": MAX_KEYS,
    } | more  # fmt: skip
    types = {"Q": spec.q, "KV": spec.kv, "O": spec.o}
    using = (f"using {name} = {kind.name};" for name, kind in types.items())
    return namespace("flash", _ELEMENTS, *constants(numbers), *using)


def cuda_text(
    spec: Spec, numbers: str, work: Struct, params: Struct, file: str,
    macros: Mapping[str, object] = MappingProxyType({}), **methods: Any,
) -> str:  # fmt: skip
    """The text of a kernel's body: what varies, then the file of `kernels/`. `work`: a piece of
    work as the plan has it; `macros`: defined there alone; `methods`: more of the variant."""
    varies = numbers, spec.table.c_text(), *map(expanded, ("bounds.h", "table.h", "variant.h"))
    structs = work.c_decl, params.c_decl, render.cuda_variant(spec.traced, methods)
    text = body_text(file, render.CUDA_AT, *varies, *structs)
    head = (f"#define {name} {value}" for name, value in macros.items())
    return "\n".join((*head, text, *(f"#undef {name}" for name in macros)))


def body_text(file: str, *varies: str) -> str:
    """The text of a body: what varies, then a file of `kernels/`. It has a namespace `tw` of its
    own, as what is in there differs between kernels; the prelude's is seen through it."""
    tw, method = "namespace tw { using namespace ::tw; }", "__device__ __forceinline__"
    return "\n".join((tw, f"#define TW_METHOD {method}", *varies, expanded(file)))


@functools.lru_cache(512)
def alone(body: Body, entry: str = "stage0", *macros: str) -> str:
    """The CUDA C++ of a kernel that runs one body, under macros."""
    head = "".join(f"#define {name}\n" for name in macros)
    return head + shell.alone((body,), (entry,))


def launch_of(
    body: Body, ordinal: int, ctas: int, params: cuda.Params, *macros: str,
    entry: str = "stage0", name: str = "attention",
) -> cuda.Launch:  # fmt: skip
    """A launch of a body by itself on one GPU. Raises BuildError[B101, B102, B104]."""
    function, cta = loaded(alone(body, entry, *macros), ordinal, entry, name), (body.threads, 1, 1)
    return function.prepare((ctas, 1, 1), cta, body.smem_bytes, params, body.order != ("run",))


@functools.lru_cache(512)
def loaded(
    text: str, ordinal: int, function: str = "stage0", name: str = "attention"
) -> cuda.Function:
    """A function of CUDA C++, loaded on one GPU. Raises BuildError[B101, B102, B104]."""
    cubin = compile_cuda(text, cuda.device(ordinal).arch, name)
    return cuda.Module(cubin.image, ordinal).function(function)
