"""States of attention, and how states over disjoint keys become one.

A state is the output over some keys and the natural logarithm of their weights' sum. States merge
in any grouping to the same result, up to rounding; no keys at all is o = 0, lse = −inf.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention.checks import check_count, check_view
from tilewright.attention.spec import body_text, constants, launch_of, namespace
from tilewright.codegen.params import C_TYPES
from tilewright.errors import ArgumentError
from tilewright.ir.body import Body
from tilewright.runtime import cuda
from tilewright.runtime.arguments import check_overlaps
from tilewright.runtime.layout import Struct
from tilewright.runtime.transfer import as_float64, to_host, write
from tilewright.runtime.view import View, allocate, byte_span, named_view, ordinal_of

MAX_STATES = 8  # that one launch merges
_WARPS = 4  # of a CTA
_FLOATS = (dtypes.float64, dtypes.float32, dtypes.float16, dtypes.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The result of attention over some keys, which merges with that over other keys.

    `o` (tokens, qo_heads, head_dim), of the dtype of q; `lse` (tokens, qo_heads) float32, natural
    logarithm. Both are arrays of the framework of the queries. `lse` is None where the variant has
    no softmax: such states do not merge, their sums o add."""

    o: Any
    lse: Any

    @staticmethod
    def empty(
        tokens: int, qo_heads: int, head_dim: int, *, dtype: Any = "float32", like: Any = None
    ) -> "State":
        """The state over no keys: merging with it changes nothing. `like`: an array whose framework
        and device it is of (None: NumPy). Raises ArgumentError[A102, A103, A107]."""
        for name, size in {"tokens": tokens, "qo_heads": qo_heads, "head_dim": head_dim}.items():
            check_count(name, size, least=0)
        if dtypes.dtype(dtype) not in _FLOATS:
            raise ArgumentError("A102", f"a state of {dtype}", where="dtype", hint="any float")
        source = np.empty(0, np.float32) if like is None else like
        o = allocate(source, (tokens, qo_heads, head_dim), dtypes.dtype(dtype))
        lse = allocate(source, (tokens, qo_heads), dtypes.float32)
        write(o, 0.0)
        write(lse, -np.inf)
        return State(o, lse)

    def merge(self, *others: "State") -> "State":
        """The state over the keys of this one and of the others. Raises what `merge` raises."""
        return merge((self, *others))

    def __repr__(self) -> str:
        lse = None if self.lse is None else np.shape(self.lse)
        return f"State(o {tuple(np.shape(self.o))}, lse {lse and tuple(lse)})"


def merge(states: Sequence[State], *, mask: Any = None, out: State | None = None) -> State:
    """One state from states over disjoint keys, all of one framework, dtype, shape and device.

    Σ oᵢ·exp(lseᵢ − m) / Σ exp(lseᵢ − m) with m the largest lse, in float32 and in order, so
    repeatable. Where lseᵢ = −inf, oᵢ is not read: it may hold anything.
    `mask` (tokens,) bool: where it is false, the result is the first state. `out`: a state to write
    to, also one of `states`.
    Raises ArgumentError[A101, A102, A103, A104, A105, A107].
    """
    if not isinstance(states, Sequence):
        text, hint = f"states is a {type(states).__name__}", "a list of states"
        raise ArgumentError("A107", text, where="states", hint=hint)
    for s in states:
        if not isinstance(s, State):
            raise ArgumentError("A107", f"{type(s).__name__} is no State", where="states")
        if s.lse is None:
            text, hint = "a state has no lse: its variant has no softmax", "add: a.o + b.o"
            raise ArgumentError("A107", text, where="states", hint=hint)
    if not states:
        raise ArgumentError("A101", "no states to merge", where="states", hint="State.empty(…)")
    first, own = states[0], _views(states[0], "state 0")
    checked = [_views(s, f"state {n}", own) for n, s in enumerate(states)]
    _check_frameworks(states)
    if mask is not None:
        seen, o = named_view("mask", mask), own[0]
        check_view("mask", seen, (dtypes.bool_,), o.shape[:1], o.device)
        if not seen.is_contiguous:
            raise ArgumentError("A103", "mask is not contiguous", where="mask")
    if out is None:
        out = State(*(allocate(first.o, x.shape, x.dtype) for x in own))
    elif not isinstance(out, State):
        raise ArgumentError("A107", f"{type(out).__name__} is no State", where="out")
    written = _views(out, "out", own)
    _check_frameworks((first, out))
    if any(x.readonly for x in written):
        raise ArgumentError("A105", "out is read-only", where="out")
    spans = [(f"state {n}", *byte_span(x)) for n, s in enumerate(checked) for x in s]
    for span in (("out", *byte_span(x)) for x in written):
        check_overlaps([span], [other for other in spans if other[1:] != span[1:]])
    if own[0].device == "cpu":
        _on_host(states, mask, out)
        return out
    if len(states) > MAX_STATES:
        some = merge(states[:MAX_STATES], mask=mask)
        return merge((some, *states[MAX_STATES:]), mask=mask, out=out)
    _on_gpu(checked, written, mask)
    return out


# ---------------------------------------------------------------------------- checks


def _views(s: State, name: str, like: Sequence[View] = ()) -> tuple[View, View]:
    """The views of o and lse, which are as those of `like`."""
    o, lse = named_view(f"o of {name}", s.o), named_view(f"lse of {name}", s.lse)
    if o.ndim < 1:
        raise ArgumentError("A103", f"o of {name} is a number", where="states")
    check_view(f"o of {name}", o, _FLOATS, where="states")
    hint, kinds = "lse has the shape of o less its last", (dtypes.float32, dtypes.float64)
    check_view(f"lse of {name}", lse, kinds, o.shape[:-1], o.device, where="states", hint=hint)
    if not (o.is_contiguous and lse.is_contiguous):
        raise ArgumentError("A104", f"{name} is not contiguous", where="states")
    for kind, x, y in zip(("o", "lse"), (o, lse), like, strict=False):
        where = {"where": "states", "hint": "as the first state is"}
        check_view(f"{kind} of {name}", x, (y.dtype,), y.shape, y.device, **where)
    return o, lse


def _check_frameworks(states: Sequence[State]) -> None:
    roots = {type(a).__module__.partition(".")[0] for s in states for a in (s.o, s.lse)}
    if len(roots) > 1:
        text, hint = f"states of {', '.join(sorted(roots))}", "all arrays of one framework"
        raise ArgumentError("A107", text, where="states", hint=hint)


# ---------------------------------------------------------------------------- host


@np.errstate(invalid="ignore", over="ignore")  # NaN where nothing is read; weights of −∞
def _on_host(states: Sequence[State], mask: Any, out: State) -> None:
    """In float32, or the dtype of lse where that is float64."""
    lses, none = [to_host(s.lse) for s in states], -np.inf
    if mask is not None:
        mask = to_host(mask).reshape(len(mask), *(1,) * (lses[0].ndim - 1))
        lses[1:] = (np.where(mask, lse, none) for lse in lses[1:])
    largest = functools.reduce(np.maximum, lses)
    some = largest != none
    base = np.where(some, largest, 0)
    weight, total = np.zeros_like(largest), np.zeros(out.o.shape, largest.dtype)
    for s, lse in zip(states, lses, strict=True):
        o, w = as_float64(s.o).astype(largest.dtype), np.exp(lse - base)
        weight += w
        total += np.where((lse != none)[..., None], o, 0) * w[..., None]
    safe = np.where(some, weight, 1)
    write(out.o, total / safe[..., None])
    write(out.lse, np.where(some, base + np.log(safe), none))


# ---------------------------------------------------------------------------- GPU


@functools.cache
def _params_struct(o: dtypes.DType) -> Struct:
    c_type = C_TYPES[o.name]
    return Struct("Params", [
        *((f"o{i}", "ptr", f"const {c_type}*") for i in range(MAX_STATES)),
        *((f"lse{i}", "ptr", "const float*") for i in range(MAX_STATES)),
        ("out_o", "ptr", f"{c_type}*"), ("out_lse", "ptr", "float*"),
        ("mask", "ptr", "const uint8_t*"), ("rows", "int64"), ("heads", "int32"),
        ("states", "int32"),
    ])  # fmt: skip


@functools.lru_cache(64)
def body(o: dtypes.DType, dim: int) -> Body:
    """The merge of states of a dtype and head_dim: a warp a row."""
    kind = o.name
    load, store = ("x", "x") if kind == "float32" else (f"tw::from_{kind}(x)", f"tw::to_{kind}(x)")
    text = namespace(
        "merge", f"using Element = {C_TYPES[kind]};",
        *constants({"DIM": dim, "MAX_STATES": MAX_STATES, "WARPS": _WARPS}),
        f"TW_INLINE float load(Element x) {{ return {load}; }}",
        f"TW_INLINE void store(Element* to, float x) {{ *to = {store}; }}",
    )  # fmt: skip
    params = _params_struct(o)
    text, size = body_text("merge.cuh", text, params.c_decl), _WARPS * 32
    return Body(text, "merge::run", size, 1024, 0, ("gpu.cuh",), *params.buffers, barriers=0)


def _on_gpu(states: list[tuple[View, View]], out: tuple[View, View], mask: Any) -> None:
    o, lse = out
    if o.dtype == dtypes.float64 or lse.dtype != dtypes.float32:
        raise ArgumentError("A102", "float64 states on a GPU", where="states", hint="float32")
    ordinal, rows = ordinal_of(o.device), lse.size
    parts = (states + states[:1] * MAX_STATES)[:MAX_STATES]
    addresses = {f"o{i}": x.pointer for i, (x, _) in enumerate(parts)}
    addresses |= {f"lse{i}": x.pointer for i, (_, x) in enumerate(parts)}
    block = _params_struct(o.dtype).pack(
        **addresses, out_o=o.pointer, out_lse=lse.pointer,
        mask=0 if mask is None else named_view("mask", mask).pointer,
        rows=rows, heads=max(rows // max(o.shape[0], 1), 1), states=len(states),
    )  # fmt: skip
    ctas, names = -(-rows // _WARPS), {"entry": "merge_states", "name": "merge"}
    launch = launch_of(body(o.dtype, o.shape[-1]), ordinal, ctas, block, **names)
    launch.run(cuda.current_stream(ordinal))
