"""Workspaces: memory and a planner on a GPU for decode steps that a CUDA graph records.

room = attn.reserve(max_requests=256)
with a graph being captured:
    room.plan(table)                  # one kernel: reads the lengths where they are
    attn.run(q, kv, room)             # every layer

A replay plans again from the lengths that are then in memory. Nothing is allocated, copied or
waited for, and no address moves.
"""

from __future__ import annotations

from typing import Any

from tilewright import dtypes
from tilewright.attention import planner, ranges
from tilewright.attention.checks import check_count, integer_view
from tilewright.attention.families import decode
from tilewright.attention.plan import MAX_WORKERS
from tilewright.attention.ranges import CUT
from tilewright.attention.spec import loaded
from tilewright.attention.table import Table
from tilewright.errors import ArgumentError
from tilewright.runtime.view import View, view

MAX_REQUESTS = 16_384  # the planner keeps 8 bytes of each in shared memory


class Workspace:
    """What decode steps of up to `max_requests` requests need on a GPU; see `Attention.reserve`.

    `ctas`: of the attention kernels; `requests` and `tokens`: of the batch that was planned last;
    `nbytes`: of the GPU's memory. One workspace serves several graphs, one after the other, not at
    once.
    """

    family = "decode"

    def __init__(
        self,
        heads: tuple[int, int, int],
        max_requests: int,
        max_tokens: int | None,
        device: str,
        workers: int | None,
    ) -> None:
        """`heads`: KV heads, group, head_dim. Raises ArgumentError[A103, A105], BuildError."""
        kind, _, number = str(device).partition(":")
        if kind != "cuda" or (number and not number.isdecimal()):
            hint = "cuda or cuda:N; on a CPU plan each batch with attn.plan"
            raise ArgumentError("A105", f"a workspace on {device!r}", where="device", hint=hint)
        check_count("max_requests", max_requests, MAX_REQUESTS)
        if max_tokens is not None:
            check_count("max_tokens", max_tokens)
        if workers is not None:
            check_count("workers", workers, MAX_WORKERS)
        if heads[1] > decode.ROWS:
            text = f"{heads[1]} query heads share a KV head, more than {decode.ROWS}"
            hint = "plan each batch with attn.plan"
            raise ArgumentError("A103", text, where="qo_heads", hint=hint)
        from tilewright.runtime import cuda

        self.ordinal, self.kv_heads, self.group = int(number or 0), heads[0], heads[1]
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.longest = decode.ROWS // self.group if max_tokens else 1
        self.qo_tile = max(1, decode.ROWS // self.group)
        together = ranges.heads_at_once(self.kv_heads)
        sms = cuda.device(self.ordinal).sms if workers is None else workers
        blocks = decode.blocks_of(self.longest * self.group)
        self.limit = max(decode.CTAS_PER_SM * sms // together, 1)
        self.ctas = self.limit * together
        self.requests, self.tokens = 0, 0
        self.most_tiles = 2**31  # of a request that its variant can see; for balance alone

        def words(kind: str, count: int) -> Any:
            return cuda.DeviceArray((count,), kind, self.ordinal)

        self._cuts = words("int32", (self.limit + 1) * (CUT.size // 4))
        self._partials = words("float32", decode.partial_floats(heads[2], blocks, self.ctas))
        self._counters = words("int32", self.ctas)
        self._indptr = words("int32", max_requests + 1 if max_tokens else 0)
        self._status = cuda.HostWords(self.ordinal)
        for array in (self._cuts, self._counters):
            cuda.clear(view(array))
        cuda.synchronize(cuda.current_stream(self.ordinal), self.ordinal)

    @property
    def nbytes(self) -> int:
        arrays = (self._cuts, self._partials, self._counters, self._indptr)
        return sum(a.nbytes for a in arrays)

    def plan(self, table: Table, qo_indptr: Any = None, *, tokens: int | None = None) -> None:
        """Plan a batch on the GPU, in the order of its current stream: from the lengths that are in
        memory when the kernel runs.

        `qo_indptr` (requests + 1) int32 on the GPU: the rows of q of each request, at most 16 with
        the query heads of a KV head; None where the workspace is of one query each. `tokens`: the
        rows that q will have, at most `max_tokens` (None: as many). Raises ArgumentError (A101 …
        A109); A109 also where an earlier batch had an invalid `qo_indptr`: its rows were not
        written.
        """
        from tilewright.runtime import cuda

        if self._status.take():
            raise ArgumentError(
                "A109",
                "the qo_indptr of an earlier plan did not rise from 0 to at most "
                f"{self.max_tokens} with at most {decode.ROWS // self.group} queries a request",
                where="qo_indptr",
            )
        queries = self._check(table, qo_indptr)
        most = self.max_tokens or table.requests
        rows = most if tokens is None else check_count("tokens", tokens, most, 0)
        form = table.form
        params = planner.params_struct(form.kv_len, form.table_indptr).pack(
            kv_len=table.params()["kv_len"], table_indptr=table.params()["table_indptr"],
            qo_from=queries.pointer if queries else 0, qo_indptr=self._indptr.pointer,
            cuts=self._cuts.pointer, status=self._status.pointer, limit=self.limit,
            most_tiles=self.most_tiles,
            requests=table.requests, groups=self.kv_heads // ranges.heads_at_once(self.kv_heads),
            max_tokens=rows,
        )  # fmt: skip
        text = planner.cuda_source(form.for_planner(), self.group, decode.ROWS)
        function = loaded(text, self.ordinal, "plan_cuts", "planner")
        smem = planner.smem_bytes(table.requests, self.limit)
        stream = cuda.current_stream(self.ordinal)
        block = (planner.THREADS, 1, 1)
        function.prepare((1, 1, 1), block, smem, params, overlaps=True).run(stream)
        self.requests, self.tokens = table.requests, rows

    def _check(self, table: Table, qo_indptr: Any) -> View | None:
        if not isinstance(table, Table):
            raise ArgumentError("A107", f"{type(table).__name__} is no Table", where="table")
        if table.device != f"cuda:{self.ordinal}":
            text = f"the table is on {table.device}, not cuda:{self.ordinal}"
            raise ArgumentError("A105", text, where="table")
        if table.requests > self.max_requests:
            text = f"{table.requests} requests, reserved for {self.max_requests}"
            raise ArgumentError("A103", text, where="table", hint="attn.reserve(max_requests=…)")
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
        return {
            "qo_indptr": self._indptr.pointer, "cuts": self._cuts.pointer,
            "partials": self._partials.pointer, "counters": self._counters.pointer,
        }  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"Workspace(cuda:{self.ordinal}, {self.max_requests} requests, {self.ctas} CTAs, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )
