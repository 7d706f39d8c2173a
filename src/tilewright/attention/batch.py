"""`Attention`: plan a batch, run it, or bind it to memory for a recorded step.

attn  = Attention(qo_heads=32, kv_heads=8, head_dim=128, variant=Causal())
plan  = attn.plan(qo_indptr, kv)
state = attn.run(q, kv, plan)            # state.o, state.lse
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention import decode, flash, hopper, plan, ranges, reference
from tilewright.attention.kv import KV, KV_TYPES, named_view, rises
from tilewright.attention.merge import State
from tilewright.attention.plan import UNITS, Plan
from tilewright.attention.variant import Causal, Traced, Value, check_number, traced_of
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime import pool as pools
from tilewright.runtime.transfer import to_device, to_host
from tilewright.runtime.view import View, allocate, overlaps
from tilewright.toolchain import compilers

MAX_HEAD_DIM = 256
MAX_GROUP = 64
MAX_WORKERS = 1 << 16
MAX_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of `qo_heads` query heads over `kv_heads` key and value heads of `head_dim`.

    `variant` is a value of a class under `@variant`; `sm_scale` multiplies the scores before it
    (None: head_dim^-1/2). Raises ArgumentError[A102, A103, A107].
    """

    qo_heads: int
    kv_heads: int
    head_dim: int
    variant: Any = Causal()  # noqa: RUF009 - a frozen value
    sm_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("qo_heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ArgumentError("A103", f"{name}={value!r} is no positive integer", where=name)
            object.__setattr__(self, name, int(value))
        if self.qo_heads % self.kv_heads or self.group > MAX_GROUP:
            raise ArgumentError(
                "A103",
                f"{self.qo_heads} query heads cannot share {self.kv_heads} KV heads",
                where="qo_heads",
                hint=f"a multiple of kv_heads, at most {MAX_GROUP} times as many",
            )
        if self.head_dim > MAX_HEAD_DIM:
            raise ArgumentError(
                "A103", f"head_dim {self.head_dim} is above {MAX_HEAD_DIM}", where="head_dim"
            )
        sm_scale = self.sm_scale
        if sm_scale is not None and not (_is_number(sm_scale) and abs(sm_scale) <= MAX_SCALE):
            raise ArgumentError(
                "A102", f"sm_scale={sm_scale!r} is no number that float32 holds", where="sm_scale"
            )
        traced_of(self.variant)

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.qo_heads // self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.sm_scale is None else float(self.sm_scale)

    # -- planning --------------------------------------------------------------------------------

    def plan(self, qo_indptr: Any, kv: KV, *, workers: int | None = None, **values: Any) -> Plan:
        """Cut a batch into balanced work items.

        `qo_indptr` (requests + 1) int32: the rows of q of each request, whose last query has the
        position of its last key. `workers`: threads of the pool, or SMs of a GPU. `values`: scalars
        of the variant, which only sharpen the balance.
        Where qo_len > kv_len the first queries of a request stand before position 0: under a
        causal mask they see nothing (o = 0, lse = −inf).
        On a CPU the bits of a request's results depend on the request alone, not on `workers`, on
        threads or on the other requests.
        Raises ArgumentError (A101, A102, A103, A109).
        """
        self._check_kv(kv)
        self._check_names(values)
        indptr = _checked_indptr(qo_indptr, kv)
        return self._plan(indptr, kv.lengths(), kv, workers, values)

    def _plan(
        self,
        indptr: np.ndarray,
        lengths: np.ndarray,
        kv: KV,
        workers: int | None,
        values: dict[str, Any],
    ) -> Plan:
        on_cuda = kv.device != "cpu"
        spec = self._spec(kv.dtype, kv.dtype)
        known = {n: v for n, v in (dict(self.variant.fixed) | values).items() if _is_number(v)}
        shape = plan.Shape(
            self.kv_heads, self.group, spec.traced.mask, known, spec.qo_tile(on_cuda), not on_cuda
        )
        if workers is None:
            workers = _ctas(kv.device) if on_cuda else pools.wanted_threads()
        if not _is_integer(workers) or not 1 <= workers <= MAX_WORKERS:
            raise ArgumentError(
                "A103", f"workers={workers!r} is no integer of 1..{MAX_WORKERS}", where="workers"
            )
        return plan.make(indptr, lengths, shape, int(workers), UNITS[on_cuda])

    # -- running ---------------------------------------------------------------------------------

    def run(self, q: Any, kv: KV, plan: Plan, *, out: Any = None, **values: Any) -> State:
        """The state of queries `q` (tokens, qo_heads, head_dim), float32, float16 or bfloat16.

        `out`: a float32 array to write o to; `values`: the variant's scalars and per-head arrays.
        Keys and values that no query of a work item sees never matter, NaN and Inf included: those
        behind a length, outside a window, of a freed page. The kernels of float32 and of CPUs keep
        this for each query, the decode family for the rows of a request together.
        Raises ArgumentError (A101 … A109) before anything is written.
        """
        _check_is_plan(plan)
        bound = self.bind(q, kv, out, plan=plan, **values)
        bound()
        return bound.state

    def bind(
        self, q: Any, kv: KV, out: Any = None, *, plan: Plan | None = None, **values: Any
    ) -> BoundAttention:
        """A run with its memory fixed, for a recorded step: `.launch` is its one launch.

        Without a plan: one query for each request (q has `requests` rows), cut for the longest
        keys that the pages can hold. `kv_indptr`, `kv_indices` and `last_page_len` are read at
        every run, so lengths may grow in place.
        """
        self._check_kv(kv)
        if plan is None:
            indptr = np.arange(kv.requests + 1, dtype=np.int32)
            plan = self._plan(indptr, kv.capacity(), kv, None, values)
        _check_is_plan(plan)
        queries = self._check_q(q, kv, plan)
        spec = self._spec(queries.dtype, kv.dtype)
        self._check_plan(plan, kv, spec)
        checked = self._values(spec.traced, values, kv.device)
        o, lse = self._outputs(q, queries, kv, out)
        return BoundAttention(self, spec, (q, queries), kv, plan, (o, lse), checked)

    def _spec(self, q: Any, kv: Any) -> flash.Spec:
        return flash.Spec(self.group, self.head_dim, q, kv, traced_of(self.variant))

    # -- checks ----------------------------------------------------------------------------------

    def _check_kv(self, kv: KV) -> None:
        if not isinstance(kv, KV):
            raise ArgumentError(
                "A107", f"{type(kv).__name__} is no KV", where="kv", hint="tw.KV.paged(…)"
            )
        if (kv.kv_heads, kv.head_dim) != (self.kv_heads, self.head_dim):
            raise ArgumentError(
                "A103",
                f"kv has {kv.kv_heads} heads × {kv.head_dim}, "
                f"the attention {self.kv_heads} × {self.head_dim}",
                where="kv",
                hint="k and v with heads before slots: k.transpose(0, 2, 1, 3), v.transpose(…)"
                if (kv.page_size, kv.head_dim) == (self.kv_heads, self.head_dim)
                else "",
            )

    def _check_q(self, q: Any, kv: KV, plan: Plan) -> View:
        view = named_view("q", q)
        if view.dtype not in KV_TYPES:
            kinds = ", ".join(map(str, KV_TYPES))
            raise ArgumentError("A102", f"q is {view.dtype}", where="q", hint=f"one of {kinds}")
        wanted = (plan.tokens, self.qo_heads, self.head_dim)
        if view.shape != wanted:
            raise ArgumentError(
                "A103",
                f"q has shape {view.shape}, the plan wants {wanted}",
                where="q",
                hint="(tokens, qo_heads, head_dim), tokens = qo_indptr[-1]",
            )
        if view.size and self.head_dim > 1 and view.strides[-1] != 1:
            raise ArgumentError("A104", "head_dim of q is not contiguous", where="q")
        if view.device != kv.device:
            raise ArgumentError("A105", f"q is on {view.device}, kv on {kv.device}", where="q")
        return view

    def _check_plan(self, plan: Plan, kv: KV, spec: flash.Spec) -> None:
        on_cuda = kv.device != "cpu"
        made_for = (plan.requests, plan.kv_heads, plan.qo_tile, plan.unit)
        here = (kv.requests, self.kv_heads, spec.qo_tile(on_cuda), UNITS[on_cuda])
        if made_for != here:
            words = "requests, kv_heads, queries of an item, workers"
            raise ArgumentError(
                "A103", f"the plan is for {made_for}, not {here} ({words})", where="plan"
            )

    def _values(
        self, traced: Traced, arguments: dict[str, Any], device: str
    ) -> dict[str, tuple[Any, View]]:
        self._check_names(arguments)
        fixed = dict(self.variant.fixed)
        views = {}
        for v in traced.values:
            if v.name not in arguments and v.name not in fixed:
                raise ArgumentError(
                    "A101", f"{traced.name} needs {v.name}", where=v.name, hint=f"{v.name}=…"
                )
            views[v.name] = self._value(v, arguments.get(v.name, fixed.get(v.name)), device)
        return views

    def _check_names(self, arguments: dict[str, Any]) -> None:
        """Each name is a value of the variant; numbers fit it. Raises ArgumentError."""
        traced = traced_of(self.variant)
        known = {v.name: v for v in traced.values}
        for name, value in arguments.items():
            if name not in known:
                raise ArgumentError(
                    "A101",
                    f"{traced.name} has no value {name!r}",
                    where=name,
                    hint=f"values: {', '.join(known) or 'none'}",
                )
            if not known[name].heads and (_is_number(value) or not hasattr(value, "shape")):
                check_number(known[name], value)

    def _value(self, v: Value, argument: Any, device: str) -> tuple[Any, View]:
        """The array that a kernel reads a value from: the caller's, or one made for a number."""
        if not v.heads and (_is_number(argument) or not hasattr(argument, "shape")):
            check_number(v, argument)
            argument = np.full(1, argument, v.dtype.numpy)
            argument = argument if device == "cpu" else to_device(argument, device)
        view = named_view(v.name, argument)
        if view.dtype != v.dtype:
            raise ArgumentError("A102", f"{v.name} is {view.dtype}, not {v.dtype}", where=v.name)
        size = {"": 1, "qo_head": self.qo_heads, "kv_head": self.kv_heads}[v.heads]
        if view.size != size or view.ndim > 1:
            count = f"one for each {v.heads}" if v.heads else "one number"
            raise ArgumentError(
                "A103", f"{v.name} has shape {view.shape}, not ({size},): {count}", where=v.name
            )
        if not view.is_contiguous:
            raise ArgumentError("A104", f"{v.name} is not contiguous", where=v.name)
        if view.device != device:
            raise ArgumentError(
                "A105", f"{v.name} is on {view.device}, kv on {device}", where=v.name
            )
        return argument, view

    def _outputs(self, q: Any, queries: View, kv: KV, out: Any) -> tuple[Any, Any]:
        shape = queries.shape
        lse = allocate(q, shape[:2], dtypes.float32)
        if out is None:
            return allocate(q, shape, dtypes.float32), lse
        view = named_view("out", out)
        if view.dtype not in (dtypes.float32, queries.dtype):
            raise ArgumentError(
                "A102", f"out is {view.dtype}, not float32 or {queries.dtype}", where="out"
            )
        if view.shape != shape or not view.is_contiguous:
            raise ArgumentError("A103", f"out is no contiguous array of shape {shape}", where="out")
        if view.device != kv.device or view.readonly:
            reason = "read-only" if view.readonly else f"on {view.device}"
            raise ArgumentError("A105", f"out is {reason}", where="out")
        for name, other in (("q", queries), ("k", kv.k), ("v", kv.v)):
            if overlaps(view, other):
                raise ArgumentError("A108", f"out overlaps {name}", where="out")
        return out, lse


class BoundAttention:
    """A run with its memory fixed; calling it runs it and returns the state.

    `launch` is the launch for a recorded step: on the CPU a `runtime.pool.Launch`, on a GPU a
    `runtime.cuda.Launch`, None where attention is evaluated with NumPy (no C++ compiler). Keep this
    object as long as the step.
    """

    __slots__ = ("_keep", "_run", "launch", "source", "state")
    launch: Any

    def __init__(
        self,
        attn: Attention,
        spec: flash.Spec,
        queries: tuple[Any, View],
        kv: KV,
        plan: Plan,
        outputs: tuple[Any, Any],
        values: dict[str, tuple[Any, View]],
    ) -> None:
        self.state = State(*outputs)
        views = {n: view for n, (_, view) in values.items()}
        fields = _fields(attn, queries[1], kv, self.state, views)
        self._keep: list[Any] = [queries, kv, plan, outputs, values]
        out = named_view("out", outputs[0]).dtype
        if kv.device != "cpu" and self._on_hopper(spec, plan, fields, kv, out):
            return
        if out != dtypes.float32:
            raise ArgumentError(
                "A102",
                f"out is {out}, and the kernel that runs this call writes float32",
                where="out",
            )
        if kv.device == "cpu" and not compilers.has_compiler():
            self._on_interpreter(attn, queries[0], kv, plan, values)
        elif kv.device == "cpu":
            self._on_cpu(spec, plan, fields)
        else:
            self._on_cuda(spec, plan, fields, kv)

    def _on_interpreter(
        self, attn: Attention, q: Any, kv: KV, plan: Plan, values: dict[str, tuple[Any, View]]
    ) -> None:
        compilers.warn_of_interpreter()
        arguments = {name: array for name, (array, _) in values.items()}
        o, lse = np.asarray(self.state.o), np.asarray(self.state.lse)
        self.source, self.launch = "", None

        def run() -> None:
            state = reference.attention(
                q, kv, plan.qo_indptr, attn.variant, sm_scale=attn.scale, **arguments
            )
            o[...], lse[...] = state.o, state.lse

        self._run = run

    def _on_cpu(self, spec: flash.Spec, plan: Plan, fields: dict[str, Any]) -> None:
        kernel = flash.cpu_kernel(spec, compilers.resolve_isa().name)
        rows = spec.group * plan.qo_tile
        lanes = compilers.resolve_isa().vector_bits // 32
        padded = -(-spec.head_dim // lanes) * lanes
        partials = np.empty(max(plan.slots * rows * (padded + 2), 1), np.float32)
        counters = np.zeros(max(plan.counters, 1), np.int32)
        block = kernel.params.pack(
            **fields,
            qo_indptr=plan.qo_indptr.ctypes.data,
            items=plan.items.ctypes.data,
            partials=partials.ctypes.data,
            counters=counters.ctypes.data,
        )
        self.source = kernel.source
        self.launch = (kernel.body, ctypes.addressof(block), len(plan.items), 1, False)
        array = pools.launch_array([self.launch])
        run, address = pools.pool().run, ctypes.addressof(array)
        self._keep += [kernel, partials, counters, block, array]
        self._run = lambda: run(address, 1)

    def _on_hopper(
        self, spec: flash.Spec, plan: Plan, fields: dict[str, Any], kv: KV, out: DType
    ) -> bool:
        """Bind to the Hopper family, if it runs this call and the decode family does not."""
        from tilewright.runtime import cuda

        ordinal = int(kv.device.partition(":")[2] or 0)
        few_rows = out == dtypes.float32 and not decode.hosts(spec, plan.qo_indptr, fields)
        if few_rows or hopper.hosts(spec, cuda.device_arch(ordinal), fields):
            return False
        launch, keep = hopper.bind(spec, fields, plan.qo_indptr, out, ordinal)
        self.launch, self.source = launch, hopper.source_of(spec, fields, out)
        self._keep += keep
        self._run = lambda: launch.run(cuda.current_stream(ordinal))
        return True

    def _on_cuda(self, spec: flash.Spec, plan: Plan, fields: dict[str, Any], kv: KV) -> None:
        from tilewright.runtime import cuda

        ordinal = int(kv.device.partition(":")[2] or 0)
        if not decode.hosts(spec, plan.qo_indptr, fields):
            self._on_tensor_cores(spec, plan, fields, ordinal)
            return
        items = cuda.DeviceArray.from_numpy(plan.items.view(np.int32), ordinal=ordinal)
        indptr = cuda.DeviceArray.from_numpy(plan.qo_indptr, ordinal=ordinal)
        strides = [fields[n] for n in ("k_page", "k_slot", "k_head")]
        addresses = [fields["k"], *(s * kv.dtype.itemsize for s in strides)]
        function = flash.cuda_kernel(spec, ordinal, all(a % 16 == 0 for a in addresses))
        block = flash.params_struct(spec).pack(
            **fields, qo_indptr=indptr.pointer, items=items.pointer, partials=0, counters=0
        )
        smem = flash.cuda_smem_bytes(spec)
        grid, threads = (len(plan.items), 1, 1), (flash.CUDA_THREADS, 1, 1)
        self.source = flash.cuda_source(spec)
        self.launch = function.prepare(grid, threads, smem, block)
        self._keep += [items, indptr, block]
        launch = self.launch
        self._run = lambda: launch.run(cuda.current_stream(ordinal))

    def _on_tensor_cores(
        self, spec: flash.Spec, plan: Plan, fields: dict[str, Any], ordinal: int
    ) -> None:
        from tilewright.runtime import cuda

        together = ranges.heads_at_once(plan.kv_heads)
        ctas = max(len(plan.cuts) - 1, 0) * together
        partials = cuda.DeviceArray((decode.partial_floats(spec, ctas),), "float32", ordinal)
        counters = cuda.DeviceArray((max(ctas, 1),), "int32", ordinal)
        counters.zero()
        cuts = cuda.DeviceArray.from_numpy(plan.cuts.view(np.int32), ordinal=ordinal)
        one_each = bool((np.diff(plan.qo_indptr) == 1).all())
        indptr = None if one_each else cuda.DeviceArray.from_numpy(plan.qo_indptr, ordinal=ordinal)
        function = decode.kernel(spec, together, ordinal)
        block = decode.params_struct(spec).pack(
            **fields, qo_indptr=indptr.pointer if indptr else 0, cuts=cuts.pointer,
            partials=partials.pointer, counters=counters.pointer, kv_heads=plan.kv_heads,
        )  # fmt: skip
        self.source = decode.source(spec, together)
        shape, threads = (max(ctas, 1), 1, 1), (decode.THREADS, 1, 1)
        self.launch = function.prepare(shape, threads, decode.smem_bytes(spec), block)
        self._keep += [partials, counters, cuts, indptr, block]
        launch = self.launch
        self._run = lambda: launch.run(cuda.current_stream(ordinal))

    def __call__(self) -> State:
        self._run()
        return self.state

    def __repr__(self) -> str:
        return f"<bound attention, {self._keep[2]!r}>"


def _fields(
    attn: Attention, q: View, kv: KV, state: State, values: dict[str, View]
) -> dict[str, Any]:
    """The parameters that both targets share."""
    numbers = {
        "q_token": q.strides[0], "q_head": q.strides[1],
        "k_page": kv.k.strides[0], "k_slot": kv.k.strides[1], "k_head": kv.k.strides[2],
        "v_page": kv.v.strides[0], "v_slot": kv.v.strides[1], "v_head": kv.v.strides[2],
        "pages": kv.k.shape[0], "listed": kv.listed, "page_size": max(kv.page_size, 1),
        "qo_heads": attn.qo_heads, "sm_scale": attn.scale,
    }  # fmt: skip
    addresses = {
        "q": q.pointer, "k": kv.k.pointer, "v": kv.v.pointer,
        "o": named_view("o", state.o).pointer, "lse": named_view("lse", state.lse).pointer,
        "kv_indptr": kv.indptr.pointer,
        "kv_indices": kv.indices.pointer if kv.indices else 0,
        "last_page_len": kv.last.pointer if kv.last else 0,
    }  # fmt: skip
    return numbers | addresses | {f"v_{n}": v.pointer for n, v in values.items()}


def _checked_indptr(qo_indptr: Any, kv: KV) -> np.ndarray:
    try:
        indptr = np.asarray(qo_indptr if isinstance(qo_indptr, list) else to_host(qo_indptr))
    except ValueError as error:  # lists of different lengths
        raise ArgumentError("A107", f"no array: {error}", where="qo_indptr") from None
    if indptr.dtype.kind not in "iu" or indptr.shape != (kv.requests + 1,):
        raise ArgumentError(
            "A103",
            f"qo_indptr is {indptr.dtype} of shape {indptr.shape}, kv has {kv.requests} requests",
            where="qo_indptr",
            hint="int32 of shape (requests + 1,)",
        )
    if indptr[0] != 0 or not rises(indptr) or int(indptr[-1]) >= 2**31:
        raise ArgumentError("A109", "qo_indptr must rise from 0", where="qo_indptr")
    return indptr.astype(np.int32)


def _check_is_plan(plan: Any) -> None:
    if not isinstance(plan, Plan):
        raise ArgumentError(
            "A107",
            f"{type(plan).__name__} is no Plan",
            where="plan",
            hint="attn.plan(qo_indptr, kv); only bind can do without",
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def _is_integer(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _ctas(device: str) -> int:
    from tilewright.runtime.cuda import device as device_of

    return device_of(int(device.partition(":")[2] or 0)).sms
