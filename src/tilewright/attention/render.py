"""A traced variant as C text: a struct `Variant` with its hooks, and the bounds of its mask.

On the CPU a vector of scores along the keys is one value; on a GPU each thread has one score.
"""

from dataclasses import replace
from typing import Any

from tilewright.attention import extents
from tilewright.attention.bounds import Text, bound
from tilewright.attention.tracing import NO_SINK, ROW, ROW_HOOKS, SAME_ROW, Traced, Value
from tilewright.codegen.cpp import CppRenderer
from tilewright.codegen.cuda import CudaRenderer
from tilewright.codegen.params import C_TYPES, Params
from tilewright.ir.nodes import Binary, Broadcast, Expr, Load, Program, Select, Unary, Var
from tilewright.ir.rewrite import transform
from tilewright.ir.stmt import children
from tilewright.runtime.view import View

CUDA_AT = "struct At { int32_t qo, kv, qo_head, kv_head, request, q_token, key, qo_len, kv_len; };"
_NOTHING = Program("variant", "loops", ())


def param_fields(traced: Traced) -> list[tuple[str, ...]]:
    """The fields that a variant adds to the parameters: a pointer for each of its values, and for
    tensors by request, row of q and key their rows and columns."""
    fields: list[tuple[str, ...]] = []
    for v in traced.values:
        fields.append((f"v_{v.name}", "ptr", f"const {C_TYPES[v.dtype.name]}*"))
        if is_array(v):
            fields += [(f"v_{v.name}_{n}", "int32") for n in ("rows", "columns")]
    return fields


def param_values(traced: Traced, views: dict[str, View]) -> dict[str, int]:
    """The values of `param_fields`."""
    numbers = {f"v_{name}": seen.pointer for name, seen in views.items()}
    for v in filter(is_array, traced.values):
        shape = views[v.name].shape
        rows, columns = (1, *shape) if v.by == "dim" else (*shape, 1)[:2]
        numbers |= {f"v_{v.name}_rows": rows, f"v_{v.name}_columns": columns}
    return numbers


def is_array(v: Value) -> bool:
    """Whether a value is a `tw::Array` of table.h: all but scalars and per-head vectors."""
    return v.by not in ("", "qo_head", "kv_head")


def widened(e: Expr, lanes: int) -> Expr:
    """`e` with the score and what differs between keys as vectors, and all that uses them."""

    def wide(x: Any) -> Any:
        return x if x.dtype.lanes > 1 else Broadcast(x, x.dtype.vector(lanes))

    def visit(x: Any) -> Any:
        differs = isinstance(x, Var) and x.name in ("s", "at.kv", "at.key")
        if not differs and all(y.dtype.lanes == 1 for y in children(x)):
            return x
        sides = {"a": wide(x.a), "b": wide(x.b)} if isinstance(x, (Binary, Select)) else {}
        return replace(x, **sides, dtype=x.dtype.vector(lanes))

    return wide(transform(e, visit))


class _OnVectors(CppRenderer):
    """Adds what programs lack: conditions as vectors and a fast tanh of vectors."""

    def visit_Var(self, e: Var) -> str:
        return {"at.kv": "kv", "at.key": "key", "at.dim": "dim"}.get(e.name, e.name)

    def stored(self, e: Expr) -> str:
        """Conditions stay masks of 32 bits: every operand has lanes of that width."""
        return self.expr(e)

    def visit_Load(self, e: Load) -> str:
        return _load(self, e)

    def expr(self, e: Any) -> str:
        if isinstance(e, Broadcast) and e.dtype.kind == "b":
            return f"tw::splat<int32_t, {e.dtype.lanes}>(-static_cast<int32_t>({self.expr(e.a)}))"
        return super().expr(e)

    def convert(self, text: str, to: Any) -> str:
        if to.lanes > 1 and to.kind == "b":
            return f"({text} != 0)"
        return super().convert(text, to)

    def visit_Unary(self, e: Unary) -> str:
        if e.op == "tanh" and e.dtype.lanes > 1:
            return f"flash::tanh<{e.dtype.lanes}>({self.expr(e.a)})"
        return super().visit_Unary(e)


class _OnThreads(CudaRenderer):
    def visit_Var(self, e: Var) -> str:
        return "dim" if e.name == "at.dim" else e.name

    def visit_Load(self, e: Load) -> str:
        return _load(self, e)


def _load(renderer: CppRenderer | CudaRenderer, e: Load) -> str:
    """Code that reads a scalar or element of a variant, or of the row that a hook changes."""
    if e.buffer == ROW:
        return f"row[{renderer.expr(e.index[0])}]"
    name = f"v_{e.buffer.name}"
    if not e.index:
        return name
    first, *rest = (renderer.expr(i) for i in e.index)
    if first in ("at.qo_head", "at.kv_head"):
        return f"*({name} + {first})"
    if e.dtype.lanes > 1:
        return f"flash::elements<{e.dtype.lanes}>({name}, {first}, {rest[0]})"
    return f"{name}.at({first}, {rest[0] if rest else 0})"


def cpp_variant(traced: Traced, lanes: int) -> str:
    """The struct for the CPU: `logits` and `mask` of `lanes` neighbouring keys."""
    renderer = _OnVectors(_NOTHING, Params((), ()))
    score, position = f"tw::vec<float, {lanes}>", f"tw::vec<int32_t, {lanes}>"
    keys = f"const At& at, {position} kv, {position} key"
    methods = {
        f"{score} logits({score} s, {keys})": widened(traced.logits, lanes),
        f"{position} mask({keys})": widened(traced.mask, lanes),
    }
    return _struct(traced, renderer, methods)


def cuda_variant(traced: Traced, more: dict[str, Expr]) -> str:
    """The struct for a GPU: `logits` and `mask` of one score, and `more` methods."""
    renderer = _OnThreads(_NOTHING, Params((), ()))
    own = {"float logits(float s, const At& at)": traced.logits}
    own["bool mask(const At& at)"] = traced.mask
    return _struct(traced, renderer, more | own)


def _struct(traced: Traced, renderer: CppRenderer | CudaRenderer, methods: dict[str, Expr]) -> str:
    text = Text()
    ranges = extents.ranges(traced.mask, text)
    members = [f"  {_member(v)};" for v in traced.values]
    starts = [f"v_{v.name}{{{_start(v)}}}" for v in traced.values]
    methods = methods | {"float sink(const At& at)": traced.sink}
    flags = {"SOFTMAX": traced.softmax is not False, "SINK": traced.sink != NO_SINK}
    rows = {name: getattr(traced, name) for name in ROW_HOOKS}
    flags |= {name.upper(): e != SAME_ROW for name, e in rows.items()}
    return "\n".join(
        (
            f"// {traced.name}",
            "struct Variant {",
            *members,
            *(f"  static constexpr bool {n} = {str(x).lower()};" for n, x in flags.items()),
            f"  static constexpr int RANGES = {len(ranges)};",
            f"  TW_METHOD explicit Variant(const Params& p){' : ' if starts else ''}"
            f"{', '.join(starts)} {{ (void)p; }}",
            *(
                f"  TW_METHOD {signature} const {{ return {renderer.expr(e)}; }}"
                for signature, e in methods.items()
            ),
            *(  # element `dim` of a row; a GPU's `at` has what `kv` and `key` say
                f"  template <class Row> TW_METHOD float {name}(const Row& row, const At& at, "
                "int32_t dim, int32_t kv = 0, int32_t key = 0) const "
                f"{{ (void)at, (void)kv, (void)key; return {renderer.expr(e)}; }}"
                for name, e in rows.items()
            ),
            *(
                f"  TW_METHOD int {name[5:].split('(')[0]}_class(const tw::Tile& tile) const "
                f"{{ return tw::tile_class({bound(e, text)}); }}"
                for name, e in methods.items()
                if name.startswith(("bool below", "bool rest"))
            ),
            "  TW_METHOD int tile_class(const tw::Tile& tile) const "
            f"{{ return tw::tile_class({bound(traced.mask, text)}); }}",
            "  TW_METHOD tw::Ranges<RANGES> ranges(const tw::Tile& tile, const tw::Line& kv, "
            "const tw::Line& key) const "
            f"{{ return {{{{{', '.join(ranges)}}}}}; }}",
            "};",
        )
    )


def _start(v: Value) -> str:
    name = f"p.v_{v.name}"
    return f"{name}, {name}_rows, {name}_columns" if is_array(v) else name if v.by else f"*{name}"


def _member(v: Value) -> str:
    kind = C_TYPES[v.dtype.name]
    if is_array(v):
        return f"tw::Array<{kind}> v_{v.name}"
    return f"const {kind}* v_{v.name}" if v.by else f"{kind} v_{v.name}"
