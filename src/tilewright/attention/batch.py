"""`Attention`: plan a batch, run it, or bind it to memory for a recorded step.

attn  = Attention(qo_heads=32, kv_heads=8, head_dim=128, variant=Causal())
kv    = KV(Table(kv_len, block_table), Pool(k_pages, v_pages))
plan  = attn.plan(qo_indptr, kv)
state = attn.run(q, kv, plan)            # state.o, state.lse
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention import checks, families, plan, reference, render
from tilewright.attention.arguments import check_kv, check_names, check_q, outputs, values_of
from tilewright.attention.families import Call, Family, Scratch, decode
from tilewright.attention.kv import KV
from tilewright.attention.merge import State
from tilewright.attention.plan import Plan, StepPlans
from tilewright.attention.report import Batch
from tilewright.attention.spec import Spec, param_values
from tilewright.attention.table import MAX_KEYS, Table, TableForm
from tilewright.attention.variant import Causal, traced_of
from tilewright.attention.workspace import MAX_LEVELS, Workspace
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime import cuda
from tilewright.runtime import pool as pools
from tilewright.runtime.arguments import check_overlaps
from tilewright.runtime.transfer import write
from tilewright.runtime.view import byte_span, ordinal_of, view
from tilewright.target import Target
from tilewright.target import target as parse_target
from tilewright.toolchain import compilers

MAX_HEAD_DIM = 256
MAX_GROUP = 64
MAX_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of `qo_heads` query heads over `kv_heads` key and value heads.

    `head_dim`: elements of a row of Q and K; `head_dim_vo`: of V and o (None: the same). `variant`
    is a value of a class under `@variant`; `sm_scale` multiplies the scores before it (None:
    head_dim^-1/2). Raises ArgumentError[A102, A103, A107].
    """

    qo_heads: int
    kv_heads: int
    head_dim: int
    variant: Any = Causal()  # noqa: RUF009 - a frozen value
    sm_scale: float | None = None
    head_dim_vo: Any = None

    def __post_init__(self) -> None:
        vo = self.head_dim if self.head_dim_vo is None else self.head_dim_vo
        sizes = {"qo_heads": self.qo_heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        for name, value in (sizes | {"head_dim_vo": vo}).items():
            most = MAX_HEAD_DIM if name.startswith("head_dim") else 2**31 - 1
            object.__setattr__(self, name, checks.check_count(name, value, most))
        if self.qo_heads % self.kv_heads or self.group > MAX_GROUP:
            text = f"{self.qo_heads} query heads cannot share {self.kv_heads} KV heads"
            hint = f"a multiple of kv_heads, at most {MAX_GROUP} times as many"
            raise ArgumentError("A103", text, where="qo_heads", hint=hint)
        sm_scale = self.sm_scale
        if sm_scale is not None and not (checks.is_number(sm_scale) and abs(sm_scale) <= MAX_SCALE):
            text = f"sm_scale={sm_scale!r} is no number that float32 holds"
            raise ArgumentError("A102", text, where="sm_scale")
        traced_of(self.variant)

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.qo_heads // self.kv_heads

    @property
    def scale(self) -> float:
        """What scores are multiplied by: `sm_scale`, or 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5 if self.sm_scale is None else float(self.sm_scale)

    # -- planning --------------------------------------------------------------------------------

    def plan(
        self, qo_indptr: Any, kv: KV | Table, *, q_dtype: Any = None, workers: int | None = None,
        invariant: bool | None = None, lengths: np.ndarray | None = None, **values: Any,
    ) -> Plan:  # fmt: skip
        """Divide a batch into balanced parts, for the family of kernels that will run it.

        `qo_indptr` (requests + 1): the rows of q of each request, whose last query has the position
        of its last key where the table says nothing else. `kv`: a KV, or its table where the pool
        is bfloat16 or float16 with aligned rows; a plan serves every layer. `q_dtype`: of q and o
        (None: that of the pool). `workers`: threads of the pool, or SMs of a GPU. `invariant`: the
        bits of a request's results depend on the request alone, not on `workers`, on threads or on
        the other requests. So they always do on a CPU; on a GPU (None: not there) it leaves out the
        family of few rows, and a long request is not divided to fill the GPU. `lengths`: keys of
        each node, integers, where the host knows them (None: copied from the table's device).
        `values`: scalars of the variant, which only sharpen the balance.
        Where qo_len > kv_len the first queries of a request have positions below 0: under a causal
        mask they see nothing (o = 0, lse = −inf). Raises ArgumentError (A101, A102, A103, A107,
        A109).
        """
        if not isinstance(kv, Table):
            check_kv(kv, self.kv_heads, self.head_dim, self.head_dim_vo)
        table, pool = (kv, None) if isinstance(kv, Table) else (kv.table, kv.pool)
        check_names(self.variant, values)
        indptr = checks.host_indptr("qo_indptr", qo_indptr, table.requests)
        if not isinstance(invariant, (bool, np.bool_, type(None))):
            raise ArgumentError("A107", f"invariant={invariant!r} is no bool", where="invariant")
        if lengths is not None:
            checks.integer_view("lengths", lengths, device="cpu", size=table.nodes)
            checks.check_range("lengths", np.asarray(lengths), 0, MAX_KEYS)
        lengths = kv.lengths() if lengths is None else np.asarray(lengths, np.int64)
        kind = dtypes.bfloat16 if pool is None else pool.dtype
        q = _query_dtype(q_dtype, kind)
        spec = _spec_of(self, (q, kind, q), table.form)
        rows = int((indptr[1:] - indptr[:-1]).max(initial=0)) * self.group
        family, reasons = families.choose(spec, rows, table.device, pool, bool(invariant))
        gpu = None if family.device == "cpu" else cuda.device(ordinal_of(table.device))
        if workers is None:
            workers = gpu.sms if gpu else pools.wanted_threads()
        workers = checks.check_count("workers", workers, plan.MAX_WORKERS)
        size = (spec.head_dim + spec.head_dim_vo) * spec.kv.itemsize
        batch = Batch(lengths, size, reasons, gpu.name if gpu else "")
        block = 1
        if table.form.shared and gpu:
            block = decode.shared_block(spec, pool, gpu.arch, int(indptr[-1]))
        known = tuple((n, v) for n, v in values.items() if checks.is_number(v))
        shape = _shape_of(self, family, family.qo_tile(spec), known, block, family.few(spec))
        if invariant:
            shape = replace(shape, splits="request" if shape.splits else "", few=0)
        result = plan.make(indptr, lengths, shape, workers, table.tree(lengths), batch)
        if gpu is not None:
            result.on_device(ordinal_of(table.device))
        return result

    def step_plans(self, kv: KV, rows: int, invariant: bool = False) -> StepPlans:
        """Plans whose work the host writes, for recorded steps of up to `rows` rows over caches as
        `kv`; on a GPU they divide keys, if not `invariant`. Raises ArgumentError[A103, A107]."""
        check_kv(kv, self.kv_heads, self.head_dim, self.head_dim_vo)
        checks.check_count("rows", rows)
        spec, device = _spec_of(self, (kv.pool.dtype,) * 3, kv.table.form), kv.table.device
        family, _ = families.choose(spec, decode.ROWS + 1, device, kv.pool)
        gpu = -1 if device == "cpu" else ordinal_of(device)
        workers = 1 if gpu < 0 else cuda.device(gpu).sms
        splits = "" if gpu < 0 or invariant else family.splits
        shape = replace(_shape_of(self, family, family.qo_tile(spec), ()), splits=splits)
        return StepPlans(shape, kv.table.requests, rows, workers, gpu)

    def reserve(
        self, max_requests: int, *, max_tokens: int | None = None, device: str = "cuda",
        workers: int | None = None, shared: int = 0, kv: KV | None = None,
    ) -> Workspace:  # fmt: skip
        """Memory and a planner on a GPU for decode steps whose addresses never change: what a CUDA
        graph records.

        `max_requests`: of a batch; `max_tokens`: rows of q, None where each request has one query.
        `workers`: SMs to use (None: all). `shared`: the levels of shared keys that its tables have.
        `kv`: a cache like those of the steps, with q of its dtype: its kernels are loaded now
        instead of at the first call, which a capture would not survive.
        Raises ArgumentError[A103, A105, A107], BuildError.
        """
        if kv is not None:
            check_kv(kv, self.kv_heads, self.head_dim, self.head_dim_vo)
        checks.check_count("shared", shared, MAX_LEVELS, 0)
        form, pool = (kv.table.form, kv.pool) if kv else (TableForm(shared=shared), None)
        if form.shared != shared:
            text = f"shared={shared}, and kv has {form.shared} levels of shared keys"
            raise ArgumentError("A103", text, where="shared", hint="the levels that kv has")
        spec = _spec_of(self, (pool.dtype if pool else dtypes.bfloat16,) * 3, form)
        if self.group > decode.ROWS:
            text = f"{self.group} query heads share a KV head, more than {decode.ROWS}"
            raise ArgumentError("A103", text, where="qo_heads", hint="attn.plan")
        if reason := decode.refuses(spec, 0, pool):
            text = f"the decode kernels of a workspace cannot run this: {reason}"
            raise ArgumentError("A103", text, where="kv" if kv else "variant", hint="attn.plan")
        room = Workspace(spec, self.kv_heads, pool, max_requests, max_tokens, device, workers)
        shape = _shape_of(self, families.by_name(room.family), room.qo_tile, ())
        room.most_tiles = shape.most_tiles
        if kv is not None:
            room.load(spec, kv.pool.page_size)
        return room

    def resolve(
        self, kv: KV, *, qo_len: int = 1, q_dtype: Any = None, target: Target | str | None = None
    ) -> "Resolution":
        """Lists the kernel families of a machine, each with what keeps it from running calls of at
        most `qo_len` queries a request. `q_dtype`: of q and o (None: kv's). `target`: the machine,
        "cuda:sm_90a" also where there is no GPU (None: the one that has kv). Touches no array.
        Raises ArgumentError[A102, A103, A107], BuildError[B102, B103]."""
        check_kv(kv, self.kv_heads, self.head_dim, self.head_dim_vo)
        qo_len = checks.check_count("qo_len", qo_len, least=0)
        q = _query_dtype(q_dtype, kv.pool.dtype)
        spec = _spec_of(self, (q, kv.pool.dtype, q), kv.table.form)
        machine = parse_target(kv.pool.device.partition(":")[0] if target is None else target)
        device, rows = "cuda" if machine.is_cuda else "cpu", qo_len * self.group
        return Resolution(families.reasons(spec, rows, device, kv.pool, machine.arch))

    # -- running ---------------------------------------------------------------------------------

    def run(
        self, q: Any, kv: KV, plan: Plan | Workspace, *, out: Any = None, **values: Any
    ) -> State:
        """The state of queries `q` (tokens, qo_heads, head_dim), float32, float16 or bfloat16.

        `out`: an array to write o to, of q's dtype or float32 (None: a new one of q's dtype);
        `values`: the variant's scalars and tensors.
        Keys and values that no query of a work item sees never matter, NaN and Inf included: those
        behind a length, outside a window, of a freed page. The kernels of float32 and of CPUs keep
        this for each query, the decode family for the rows of a request together.
        Raises ArgumentError (A101 … A110) before anything is written; A110: a CUDA graph is being
        captured, and the plan is not a workspace.
        """
        bound = self.bind(q, kv, out, plan=plan, **values)
        bound()
        return bound.state

    def bind(
        self, q: Any, kv: KV, out: Any = None, *, plan: Plan | Workspace,
        scratch: Scratch | None = None, **values: Any,
    ) -> "BoundAttention":  # fmt: skip
        """A run with its memory fixed, for a recorded step: `.launch` is its launch, in
        front of which another runs where requests share keys.

        The arrays of the table are read at every run, so lengths may grow in place. `scratch`:
        memory of partial results that it shares with others of a step, or of steps that do not run
        at once (None: its own). Raises what `run` raises.
        """
        check_kv(kv, self.kv_heads, self.head_dim, self.head_dim_vo)
        if scratch is not None and not isinstance(scratch, Scratch):
            raise ArgumentError("A107", f"{type(scratch).__name__} is no Scratch", where="scratch")
        if scratch is not None and isinstance(plan, Workspace):
            text = "a workspace has memory of its own for partial results"
            raise ArgumentError("A101", text, where="scratch", hint="scratch= goes with a Plan")
        if not isinstance(plan, (Plan, Workspace)):
            hint, text = "attn.plan(qo_indptr, kv)", f"{type(plan).__name__} is no Plan"
            raise ArgumentError("A107", text, where="plan", hint=hint)
        device = kv.pool.device
        queries = check_q(q, kv, (plan.tokens, self.qo_heads, self.head_dim))
        o, lse = outputs(q, queries, kv, out, traced_of(self.variant).softmax is not False)
        written = tuple(view(x) for x in (o, lse) if x is not None)
        spec = _spec_of(self, (queries.dtype, kv.pool.dtype, written[0].dtype), kv.table.form)
        family = self._family(plan, kv, spec)
        if isinstance(plan, Plan) and device != "cpu" and cuda.is_capturing(ordinal_of(device)):
            text = "a CUDA graph is being captured: the memory of this call would not outlive it"
            hint = "room = attn.reserve(…); in the graph room.plan(table), attn.run(q, kv, room)"
            raise ArgumentError("A110", text, where="plan", hint=hint)
        sizes = {"qo_head": self.qo_heads, "kv_head": self.kv_heads}
        sizes |= {"request": kv.table.requests, "q_token": plan.tokens}
        arrays = values_of(self.variant, values, sizes, device)
        seen = {name: of for name, (_, of) in arrays.items()}
        own = ("q", queries), ("k", kv.pool.k), ("v", kv.pool.v)
        read = [(n, *byte_span(x)) for n, x in (*own, *kv.table.views.items(), *seen.items())]
        check_overlaps([("out", *byte_span(written[0]))], read)
        numbers = param_values(queries, kv.pool, kv.table, written, self.scale)
        numbers |= render.param_values(spec.traced, seen)
        call = Call(spec, kv.pool, numbers, plan, q, scratch or Scratch())
        if device == "cpu" and not compilers.has_compiler():
            return self._interpreted(q, kv, plan, State(o, lse), arrays)
        prepared = family.prepare(call)
        writes = [byte_span(x) for x in (*written, *map(view, call.scratch.arrays))]
        if isinstance(plan, Workspace):
            writes += [(a, a + 1) for a in plan.params().values() if a]
        boxes = tuple((low, high) for _, low, high in read), tuple(writes)
        keep = (queries, kv, plan, arrays, family, call)
        return BoundAttention(State(o, lse), prepared, keep, boxes)

    def _family(self, plan: Plan | Workspace, kv: KV, spec: Spec) -> Family:
        """The family that a plan is for, if it can run this call. Raises ArgumentError."""
        family = families.by_name(plan.family)
        wanted = (plan.requests, plan.kv_heads, plan.qo_tile, family.device, plan.tree)
        tree = (spec.table.shared, kv.table.nodes, self.group)
        device = kv.pool.device.partition(":")[0]
        actual = (kv.table.requests, self.kv_heads, family.qo_tile(spec), device, tree)
        if wanted != actual:
            words = "requests, kv_heads, queries of an item, device, shared levels, nodes and group"
            text = f"the plan is for {wanted}, not {actual} ({words})"
            raise ArgumentError("A103", text, where="plan")
        if isinstance(plan, Workspace):
            room, own = (plan.head_dim, plan.ordinal), (self.head_dim, ordinal_of(kv.pool.device))
            if room != own:
                text = f"the workspace is for {room}, not {own} (head_dim, number of the GPU)"
                raise ArgumentError("A103", text, where="plan", hint="attn.reserve(…, device=…)")
        else:
            walks = bool(plan.tree[0] and len(plan.items)) and not family.splits
            if (bool(len(plan.cuts)), plan.walks) != (bool(family.ctas_per_sm), walks):
                text = f"the plan is damaged: its work is not for {family.name}"
                raise ArgumentError("A109", text, where="plan")
            if plan.tree[0] and device == "cpu":  # contents on a GPU are not looked at
                nodes = kv.table.tree(kv.lengths())
                if any((plan.nodes[n] != nodes[n]).any() for n in ("begin", "end", "base")):
                    text = "the plan is for other shared keys, or other lengths of them"
                    raise ArgumentError("A103", text, where="plan", hint="plan again")
        reason = family.reason(spec, plan.longest * self.group, kv.pool)
        if reason:
            text = f"the plan is for the {family.name} kernels, which cannot run this: {reason}"
            hint = "plan with the cache and the queries: attn.plan(qo_indptr, kv, q_dtype=q.dtype)"
            raise ArgumentError("A103", text, where="plan", hint=hint)
        return family

    def _interpreted(
        self, q: Any, kv: KV, plan: Any, state: State, arrays: dict[str, Any]
    ) -> "BoundAttention":
        """Runs the attention in NumPy where no compiler is installed."""
        compilers.warn_of_interpreter()
        arguments = {name: array for name, (array, _) in arrays.items()}

        def run() -> None:
            result = reference.attention(
                q, kv, plan.qo_indptr, self.variant, sm_scale=self.scale, **arguments
            )
            write(state.o, result.o)
            if state.lse is not None:
                write(state.lse, result.lse)

        return BoundAttention(state, families.Prepared(None, run, "", ()), (q, kv, plan))


class BoundAttention:
    """A run with its memory fixed; calling it runs it and returns the state.

    `launch` is the launch for a recorded step: on the CPU a `runtime.pool.Launch`, on a GPU a
    `runtime.cuda.Launch`, None where attention is evaluated with NumPy (no C++ compiler). `boxes`:
    the ranges of addresses that it reads, and those that it writes. `part`: on a GPU, what a step
    may put beside others. Keep this object as long as the step.
    """

    __slots__ = ("_keep", "_prepared", "boxes", "launch", "part", "source", "state")

    def __init__(
        self, state: State, prepared: families.Prepared, keep: tuple[Any, ...], boxes: Any = None
    ) -> None:
        self.state, self._prepared, self._keep, self.boxes = state, prepared, keep, boxes
        self.launch, self.part, self.source = prepared.launch, prepared.part, prepared.source

    def __call__(self) -> State:
        self._prepared.run()
        return self.state

    def __repr__(self) -> str:
        return f"<bound attention, {self._keep[2]!r}>"


@dataclass(frozen=True, slots=True)
class Resolution:
    """The families of a device in the order of preference, each with a reason against it or ""."""

    families: tuple[tuple[str, str], ...]

    @property
    def chosen(self) -> str:
        """The name of the family that runs the calls."""
        return next(name for name, reason in self.families if not reason)

    def __str__(self) -> str:
        chosen, width = self.chosen, max(len(name) for name, _ in self.families)
        answers = ((n, why or ("runs" if n == chosen else "can run")) for n, why in self.families)
        return "\n".join(f"{name:{width}}  {answer}" for name, answer in answers)


@functools.lru_cache(512)
def _spec_of(attn: Attention, kinds: tuple[DType, DType, DType], table: TableForm) -> Spec:
    """One object for each spec: kernels are looked up by it at every call."""
    traced, ascending = traced_of(attn.variant), attn.scale > 0
    return Spec(attn.group, attn.head_dim, attn.head_dim_vo, *kinds, traced, table, ascending)


@functools.lru_cache(512)
def _shape_of(
    attn: Attention, family: Family, qo_tile: int, values: tuple[Any, ...], *rows: int
) -> plan.Shape:
    """What a planner must know, with the scalars that are fixed or among `values`; `rows`: the last
    two of `Shape`."""
    known = {n: v for n, v in (*attn.variant.fixed, *values) if checks.is_number(v)}
    ctas = family.ctas_per_sm(attn.head_dim) if family.ctas_per_sm else 0
    return plan.Shape(
        family.name, attn.kv_heads, attn.group, traced_of(attn.variant).mask, known, qo_tile,
        family.splits, ctas, family.order, *rows,
    )  # fmt: skip


def _query_dtype(q_dtype: Any, kv: DType) -> DType:
    """The dtype of q and o, by default that of the cache. Raises ArgumentError[A102]."""
    kind = kv if q_dtype is None else dtypes.dtype(q_dtype)
    if kind not in checks.FLOATS:
        raise ArgumentError("A102", f"q_dtype={kind}", where="q_dtype", hint="float32 or 16 bits")
    return kind
