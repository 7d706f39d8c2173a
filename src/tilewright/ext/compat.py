"""FlashInfer's calls over Tilewright's tables, pools and plans: same names, arguments, meanings.

    from tilewright.ext import compat as flashinfer

An option that is not supported is refused, never ignored: flashinfer.txt says which are used, which
are hints. lse is to base 2, as there. Errors are ArgumentErrors (A codes).
"""

import ast
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tilewright.attention.batch import Attention
from tilewright.attention.checks import float_view
from tilewright.attention.kv import KV
from tilewright.attention.merge import State, merge
from tilewright.attention.pool import LAYOUTS, Pool
from tilewright.attention.table import Table
from tilewright.attention.workspace import Workspace
from tilewright.errors import ArgumentError
from tilewright.ext import torch_ops
from tilewright.ext.torch_ops import Tensor, torch
from tilewright.ext.variants import composed, words

_LN_2 = math.log(2)
_GRAPH_ROWS = 16  # rows of a request, times the group, that a workspace plans for
_BUFFERS = ("qo_indptr", "kv_indptr", "indptr", "indices", "last_page_len")
_OPTIONS = (
    "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo", "causal", "pos_encoding_mode",
    "window_left", "logits_soft_cap", "sm_scale",
)  # fmt: skip
_TEXT = Path(__file__).with_name("flashinfer.txt").read_text(encoding="utf-8")
_SIGNATURES = {name: rest for name, _, rest in (p.partition(": ") for p in _TEXT.split("\n\n"))}


def accepts(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function takes the parameters of a signature, as one namespace. Its calls
    raise A101 for an unknown or missing name and for a refused value."""
    kind, parameters, refused = inspect.Parameter.POSITIONAL_OR_KEYWORD, [], {}
    for word in _SIGNATURES[name].split():
        if word == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        parameter, _, text = word.lstrip("~!").partition("=")
        allowed = [ast.literal_eval(x) for x in text.split("|")] if text else []
        default = allowed[0] if allowed else inspect.Parameter.empty
        parameters.append(inspect.Parameter(parameter, kind, default=default))
        refused |= {parameter: allowed} if word.startswith("!") else {}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        me = [p for p in inspect.signature(function).parameters.values() if p.name == "self"]
        signature = inspect.Signature([*me, *parameters])

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as e:
                raise ArgumentError("A101", f"{name}: {e}", hint=f"it takes {signature}") from None
            bound.apply_defaults()
            values = bound.arguments
            for n, allowed in refused.items():
                if not any(type(values[n]) is type(x) and values[n] == x for x in allowed):
                    text = f"{n} is not supported"
                    raise ArgumentError("A101", text, where=n, hint=f"leave it at {allowed[0]!r}")
            return function(*(values.pop(p.name) for p in me), SimpleNamespace(**values))

        call.__doc__ = function.__doc__ or "Parameters are as FlashInfer documents them."
        call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


# ---------------------------------------------------------------------------- options


def _attention(options: dict[str, Any], device: Any) -> tuple[Attention, dict[str, Any]]:
    """The attention that options of `plan` and `run` mean, and the tensors of its variant."""
    mode, cap = options["pos_encoding_mode"], options["logits_soft_cap"] or 0.0
    if mode not in ("NONE", "ALIBI") or (mode == "ALIBI" and cap > 0):
        text, where = f"pos_encoding_mode={mode!r}, logits_soft_cap={cap}", "pos_encoding_mode"
        hint = "rotate by hooks of a variant, or before; ALIBI goes without a cap"
        raise ArgumentError("A101", text, where=where, hint=hint)
    heads, dim, sm_scale = (options[n] for n in ("num_qo_heads", "head_dim_qk", "sm_scale"))
    tensors = {"bits": options["bits"], "sinks": options.get("sinks")}
    tensors["slopes"] = _alibi_slopes(heads, device) if mode == "ALIBI" else None
    tensors = {name: value for name, value in tensors.items() if value is not None}
    causal = options["causal"] and "bits" not in tensors
    variant = composed(causal, options["window_left"], cap, frozenset(tensors))
    sm_scale = dim**-0.5 if sm_scale is None else sm_scale
    for name in ("q_scale", "k_scale"):
        sm_scale = sm_scale if options.get(name) is None else sm_scale * options[name]
    vo = options["head_dim_vo"] or dim
    return Attention(heads, options["num_kv_heads"], dim, variant, sm_scale, vo), tensors


@functools.lru_cache(64)  # no copy to a GPU while a graph is captured
def _alibi_slopes(heads: int, device: Any) -> Tensor:
    """2^(−8i/n) for n = 2^⌊log2 heads⌋ heads, then each second one of those for 2n heads (Press et
    al. 2022, and their code for other counts)."""
    n = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2.0 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _bits(options: dict[str, Any], qo: Tensor, table: Table) -> Tensor | None:
    """The words of a custom mask: flat, request by request, rows by keys; or packed, bit i % 8 of
    byte i // 8, each request from a new byte on. `qo`: the rows of each request."""
    flat, packed = options.get("custom_mask"), options.get("packed_custom_mask")
    mask, unit, kind = (flat, 1, torch.bool) if packed is None else (packed, 8, torch.uint8)
    if mask is None:
        return None
    kv = torch.from_numpy(table.lengths())
    sizes = (qo * kv + unit - 1) // unit
    if mask.dtype != kind or mask.numel() != int(sizes.sum()):
        text = f"{mask.numel()} elements of {mask.dtype}, not {int(sizes.sum())} of {kind}"
        raise ArgumentError("A103", text, where="custom_mask")
    values = mask.reshape(-1).cpu()
    values = values if unit == 1 else (values[:, None] >> torch.arange(8) & 1).bool().reshape(-1)
    rows, first = [], 0
    for m, n, size in zip(qo.tolist(), kv.tolist(), sizes.tolist(), strict=True):
        part = values[first : first + m * n].reshape(m, n)
        rows.append(torch.nn.functional.pad(part, (0, int(kv.max()) - n)))
        first += size * unit
    return words(torch.cat(rows)).to(mask.device)


class _Wrapper:
    """`plan` once a step, `run` for each layer. Of the workspace only the device is used.

    With `use_cuda_graph` each plan copies its arrays into the caller's buffers and plans on the GPU
    into a workspace, so that a captured `run` can be replayed after another `plan`.
    """

    _plan: Callable[..., None]

    def __init_subclass__(cls, name: str) -> None:
        """The methods of a wrapper, whose signatures begin with `name`."""
        run, forward = accepts(f"{name}.run")(cls._run), accepts(f"{name}.forward")(cls._forward)
        cls._set_up, cls.run, cls.forward = accepts(name)(cls._set_up), run, forward
        cls.plan = cls.begin_forward = accepts(f"{name}.plan")(cls._plan)
        cls.run_return_lse = functools.partialmethod(run, return_lse=True)
        cls.forward_return_lse = functools.partialmethod(forward, return_lse=True)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._set_up(*args, **kwargs)

    def _set_up(self, g: SimpleNamespace) -> None:
        if g.backend not in ("auto", "fa2", "fa3"):  # each means Tilewright's own kernels
            raise ArgumentError("A101", f"backend={g.backend!r}", where="backend", hint="auto")
        if not isinstance(g.float_workspace_buffer, torch.Tensor):
            raise ArgumentError("A107", "workspace is no tensor", where="float_workspace_buffer")
        stems = {n: n.rpartition("_buf")[0].removeprefix("paged_kv_") for n in vars(g)}
        self._buffers = {s: getattr(g, n) for n, s in stems.items() if s in _BUFFERS}
        if g.use_cuda_graph and None in self._buffers.values():
            raise ArgumentError("A101", f"a graph needs buffers for {', '.join(self._buffers)}")
        if g.kv_layout not in LAYOUTS:
            raise ArgumentError("A107", f"kv_layout={g.kv_layout!r}", where="kv_layout")
        self.device, self.kv_layout = g.float_workspace_buffer.device, g.kv_layout
        self.is_cuda_graph_enabled = bool(g.use_cuda_graph)
        self._room, self._options = None, {}

    def __getattr__(self, name: str) -> Any:
        """`_window_left` and the other options of a plan, which vLLM reads."""
        options = self.__dict__.get("_options", {})
        if name[1:] not in options:
            raise AttributeError(name)
        return options[name[1:]]

    def end_forward(self, *workspaces: Any) -> None:
        """Nothing: plans own their memory."""

    reset_workspace_buffer = end_forward

    def _keep(self, name: str, array: Any) -> Tensor:
        """An array of a batch on the device, in its buffer where graphs are used."""
        array = torch.as_tensor(array, device=self.device)
        if not self.is_cuda_graph_enabled:
            return array
        buffer = self._buffers.setdefault(name, torch.empty_like(array))
        if array.numel() > buffer.numel() or (name != "indices" and array.shape != buffer.shape):
            text = f"{name} is {tuple(array.shape)}, its buffer {tuple(buffer.shape)}"
            raise ArgumentError("A103", text, where=name, hint="the batch size is fixed in graphs")
        buffer[: array.numel()].copy_(array)
        return buffer

    def _paged(self, indptr: Any, indices: Any, last_page_len: Any, page_size: int) -> Table:
        first, last = self._keep("indptr", indptr), self._keep("last_page_len", last_page_len)
        if last.shape != first.diff().shape:
            text = f"last_page_len is {tuple(last.shape)}, indptr {tuple(first.shape)}"
            raise ArgumentError("A103", text, where="last_page_len")
        lengths = self._keep("kv_len", get_seq_lens(first, last, page_size))
        pages, start = self._keep("indices", indices), 0
        if self.device.type == "cpu" and len(first):  # a slice of a batch need not begin at 0
            start = int(first[0])
        return Table.csr(lengths, first - start if start else first, pages[start:])

    def _plan_batch(self, g: SimpleNamespace, table: Table, rows: Any, page_size: int) -> None:
        """Plan queries `rows` (requests + 1) over a table with pages of `page_size`.

        In graphs now, on the GPU; else by the first `run`, whose cache decides which kernels.
        """
        self._rows, self._table, self._page_size = torch.as_tensor(rows).cpu(), table, page_size
        options = {n: getattr(g, n) for n in _OPTIONS}
        options["logits_soft_cap"] = g.logits_soft_cap or 0.0
        options["bits"] = _bits(vars(g), self._rows.diff(), table)
        attn, _ = _attention(options, self.device)
        if self.is_cuda_graph_enabled and options["bits"] is not None:
            raise ArgumentError("A110", "a custom mask in a CUDA graph", where="custom_mask")
        in_room = self.is_cuda_graph_enabled and self.device.type == "cuda"
        self._planned = self._room_of(attn, table, self._rows) if in_room else None
        self._options = options | {"o_data_type": g.o_data_type}

    def _room_of(self, attn: Attention, table: Table, rows: Tensor) -> Workspace:
        longest, tokens = max(rows.diff().tolist(), default=0), int(rows[-1])
        if longest * attn.group > _GRAPH_ROWS:
            text = f"{longest} queries × {attn.group} heads in a CUDA graph, above {_GRAPH_ROWS}"
            raise ArgumentError("A110", text, where="qo_indptr", hint="use_cuda_graph=False")
        if self._room is None:
            most = tokens if longest > 1 or "qo_indptr" in self._buffers else None
            device = f"cuda:{self.device.index or 0}"
            self._room = attn.reserve(table.requests, max_tokens=most, device=device)
        kept = self._keep("qo_indptr", rows.int()) if self._room.max_tokens else None
        self._room.plan(table, kept, tokens=tokens)
        return self._room

    def _run(self, g: SimpleNamespace) -> Any:
        """o (tokens, heads, head_dim_vo), with return_lse also lse to base 2."""
        planned, options = self._options, vars(g)
        if not planned:
            raise ArgumentError("A101", "run before plan", hint="plan the batch first")
        if options.get("window_left") not in (None, planned["window_left"]):
            raise ArgumentError("A101", "window_left is not the planned one", where="window_left")
        pool = self._pool(g)
        if pool.page_size != self._page_size:
            text = f"pages of {pool.page_size} keys, planned with {self._page_size}"
            raise ArgumentError("A103", text, where="paged_kv_cache", hint="page_size, kv_layout")
        kv = KV(self._table, pool)
        changed = {n: options.get(n) for n in ("sinks", "q_scale", "k_scale")}
        attn, tensors = _attention(planned | changed, self.device)
        out = options.get("out")
        if out is None and planned["o_data_type"] is not None:
            kind: Any = planned["o_data_type"]
            kind = getattr(torch, kind, kind) if isinstance(kind, str) else kind
            out = torch.empty(*g.q.shape[:2], kv.pool.head_dim_vo, dtype=kind, device=self.device)
        if self._planned is None:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise ArgumentError("A110", "a CUDA graph is captured", hint="use_cuda_graph=True")
            self._planned = attn.plan(self._rows, kv, q_dtype=float_view("q", g.q).dtype)
        state = attn.run(g.q, kv, self._planned, out=out, **tensors)
        if options.get("v_scale") is not None:
            state.o.mul_(g.v_scale)
        if not g.return_lse:
            return state.o
        lse = state.lse.div_(_LN_2)
        return state.o, lse if options.get("lse") is None else g.lse.copy_(lse)

    def _forward(self, g: SimpleNamespace) -> Any:
        """The old form of `run`, whose options replace those of the plan."""
        self._options |= {n: x for n, x in vars(g).items() if n in self._options}
        g.window_left = None
        return self._run(g)

    def _pool(self, g: SimpleNamespace) -> Pool:
        return _paged_pool(g.paged_kv_cache, self.kv_layout)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper, name="decode"):
    """Decode: one query a request, or `q_len_per_req`; keys in pages."""

    def _plan(self, g: SimpleNamespace) -> None:
        g.causal, g.head_dim_qk, g.head_dim_vo = g.q_len_per_req > 1, g.head_dim, None
        table = self._paged(g.indptr, g.indices, g.last_page_len, g.page_size)
        rows = torch.arange(table.requests + 1, dtype=torch.int32) * g.q_len_per_req
        self._plan_batch(g, table, rows, g.page_size)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper, name="prefill"):
    """Prefill and append: any number of queries a request, keys in pages."""

    def _plan(self, g: SimpleNamespace) -> None:
        arrays = (g.paged_kv_indptr, g.paged_kv_indices, g.paged_kv_last_page_len)
        self._plan_batch(g, self._paged(*arrays, g.page_size), g.qo_indptr, g.page_size)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper, name="ragged"):
    """Prefill over keys and values without pages, one request after the other."""

    def _plan(self, g: SimpleNamespace) -> None:
        self._plan_batch(g, Table.ragged(self._keep("kv_indptr", g.kv_indptr)), g.qo_indptr, 1)

    def _pool(self, g: SimpleNamespace) -> Pool:
        return Pool(*(x if self.kv_layout == "NHD" else x.transpose(0, 1) for x in (g.k, g.v)))


class MultiLevelCascadeAttentionWrapper:
    """Shared prefixes of any depth: a group of level i shares its keys, the last level has those of
    single requests, and only it is causal. One run a level, and a merge."""

    @accepts("cascade")
    def __init__(self, g: SimpleNamespace) -> None:
        if not isinstance(g.num_levels, int) or g.num_levels < 1:
            raise ArgumentError("A103", f"num_levels={g.num_levels!r}", where="num_levels")
        buffers = [v or [None] * g.num_levels for n, v in vars(g).items() if n.endswith("_arr")]
        shared = (g.float_workspace_buffer, g.kv_layout, g.use_cuda_graph)
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(*shared, *level)
            for level in zip(*buffers, strict=True)
        ]

    @accepts("cascade.plan")
    def plan(self, g: SimpleNamespace) -> None:
        """Plan each level. Refused: options that need positions across levels, which FlashInfer
        counts anew in each."""
        options, levels = vars(g), self._levels
        arrays = [options.pop(name) for name in list(options)[:4]]
        if any(len(a) != len(levels) for a in arrays):
            raise ArgumentError("A103", f"{[len(a) for a in arrays]} arrays, {len(levels)} levels")
        if len(levels) > 1 and (g.window_left >= 0 or g.pos_encoding_mode != "NONE"):
            text = "window_left and pos_encoding_mode need one level"
            raise ArgumentError("A101", text, where="window_left")
        options["head_dim_qk"] = options.pop("head_dim")
        for level, *parts in zip(levels, *arrays, strict=True):
            level.plan(*parts, **options | {"causal": g.causal and level is levels[-1]})

    def run(self, q: Tensor, paged_kv_cache: Any) -> Tensor:
        """o (tokens, heads, head_dim)."""
        states = [level.run(q, paged_kv_cache, return_lse=True) for level in self._levels]
        return merge_states(*(torch.stack(x, 1) for x in zip(*states, strict=True)))[0]

    begin_forward, forward = plan, run
    end_forward = reset_workspace_buffer = _Wrapper.end_forward


def _single(g: SimpleNamespace) -> Any:
    """o of the queries of one request, with return_lse also lse; both without a row for `q` of one
    query, (heads, head_dim)."""
    options, q = vars(g), g.q if g.q.ndim == 3 else g.q[None]
    backend = options.get("backend", "auto")
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(q, g.kv_layout, backend=backend)
    keys, heads = g.k.shape[:2] if g.kv_layout == "NHD" else g.k.shape[1::-1]
    rows, keys = (torch.tensor([0, n], dtype=torch.int32) for n in (len(q), keys))
    names = (*_OPTIONS, "custom_mask", "packed_custom_mask")
    shared = {n: options[n] for n in names if n in options}
    shared |= {"head_dim_vo": g.v.shape[-1], "o_data_type": options.get("o_dtype")}
    wrapper.plan(rows, keys, q.shape[1], heads, q.shape[2], **shared)
    scales = {n: options[n] for n in ("q_scale", "k_scale", "v_scale") if n in options}
    result = wrapper.run_return_lse(q, g.k, g.v, **scales)
    o, lse = result if g.q.ndim == 3 else (x[0] for x in result)
    return (o, lse) if g.return_lse else o


single_decode_with_kv_cache = accepts("single_decode")(_single)
single_prefill_with_kv_cache = accepts("single_prefill")(_single)


# ---------------------------------------------------------------------------- pages, states


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Returns the number of keys of each request, (batch,); 0 for a request without pages."""
    pages = kv_indptr.diff()
    return torch.where(pages > 0, (pages - 1) * page_size + kv_last_page_len, 0)


@accepts("positions")
def get_batch_indices_positions(g: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Request and position of each appended row (nnz,) int32, where its request then has `seq_lens`
    keys. Rows from append_indptr[-1] on have request −1, position 0."""
    row = torch.arange(g.nnz, dtype=torch.int32, device=g.append_indptr.device)
    request = torch.searchsorted(g.append_indptr, row, right=True) - 1
    inside = row < g.append_indptr[-1]
    position = (g.seq_lens - g.append_indptr[1:])[torch.where(inside, request, 0)] + row
    values = torch.where(inside, request, -1).int(), torch.where(inside, position, 0).int()
    outs = zip((g.batch_indices, g.positions), values, strict=True)
    first, second = (new if out is None else out.copy_(new) for out, new in outs)
    return first, second


@accepts("append")
def append_paged_kv_cache(g: SimpleNamespace) -> None:
    """Write rows of keys and values into the pages of their requests, in place.

    Row i goes to position positions[i] of request batch_indices[i]; a negative request is skipped.
    No host work on GPUs.
    """
    pool = _paged_pool(g.paged_kv_cache, g.kv_layout)
    pair = g.paged_kv_cache.unbind(1) if pool.arrays[1] is None else pool.arrays
    k, v = (x if g.kv_layout == "NHD" else x.transpose(1, 2) for x in pair)
    table = [g.kv_indptr, g.kv_indices]
    torch_ops.append(k, v, g.append_key, g.append_value, g.batch_indices, g.positions, table)


def _paged_pool(cache: Any, layout: str) -> Pool:
    """The pool of a cache; one without an axis of slots has pages of one key."""
    parts = cache if isinstance(cache, (tuple, list)) else (cache,)
    axis, short = -3 if layout == "NHD" else -2, 5 - len(parts)
    return Pool(*(x.unsqueeze(axis) if x.ndim == short else x for x in parts), layout=layout)


@accepts("merge_state")
def merge_state(g: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The state over the keys of both, (tokens, heads, head_dim) and (tokens, heads)."""
    return merge_states(torch.stack((g.v_a, g.v_b), 1), torch.stack((g.s_a, g.s_b), 1))


@accepts("merge_in_place")
def merge_state_in_place(g: SimpleNamespace) -> None:
    """Merge another state into (v, s), for the tokens where `mask` (tokens,) is true or absent."""
    for target, new in zip((g.v, g.s), merge_state(g.v, g.s, g.v_other, g.s_other), strict=True):
        rows = None if g.mask is None else g.mask.reshape(-1, *(1,) * (target.ndim - 1))
        target.copy_(new if rows is None else torch.where(rows, new, target))


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The state over the keys of all: `v` (tokens, states, heads, head_dim), `s` (tokens, states,
    heads)."""
    if v.ndim != 4 or s.shape != v.shape[:3]:
        raise ArgumentError("A103", f"v is {tuple(v.shape)}, s {tuple(s.shape)}", where="v")
    parts = zip(v.unbind(1), s.unbind(1), strict=True)
    merged = merge([State(o.contiguous(), lse * _LN_2) for o, lse in parts])
    return merged.o, merged.lse.div_(_LN_2)
