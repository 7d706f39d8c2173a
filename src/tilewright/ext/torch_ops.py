"""Operators of `torch.library` for torch.compile and CUDA graphs.

attend = torch_ops.operator(tw.Attention(32, 8, 128))
o, lse = attend(q, k_pages, v_pages, (kv_len, block_table), qo_indptr)

`tilewright::attend`, `::plan`, `::append` and `::merge` are opaque to the compiler and have fakes,
so a function that calls them compiles with fullgraph=True. They have no derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.merge import State
from tilewright.attention.merge import merge as merge_states
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.workspace import Workspace
from tilewright.errors import ArgumentError
from tilewright.ext import needed

torch: Any = needed("torch", "tilewright.ext.torch_ops")
Tensor = Any

_OPERATORS: dict[str, Operator] = {}
"""By the key that stands in compiled graphs, which hold for this process."""


@dataclass(frozen=True, eq=False, slots=True)
class Operator:
    """Attention as an operator; see `operator`."""

    attn: Attention
    room: Workspace | None
    key: str
    names: tuple[str, ...]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, table: Sequence[Tensor], rows: Tensor = None,
        **values: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """o (tokens, qo_heads, head_dim_vo) and lse (tokens, qo_heads) float32, natural logarithm.

        `k`, `v` (pages, page_size, kv_heads, head_dim) with any strides; `table`: kv_len and
        block_table, or kv_len, kv_indptr and kv_indices; `rows`: qo_indptr (None: one query a
        request), with a workspace what `plan` returned. `values`: each value of the variant that
        it does not fix, as a tensor. Raises ArgumentError.
        """
        if len(values) != len(self.names) or any(n not in self.names for n in values):
            raise ArgumentError(
                "A101", f"values {sorted(values)}", hint=f"the variant needs {list(self.names)}"
            )
        ordered = [values[name] for name in self.names]
        return torch.ops.tilewright.attend(q, k, v, list(table), rows, ordered, self.key)

    def plan(self, table: Sequence[Tensor], qo_indptr: Tensor = None) -> Tensor:
        """Plan a batch in the operator's workspace; pass the result as `rows` to each layer's call.

        Usable while a CUDA graph is captured; a replay plans again. Raises ArgumentError.
        """
        if self.room is None:
            raise ArgumentError("A101", "plan without a workspace", hint="operator(attn, room)")
        return torch.ops.tilewright.plan(list(table), qo_indptr, self.key)


def operator(attn: Attention, room: Workspace | None = None) -> Operator:
    """The operator of an attention; `room`: a workspace of `attn.reserve`, for CUDA graphs. Without
    one each call plans on the host. Raises ArgumentError[A107]."""
    for name, value, kind in (("attn", attn, Attention), ("room", room, (Workspace, type(None)))):
        if not isinstance(value, kind):
            raise ArgumentError("A107", f"{name} is a {type(value).__name__}", where=name)
    fixed = dict(attn.variant.fixed)
    names = tuple(v.name for v in attn.variant.traced.values if v.name not in fixed)
    known = [x for x in _OPERATORS.values() if x.attn == attn and x.room is room]
    made = known[0] if known else Operator(attn, room, f"attention_{len(_OPERATORS)}", names)
    return _OPERATORS.setdefault(made.key, made)


def append(
    k: Tensor, v: Tensor, key: Tensor, value: Tensor, request: Tensor, position: Tensor,
    table: Sequence[Tensor],
) -> None:  # fmt: skip
    """Write rows `key`, `value` (rows, kv_heads, head_dim) into the pages `k`, `v`, in place.

    Row i is key position[i] of request[i]; rows of a negative request are skipped. `table`:
    kv_indptr and kv_indices, or the block_table alone. No host work. Raises ArgumentError.
    """
    for name, x in (("request", request), ("position", position)):
        if x.shape != key.shape[:1] or x.is_floating_point():
            text = f"{name} is {x.dtype} of shape {tuple(x.shape)}"
            raise ArgumentError("A103", text, where=name, hint=f"integers ({key.shape[0]},)")
    for name, rows, pages in (("key", key, k), ("value", value, v)):
        if rows.shape[1:] != pages.shape[2:] or rows.dtype != pages.dtype:
            text = f"{name} is {rows.dtype} {tuple(rows.shape)}, pages {pages.dtype} "
            raise ArgumentError("A103", text + str(tuple(pages.shape)), where=name)
    torch.ops.tilewright.append(k, v, key, value, request, position, list(table))


def merge(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One state (o, lse) from states over disjoint keys; lse is a natural logarithm."""
    return torch.ops.tilewright.merge([o for o, _ in states], [lse for _, lse in states])


# ---------------------------------------------------------------------------- implementations


def _table(table: list[Tensor]) -> Table:
    return Table(*table) if len(table) == 2 else Table.csr(*table)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, table: list[Tensor], rows: Tensor, values: list[Tensor],
    key: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operator = _OPERATORS[key]
    kv = KV(_table(table), Pool(k, v))
    plan: Any = operator.room
    if plan is None:
        rows = torch.arange(kv.requests + 1, dtype=torch.int32) if rows is None else rows
        plan = operator.attn.plan(rows, kv)
    named = dict(zip(operator.names, values, strict=True))
    state = operator.attn.run(q, kv, plan, **named)
    return state.o, state.lse


def _plan(table: list[Tensor], qo_indptr: Tensor, key: str) -> Tensor:
    room: Any = _OPERATORS[key].room
    room.plan(_table(table), qo_indptr)
    return table[0].new_empty(0)


def _append(
    k: Tensor, v: Tensor, key: Tensor, value: Tensor, request: Tensor, position: Tensor,
    table: list[Tensor],
) -> None:  # fmt: skip
    """Skipped rows write once more what another row writes, or what is there: shapes stay fixed."""
    if not len(request):
        return
    valid = request >= 0
    row = torch.arange(len(request), device=request.device)
    row = torch.where(valid, row, valid.to(torch.int32).argmax())
    request, position = request[row].clamp(min=0).long(), position[row].long()
    entry = position // k.shape[1]
    if len(table) == 2:
        page = table[1][(table[0][request].long() + entry).clamp(0, len(table[1]) - 1)].long()
    else:
        page = table[0][request, entry].long()
    slot, some = position % k.shape[1], valid.any()
    for pages, new in ((k, key), (v, value)):
        pages[page, slot] = torch.where(some, new[row], pages[page, slot])


def _merge(o: list[Tensor], lse: list[Tensor]) -> tuple[Tensor, Tensor]:
    state = merge_states(
        [State(x.contiguous(), y.contiguous()) for x, y in zip(o, lse, strict=True)]
    )
    return state.o, state.lse


def _empty(q: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:-1], head_dim)
    return q.new_empty(shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


_FAKES = {
    "attend": lambda q, k, v, table, rows, values, key: _empty(q, v.shape[-1]),
    "plan": lambda table, qo_indptr, key: table[0].new_empty(0),
    "append": lambda *arguments: None,
    "merge": lambda o, lse: _empty(o[0], o[0].shape[-1]),
}
_SCHEMAS = {
    "attend": "(Tensor q, Tensor k, Tensor v, Tensor[] table, Tensor? rows, Tensor[] values, "
    "str key) -> (Tensor, Tensor)",
    "plan": "(Tensor[] table, Tensor? qo_indptr, str key) -> Tensor",
    "append": "(Tensor(a!) k, Tensor(b!) v, Tensor key, Tensor value, Tensor request, "
    "Tensor position, Tensor[] table) -> ()",
    "merge": "(Tensor[] o, Tensor[] lse) -> (Tensor, Tensor)",
}
for _name, _function in (
    ("attend", _attend), ("plan", _plan), ("append", _append), ("merge", _merge),
):  # fmt: skip
    torch.library.define(f"tilewright::{_name}", _SCHEMAS[_name])
    torch.library.impl(f"tilewright::{_name}", ("cpu", "cuda"), _function)
    torch.library.register_fake(f"tilewright::{_name}", _FAKES[_name])
