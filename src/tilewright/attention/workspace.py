"""Workspaces: memory and a planner on a GPU for decode steps that a CUDA graph records.

room = attn.reserve(max_requests=256)
with a graph being captured:
    room.plan(table)                  # one kernel: reads the lengths where they are
    attn.run(q, kv, room)             # every layer

A replay plans again from the lengths that are then in memory. Nothing is allocated, copied or
waited for, and no address moves.
"""

import functools
from typing import Any

from tilewright import dtypes
from tilewright.attention import planner, ranges
from tilewright.attention.checks import check_count, integer_view
from tilewright.attention.families import decode, hopper
from tilewright.attention.plan import MAX_WORKERS
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec, alone, loaded, partial_params
from tilewright.attention.table import MAX_KEYS, NODE, Table, TableForm
from tilewright.errors import ArgumentError
from tilewright.runtime import cuda
from tilewright.runtime.transfer import ordinal_in
from tilewright.runtime.view import View, view

MAX_LEVELS = 16
_SMEM_OF_A_CTA = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_STATIC_SMEM = 1024  # more than the planner has
MAX_REQUESTS = 16_384


class Workspace:
    """What decode steps of up to `max_requests` requests need on a GPU; see `Attention.reserve`.

    `ctas`: of the attention kernels; `requests` and `tokens`: of the batch that was planned last;
    `nbytes`: of the GPU's memory. One workspace serves several graphs, one after the other, not at
    once.
    """

    family = "decode"

    def __init__(
        self, spec: Spec, kv_heads: int, pool: Pool | None, max_requests: int,
        max_tokens: int | None, device: str, workers: int | None,
    ) -> None:  # fmt: skip
        """`pool`: one like those of the steps, None where that is not known. Raises
        ArgumentError[A103, A105], BuildError."""
        ordinal = ordinal_in(str(device))
        if ordinal is None:
            hint = "cuda or cuda:N; on a CPU plan each batch with attn.plan"
            raise ArgumentError("A105", "a workspace on a CPU", where="device", hint=hint)
        check_count("max_requests", max_requests, MAX_REQUESTS)
        if max_tokens is not None:
            check_count("max_tokens", max_tokens)
        if workers is not None:
            check_count("workers", workers, MAX_WORKERS)
        self.ordinal, self.kv_heads = ordinal, kv_heads
        self.group, self.head_dim = spec.group, spec.head_dim
        self.max_requests, self.max_tokens, shared = max_requests, max_tokens, spec.table.shared
        self.longest = decode.ROWS // self.group if max_tokens else 1
        self.qo_tile = max(1, decode.ROWS // self.group)
        self.shared, self.max_nodes = shared, max_requests * (shared + 1)
        self._block = ranges.head_block(self.kv_heads)
        gpu = cuda.device(self.ordinal)
        sms = gpu.sms if workers is None else workers
        tokens = max_tokens or max_requests
        self.block = decode.shared_block(spec, pool, gpu.arch, tokens) if shared else 1
        self.front = ranges.of_front(self.block, self.group, sms)
        blocks = decode.blocks_of(self.longest * self.group)
        self.limit = max(decode.ctas_per_sm(self.head_dim) * sms // self._block, 1)
        most = gpu.attribute(_SMEM_OF_A_CTA) - _STATIC_SMEM
        if planner.smem_bytes(self.max_nodes, self.limit) > most:
            text = f"a planner of {self.max_nodes} nodes has {most} bytes of shared memory"
            hint = f"at most {(most // 8 - self.limit - 2) // (shared + 1)} requests"
            raise ArgumentError("A103", f"{text} on {gpu.name}", where="max_requests", hint=hint)
        self.ctas = self.limit * self._block
        self.requests, self.tokens, self.nodes = 0, 0, 0
        self.most_tiles = 2**31  # of a request that its variant can see; for balance alone

        def words(kind: str, count: int) -> Any:
            return cuda.DeviceArray((count,), kind, self.ordinal)

        chunks = self.block * self.front // self.kv_heads + 1  # that fill the CTAs
        rows = (shared * tokens + chunks) * self.kv_heads * self.group * bool(shared)
        self._slots, states = decode.partial_floats(self.head_dim, blocks, self.ctas, rows)
        self._cuts = words("int32", (self.limit + 1) * (ranges.CUT.size // 4))
        self._partials = words("float32", self._slots + states)
        self._counters = words("int32", self.ctas + 1)
        self._indptr = words("int32", max_requests + 1 if max_tokens else 0)
        self._nodes = words("int32", NODE.size // 4 * self.max_nodes if shared else 0)
        self._status = cuda.HostWords(self.ordinal)
        for array in (self._cuts, self._counters):
            cuda.clear(view(array))
        cuda.synchronize(cuda.current_stream(self.ordinal), self.ordinal)

    @property
    def tree(self) -> tuple[int, int, int]:
        """As of a Plan: what was planned last."""
        return self.shared, self.nodes, self.group

    @property
    def nbytes(self) -> int:
        """Bytes of its memory on the GPU."""
        arrays = (self._cuts, self._partials, self._counters, self._indptr, self._nodes)
        return sum(a.nbytes for a in arrays)

    def load(self, spec: Spec, page_size: int) -> None:
        """Load the kernels of a spec, so that no capture has to. Raises BuildError."""
        self._planner(spec.table)
        body = functools.partial(decode.body, spec, self._block, block=self.block)
        kind = decode.BEHIND if self.shared else decode.ALONE
        bodies = [body(decode.blocks_of(self.longest * self.group), kind)]
        if self.block * self.group > decode.ROWS:
            bodies.append(hopper.body(spec, hopper.box_keys(spec, page_size), True))
        if self.shared:  # also what is in front where the Hopper kernel refuses a call
            bodies.append(body(decode.blocks_of(decode.ROWS), decode.FRONT))
        for one in bodies:
            loaded(alone(one), self.ordinal)

    def _planner(self, form: TableForm) -> cuda.Function:
        text = alone(planner.body(form.for_planner(), self.group, self.block), "plan_cuts")
        return loaded(text, self.ordinal, "plan_cuts", "planner")

    def check(self) -> None:
        """Refuse what a plan on the GPU has found wrong since the last look, also one that a graph
        replayed: that batch was attended to by no query. It does not wait for the GPU: synchronise
        first to be sure of a replay. Raises ArgumentError[A109]."""
        wrong = self._status.take()
        if wrong == 1:
            text = f"to at most {self.max_tokens}, with at most {self.qo_tile} queries a request"
            text = f"the qo_indptr of an earlier plan did not rise from 0 {text}"
            raise ArgumentError("A109", text, where="qo_indptr")
        if wrong:
            text = "the shared levels of an earlier plan did not each divide the level before"
            text = f"{text}, or a request had more than {MAX_KEYS} keys in all"
            raise ArgumentError("A109", text, where="shared")

    def plan(self, table: Table, qo_indptr: Any = None, *, tokens: int | None = None) -> None:
        """Plan a batch on the GPU, in the order of its current stream: from the lengths that are in
        memory when the kernel runs.

        `qo_indptr` (requests + 1) int32 on the GPU: the rows of q of each request, at most 16 with
        the query heads of a KV head; None where the workspace is of one query each. `tokens`: the
        rows that q will have, at most `max_tokens` (None: as many). Raises ArgumentError (A101 …
        A109), and what `check` raises of an earlier plan.
        """
        self.bind(table, qo_indptr, tokens).run(cuda.current_stream(self.ordinal))

    def bind(self, table: Table, qo_indptr: Any = None, tokens: int | None = None) -> cuda.Launch:
        """The launch of `plan`, for a recorded step in which attention is bound behind it. Keep the
        arrays of the table as long. Raises what `plan` raises."""
        self.check()
        queries = self._check(table, qo_indptr)
        most = self.max_tokens or table.requests
        rows = most if tokens is None else check_count("tokens", tokens, most, 0)
        form, of_table = table.form, table.params()
        levels = {f"shared_{n}": 0 for n in range(max(form.shared, 1))} | {"count_0": 0}
        for n in range(form.shared):
            seen = table.views[f"shared_{n}"]
            levels |= {f"shared_{n}": seen.pointer, f"count_{n}": seen.size - 1}
        params = planner.params_struct(form.for_planner()).pack(
            kv_len=of_table["kv_len"], table_indptr=of_table["table_indptr"], **levels,
            qo_from=queries.pointer if queries else 0, qo_indptr=self._indptr.pointer,
            cuts=self._cuts.pointer, nodes=self._nodes.pointer, status=self._status.pointer,
            limit=self.limit, most_tiles=self.most_tiles, requests=table.requests,
            node_count=table.nodes, head_blocks=self.kv_heads // self._block, max_tokens=rows,
            kv_heads=self.kv_heads, front=self.front,
        )  # fmt: skip
        smem = planner.smem_bytes(table.nodes, self.limit)
        block = (planner.THREADS, 1, 1)
        self.requests, self.tokens, self.nodes = table.requests, rows, table.nodes
        return self._planner(form).prepare((1, 1, 1), block, smem, params, overlaps=True)

    def _check(self, table: Table, qo_indptr: Any) -> View | None:
        if not isinstance(table, Table):
            raise ArgumentError("A107", f"{type(table).__name__} is no Table", where="table")
        if table.device != f"cuda:{self.ordinal}":
            text = f"the table is on {table.device}, not cuda:{self.ordinal}"
            raise ArgumentError("A105", text, where="table")
        if table.requests > self.max_requests:
            text = f"{table.requests} requests, reserved for {self.max_requests}"
            raise ArgumentError("A103", text, where="table", hint="attn.reserve(max_requests=…)")
        wanted, own = (table.form.shared, table.nodes), (self.shared, self.max_nodes)
        if wanted[0] != own[0] or wanted[1] > own[1]:
            text = f"(levels of shared keys, nodes) are {wanted}, reserved for {own}"
            hint = "attn.reserve(…, shared=levels)"
            raise ArgumentError("A103", text, where="table", hint=hint)
        if (qo_indptr is None) != (self.max_tokens is None):
            text = "qo_indptr goes with max_tokens"
            hint = "attn.reserve(…, max_tokens=…) for more than one query a request"
            raise ArgumentError("A101", text, where="qo_indptr", hint=hint)
        if qo_indptr is None:
            return None
        size, kinds = table.requests + 1, (dtypes.int32,)
        return integer_view("qo_indptr", qo_indptr, 1, kinds, table.device, size)

    def params(self) -> dict[str, int]:
        """The parameters of an attention kernel that a plan decides."""
        memory = (self._partials.pointer, self._slots, self._counters.pointer, self.ctas)
        indptr = self._indptr.pointer if self.max_tokens else 0
        nodes = {"nodes": self._nodes.pointer} if self.shared else {}
        return {"qo_indptr": indptr, "cuts": self._cuts.pointer} | nodes | partial_params(*memory)

    def __repr__(self) -> str:
        return (
            f"Workspace(cuda:{self.ordinal}, {self.max_requests} requests, {self.ctas} CTAs, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )
