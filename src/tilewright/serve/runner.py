"""The runner: one step of a batch through the model.

The rows of all chunks are packed one after the other, answers first. A step of answers alone, one
row each, is recorded once for each number of requests and then replayed as one native call. It
computes positions, pages and slots from the lengths in memory of the target, reads the tokens that
the step before has put there, and adds 1 to the lengths: the host writes what it wants otherwise.

The bits of a row depend on its own request only, and not on how its prompt is cut into chunks:
linear layers read rows of answers and of prompts by different kernels, each of which computes a row
alone; attention has a kernel for one query and one for several, and a prompt never takes the first:
its chunk is read with a row more where a work item would have one query. Keys are divided as if
every answer were as long as the context, and every prompt short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tilewright.attention.kv import KV
from tilewright.attention.plan import CHUNK_TILES
from tilewright.attention.pool import Pool
from tilewright.attention.ranges import TILE
from tilewright.attention.table import Table
from tilewright.ops.embedding import embedding_kernel
from tilewright.ops.rope import lengthen_kernel, positions_kernel
from tilewright.runtime.step import Step
from tilewright.serve.kv_pool import PAGE_SIZE
from tilewright.serve.models.llama import Llama, Rows
from tilewright.serve.scheduler import Chunk, Limits

FEW = 8  # rows from which the kernel of many rows is the faster one


class Logits:
    """What a step computed for the requests that want a token, in the order of the chunks."""

    def __init__(self, runner: Runner, rows: list[int]) -> None:
        self._memory, self._logits, self._rows = runner.model.memory, runner.last["logits"], rows
        self._cap = np.float32(runner.model.config.logit_cap)  # which the order does not depend on
        runner.tokens[:] = self._memory.read(runner.last["token"])
        self.likeliest = [int(runner.tokens[n]) for n in rows]

    def row(self, i: int) -> np.ndarray:
        """The logits of request i, float32 (vocab,); valid until the next step."""
        n = self._rows[i]
        row = self._memory.read(self._memory.rows(self._logits, n, n + 1))[0]
        return self._cap * np.tanh(row / self._cap) if self._cap else row


class Runner:
    """A model with the memory of its batches: activations, page tables and the KV cache.

    `context`: the longest sequence. With `limits.invariant` a batch of many answers takes the
    kernel of one row too, which is slower and keeps the bits of each.
    """

    def __init__(self, model: Llama, limits: Limits, context: int) -> None:
        self.model, self.invariant = model, limits.invariant
        new, most, config = model.memory.empty, limits.running, model.config
        shape = (limits.pages, PAGE_SIZE, config.kv_heads, config.head_dim)
        self.keys, self.values = ([new(*shape) for _ in range(config.layers)] for _ in range(2))
        tokens = limits.step_tokens + most  # a row more for each chunk
        self.width = context // PAGE_SIZE + 1
        self.activations = {k: new(tokens, w) for k, w in model.widths.items()}
        self.last = {"x": new(most, config.dim), "normed": new(most, config.dim)}
        self.last["logits"] = new(most, config.vocab)
        self.last["token"] = new(most, dtype="int32")
        self.ints = new(4 * _aligned(tokens), dtype="int32")
        self.picked = new(most, dtype="int32")
        self.kv_len = model.memory.put(np.zeros(most, np.int32))
        self.plan_len = model.memory.put(np.zeros(most, np.int32))
        self.table = np.zeros((most, self.width), np.int32)
        self.block_table = model.memory.put(self.table.copy())
        self._written: list[list[int]] = [[] for _ in range(most)]
        # What memory of the target holds: tokens of `last`, and `kv_len`.
        self.tokens, self._lengths = np.zeros(most, np.int32), np.zeros(most, np.int32)
        model.memory.write(self.last["token"], self.tokens)
        self._views: dict[int, tuple[list[KV], KV]] = {}
        self._steps: dict[int, Step] = {}
        one = model.layers[0].attention.plan(np.array([0, 1], np.int32), self._kv(1)[1])
        self._qo_tile = one.qo_tile  # of every layer

    def run(self, chunks: Sequence[Chunk]) -> Logits:
        """Reads the tokens of the chunks, those of answers first, and computes the logits of the
        requests that want a token."""
        stops = [c.stop + self._needs_row(c) for c in chunks]
        self._write_table(chunks)
        self._write_first(self.kv_len, self._lengths, stops)
        wanting = [i for i, c in enumerate(chunks) if c.wants_token]
        if not any(c.is_prompt for c in chunks):
            step = self._steps.get(len(chunks))
            if step is None:
                step = self._steps[len(chunks)] = self._record(len(chunks))
            tokens = [c.request.tokens[c.start] for c in chunks]
            self._write_first(self.last["token"], self.tokens, tokens)
            step()
            self._lengths[: len(chunks)] += 1
            return Logits(self, wanting)
        self._write(chunks, stops)
        self._mixed(chunks, stops, wanting)
        return Logits(self, list(range(len(wanting))))

    # -- inside ----------------------------------------------------------------------------------

    def _needs_row(self, chunk: Chunk) -> bool:
        """Whether the last work item of a chunk of a prompt would have one query. The row behind it
        is read as token 0; nobody sees its result, and its key is overwritten by the next token."""
        return chunk.is_prompt and (chunk.stop - chunk.start) % self._qo_tile == 1

    def _write_table(self, chunks: Sequence[Chunk]) -> None:
        """The rows of the page table that have changed, to memory of the target."""
        memory = self.model.memory
        for i, chunk in enumerate(chunks):
            pages = chunk.request.pages
            if self._written[i] != pages:
                self._written[i] = list(pages)
                self.table[i, : len(pages)] = pages
                memory.write(memory.rows(self.block_table, i, i + 1), self.table[i : i + 1])

    def _write_first(self, array: Any, held: np.ndarray, values: list[int]) -> None:
        """The first values of an array in memory of the target, where it holds other ones."""
        if held[: len(values)].tolist() != values:
            held[: len(values)] = values
            memory = self.model.memory
            memory.write(memory.rows(array, 0, len(values)), held[: len(values)])

    def _write(self, chunks: Sequence[Chunk], stops: list[int]) -> None:
        """Tokens up to `stops`, their positions, pages and slots, to memory of the target."""
        memory = self.model.memory
        ids: list[int] = []
        position: list[int] = []
        page: list[int] = []
        for chunk, stop in zip(chunks, stops, strict=True):
            pages = chunk.request.pages
            ids += chunk.request.tokens[chunk.start : chunk.stop] + [0] * (stop - chunk.stop)
            position += range(chunk.start, stop)
            page += [pages[n // PAGE_SIZE] for n in range(chunk.start, stop)]
        packed = np.zeros((4, _aligned(len(ids))), np.int32)
        packed[:, : len(ids)] = ids, position, page, [n % PAGE_SIZE for n in position]
        memory.write(memory.rows(self.ints, 0, packed.size), packed.reshape(-1))

    def _rows(self, tokens: int, single: int) -> Rows:
        rows = self.model.memory.rows
        begins = [i * _aligned(tokens) for i in range(4)]
        ids, position, page, slot = (rows(self.ints, n, n + tokens) for n in begins)
        activations = {k: rows(a, 0, tokens) for k, a in self.activations.items()}
        return Rows(tokens, single, ids, position, page, slot, activations)

    def _single(self, rows: int) -> int:
        """How many of `rows` rows of answers take the kernel of one row."""
        return rows if self.invariant or rows < FEW else 0

    def _kv(self, requests: int) -> tuple[list[KV], KV]:
        """The KV of each layer for a number of requests, and the one to plan with."""
        if requests not in self._views:
            rows = self.model.memory.rows
            pages = rows(self.block_table, 0, requests)
            table = Table(rows(self.kv_len, 0, requests), pages)
            plan = Table(rows(self.plan_len, 0, requests), pages)
            pools = [Pool(k, v) for k, v in zip(self.keys, self.values, strict=True)]
            self._views[requests] = [KV(table, pool) for pool in pools], KV(plan, pools[0])
        return self._views[requests]

    def _mixed(self, chunks: Sequence[Chunk], stops: list[int], wanting: list[int]) -> None:
        """Any chunks, call by call."""
        model, memory = self.model, self.model.memory
        starts = np.array([c.start for c in chunks], np.int32)
        indptr = np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int32)
        views, to_plan = self._kv(len(chunks))
        capacity, short = self.width * PAGE_SIZE, (2 * CHUNK_TILES - 1) * TILE
        lengths = [min(c.stop, short) if c.is_prompt else capacity for c in chunks]
        memory.write(memory.rows(self.plan_len, 0, len(chunks)), np.array(lengths, np.int32))
        plans = {x: x.plan(indptr, to_plan) for x in {layer.attention for layer in model.layers}}

        def do(kernel: Any, *args: Any, out: Any = None) -> None:
            kernel(*args, out=out)

        def attend(layer: int, q: Any, out: Any) -> None:
            attention = model.layers[layer].attention
            attention.run(q, views[layer], plans[attention], out=out)

        b = self._rows(int(indptr[-1]), self._single(sum(not c.is_prompt for c in chunks)))
        model.forward(b, (self.keys, self.values), attend, do)
        if wanting:
            count = len(wanting)
            last = {name: memory.rows(a, 0, count) for name, a in self.last.items()}
            picked = memory.rows(self.picked, 0, count)
            ends = [indptr[i] + chunks[i].stop - starts[i] for i in wanting]
            memory.write(picked, np.array(ends, np.int32) - 1)
            do(embedding_kernel("f32", model.name), picked, b.a["x"], out=last["x"])
            model.finish(last, self._single(count), do)

    def _record(self, requests: int) -> Step:
        """The step of one row of each of some answers."""
        bounds: list[Any] = []
        model, rows = self.model, self.model.memory.rows
        views, _ = self._kv(requests)

        def do(kernel: Any, *args: Any, out: Any = None) -> None:
            bounds.append(kernel.bind(*args, out=out))

        def attend(layer: int, q: Any, out: Any) -> None:
            bounds.append(model.layers[layer].attention.bind(q, views[layer], out))

        b = self._rows(requests, self._single(requests))
        last = {name: rows(self.last[name], 0, requests) for name in ("logits", "token")}
        lengths, table = (rows(x, 0, requests) for x in (self.kv_len, self.block_table))
        positions = positions_kernel(PAGE_SIZE, model.name)
        do(positions, lengths, table, out=(b.position, b.page, b.slot))
        b = replace(b, ids=last["token"])
        model.forward(b, (self.keys, self.values), attend, do)
        model.finish({**b.a, **last}, b.single, do)
        do(lengthen_kernel(model.name), lengths)
        return Step(bounds)


def _aligned(tokens: int) -> int:
    """A number of int32 values that keeps what follows them aligned to 64 bytes."""
    return -(-tokens // 16) * 16
