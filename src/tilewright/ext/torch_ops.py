"""Operators of `torch.library`, for torch.compile(fullgraph=True) and CUDA graphs:

    attend = torch_ops.operator(tw.Attention(32, 8, 128))
    o, lse = attend(q, k_pages, v_pages, (kv_len, block_table), qo_indptr)

`append(k, v, key, value, request, position, table)` writes rows (rows, kv_heads, head_dim) into the
pages k and v, in place: row i is key position[i] of request[i], rows of a negative request are
skipped; `table` is (kv_indptr, kv_indices) or (block_table,). No host work on GPUs, where nothing
outside a table is written. `merge(os, lses)` makes one state (o, lse) of states over disjoint keys.
Each operator, `torch.ops.tilewright.attend` … `.merge`, has a fake and no derivative. Errors are
ArgumentErrors.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.merge import State
from tilewright.attention.merge import merge as merge_all
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.workspace import Workspace
from tilewright.errors import ArgumentError, needed_for
from tilewright.runtime.view import check_gradient

with needed_for("operators of torch", "torch"):
    import torch

Tensor = Any
_OPERATORS: dict[str, "Operator"] = {}  # by the key that compiled graphs of this process hold


@dataclass(frozen=True, eq=False)
class Operator:
    """Attention as an operator; see `operator`. `names`: the values that its variant needs."""

    attn: Attention
    room: Workspace | None
    key: str
    names: tuple[str, ...]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, table: Sequence[Tensor], rows: Tensor = None,
        **values: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """o (tokens, qo_heads, head_dim_vo) and lse (tokens, qo_heads) float32, natural logarithm.

        `k`, `v` (pages, page_size, kv_heads, head_dim), any strides; `table`: (kv_len,) where each
        request has its page, (kv_len, block_table) or (kv_len, kv_indptr, kv_indices); `rows`:
        qo_indptr (None: one query a request), with a workspace what `plan` returned. Raises
        ArgumentError.
        """
        if sorted(values) != sorted(self.names):
            raise ArgumentError("A101", f"values {sorted(values)}, not {list(self.names)}")
        ordered = [values[name] for name in self.names]
        return torch.ops.tilewright.attend(q, k, v, list(table), rows, ordered, self.key)

    def plan(self, table: Sequence[Tensor], qo_indptr: Tensor = None) -> Tensor:
        """Plan a batch in the workspace, also inside a CUDA graph: the `rows` of every layer."""
        if self.room is None:
            raise ArgumentError("A101", "plan without a workspace", hint="operator(attn, room)")
        return torch.ops.tilewright.plan(list(table), qo_indptr, self.key)


@functools.cache
def operator(attn: Attention, room: Workspace | None = None) -> Operator:
    """The operator of an attention. `room`: a workspace of `attn.reserve`, for CUDA graphs; without
    one each call plans on the host."""
    if not isinstance(attn, Attention):
        raise ArgumentError("A107", f"attn is a {type(attn).__name__}", where="attn")
    if attn.variant.traced.softmax is False:
        text = f"{attn.variant} has no softmax: there is no lse to return"
        raise ArgumentError("A107", text, where="attn", hint="attn.run(…).o")
    fixed = dict(attn.variant.fixed)
    names = tuple(v.name for v in attn.variant.traced.values if v.name not in fixed)
    key = f"attention_{len(_OPERATORS)}"
    return _OPERATORS.setdefault(key, Operator(attn, room, key, names))


def _table(table: list[Tensor]) -> Table:
    if not 0 < len(table) < 4:
        raise ArgumentError("A103", f"table has {len(table)} tensors", where="table", hint="1 to 3")
    return (Table.dense, Table, Table.csr)[len(table) - 1](*table)


def _attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, table, rows, values, key = arguments
    operator, kv = _OPERATORS[key], KV(_table(table), Pool(k, v))
    plan: Any = operator.room
    if plan is None:
        rows = torch.arange(kv.table.requests + 1, dtype=torch.int32) if rows is None else rows
        plan = operator.attn.plan(rows, kv)
    state = operator.attn.run(q, kv, plan, **dict(zip(operator.names, values, strict=True)))
    return state.o, state.lse


def _plan(table: list[Tensor], qo_indptr: Tensor, key: str) -> Tensor:
    room: Any = _OPERATORS[key].room
    room.plan(_table(table), qo_indptr)
    return table[0].new_empty(0)


def _append(*arguments: Any) -> None:
    """Skipped rows write once more what another row writes, or what is there: no shape depends on
    values, so a graph can hold it."""
    k, v, key, value, request, position, table = arguments
    for name, x in (("request", request), ("position", position)):
        if x.shape != key.shape[:1] or x.is_floating_point():
            raise ArgumentError("A103", f"{name} is {x.dtype} {tuple(x.shape)}", where=name)
    for name, x, pages in (("key", key, k), ("value", value, v)):
        same = x.shape[:1] == key.shape[:1] and pages.shape[:2] == k.shape[:2]
        if not same or x.shape[1:] != pages.shape[2:] or x.dtype != pages.dtype:
            text = f"{name} is {x.dtype} {tuple(x.shape)}, pages {pages.dtype} {tuple(pages.shape)}"
            raise ArgumentError("A103", text, where=name, hint="as many rows and pages as for key")
    if [x.ndim for x in table] not in ([2], [1, 1]):
        text, hint = f"table has {len(table)} tensors", "(block_table,) or (kv_indptr, kv_indices)"
        raise ArgumentError("A103", text, where="table", hint=hint)
    first = table[0] if len(table) == 2 else torch.arange(len(table[0]) + 1, device=k.device)
    first = first.long() * (1 if len(table) == 2 else table[0].shape[1])  # entry of each request
    entries, at = table[-1].reshape(-1), request.clamp(0, len(first) - 2).long()
    entry, slot = first[at] + position // k.shape[1], position % k.shape[1]
    inside = (request < len(first) - 1) & (position >= 0) & (entry < first[at + 1])
    if k.device.type == "cpu" and bool(((request >= 0) & ~inside).any()):
        raise ArgumentError("A109", "a position beyond the pages of its request", where="position")
    if not len(request) or not len(entries):
        return
    page = entries[torch.where(inside, entry, 0)].long()
    valid = inside & (request >= 0) & (page >= 0) & (page < len(k))
    row = torch.where(valid, torch.arange(len(valid), device=k.device), valid.int().argmax())
    page, slot = page[row].clamp(0, len(k) - 1), slot[row].clamp(min=0)
    for pages, new in ((k, key), (v, value)):
        pages[page, slot] = torch.where(valid.any(), new[row], pages[page, slot])


def _checked(function: Any) -> Any:
    """`function`, but it raises ArgumentError[A111] where gradients are recorded. Graphs that torch
    compiles ask when they are traced: fakes refuse for all later runs."""

    def checked(*arguments: Any) -> Any:
        for x in arguments:
            for one in x if isinstance(x, (list, tuple)) else (x,):
                check_gradient(one)
        return function(*arguments)

    return checked


def _merge(o: list[Tensor], lse: list[Tensor]) -> tuple[Tensor, Tensor]:
    if len(o) != len(lse):
        raise ArgumentError("A103", f"{len(o)} outputs, {len(lse)} lse", where="lse")
    state = merge_all([State(x.contiguous(), y.contiguous()) for x, y in zip(o, lse, strict=True)])
    return state.o, state.lse


def _like(q: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], head_dim)), q.new_empty(q.shape[:-1], dtype=torch.float32)


_IMPLEMENTED = {
    "attend(Tensor q, Tensor k, Tensor v, Tensor[] table, Tensor? rows, Tensor[] values, str key) "
    "-> (Tensor, Tensor)": (_attend, lambda q, k, v, *rest: _like(q, v.shape[-1])),
    "plan(Tensor[] table, Tensor? qo_indptr, str key) -> Tensor": (
        _plan, lambda table, *rest: table[0].new_empty(0),
    ),
    "append(Tensor(a!) k, Tensor(b!) v, Tensor key, Tensor value, Tensor request, Tensor position, "
    "Tensor[] table) -> ()": (_checked(_append), lambda *arguments: None),
    "merge(Tensor[] o, Tensor[] lse) -> (Tensor, Tensor)": (
        _merge, lambda o, lse: _like(o[0], o[0].shape[-1]),
    ),
}  # fmt: skip
for _schema, (_function, _fake) in _IMPLEMENTED.items():
    _name, _, _rest = f"tilewright::{_schema}".partition("(")
    torch.library.define(_name, f"({_rest}")
    torch.library.impl(_name, ("cpu", "cuda"), _function)
    torch.library.register_fake(_name, _checked(_fake))
append, merge = torch.ops.tilewright.append, torch.ops.tilewright.merge
