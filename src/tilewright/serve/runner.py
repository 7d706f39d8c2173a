"""The runner: one step of a batch through the model.

Answers, one row each, are a step that is recorded once for each number of requests and then
replayed as one native call. It computes positions, pages and slots from the lengths in memory of
the target, adds 1 to these, and reads the tokens that the step before has put there: the host
writes what it wants otherwise. Prompts precede it, their chunks packed one after the other. Where a
library computes products they are a recorded step too, whose attention reads its work where the
host writes it, and answers whose bits may depend on the batch are rows in front of the prompts.

With `invariant` the bits of a row depend on its own request only, and not on how its prompt is cut:
*The bits of an answer* in docs/design/serving.md has what that takes, and where it holds on GPUs.
"""

from collections.abc import Sequence
from dataclasses import replace
from operator import call
from typing import Any

import numpy as np

from tilewright.attention.batch import Attention
from tilewright.attention.families import Scratch
from tilewright.attention.kv import KV
from tilewright.attention.plan import Plan
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.ops.embedding import embedding_kernel
from tilewright.ops.paging import pages_kernel, positions_kernel
from tilewright.runtime.step import Step
from tilewright.runtime.transfer import to_host
from tilewright.serve.cascade import Cascade, Groups
from tilewright.serve.cost import BUCKET, filled
from tilewright.serve.kv_pool import PAGE_SIZE, layer_groups
from tilewright.serve.models.llama import Llama, Rows
from tilewright.serve.products import OWN_ROWS
from tilewright.serve.request import Request, Sampling
from tilewright.serve.sampler import Seats
from tilewright.serve.scheduler import PENDING, Chunk, Limits

FEW = 8  # rows from which the kernel of many rows is the faster one


class Logits:
    """What a step computes for `requests`, those that want a token. On a GPU it may still be under
    way: `wait` before anything is read. `drawn`: those that it samples; `left`: for the host;
    `groups`: of the answers, which of them share reads."""

    def __init__(self, runner: "Runner", chunks: Sequence[Chunk], rows: Any, drawn: Any) -> None:
        self._runner, self._rows, self.groups = runner, rows, runner.groups
        self.requests = [c.request for c in chunks if c.wants_token]
        self._drawn = [int(r in drawn) for r in self.requests]
        self.left = [r for r in self.requests if not (r in drawn or r.sampling.is_plain_greedy)]
        self._tokens = runner.read_tokens()

    def wait(self) -> None:
        """Returns when the step has ended; `tokens` are those that it has drawn, -1 where no token
        can be, and else those of the largest logits. Raises ArgumentError[A109] of its plan."""
        self.tokens: list[int] = self._tokens().reshape(2, -1)[self._drawn, self._rows].tolist()
        for room in self._runner.rooms:
            room.check()

    def row(self, i: int) -> np.ndarray:
        """The logits of request i, float32 (vocab,); valid until the next step."""
        n, model = self._rows[i], self._runner.model
        row = to_host(model.memory.rows(self._runner.last["logits"], n, n + 1))[0]
        cap = np.float32(model.config.logit_cap)  # which the order does not depend on
        return cap * np.tanh(row / cap) if cap else row


class Runner:
    """A model with the memory of its batches: activations, page tables and the KV cache, which is
    float32 on CPUs and bfloat16 on GPUs.

    `context`: the longest sequence. With `limits.invariant` a batch of many answers (up to 16 where
    a library computes products) takes the kernel of one row too: slower, and the bits of each stay.
    """

    def __init__(self, model: Llama, limits: Limits, context: int) -> None:
        self.model, self.limits = model, limits
        new, put, config = model.memory.empty, model.memory.put, model.config
        self.joins = bool(model.products) and not limits.invariant  # answers and prompts
        most = limits.running + (BUCKET if self.joins else 8)  # rows may fill a step up
        shape = (limits.pages, PAGE_SIZE, config.kv_heads, config.head_dim)
        self.group_of = layer_groups(config.has_window)
        self.group_count = max(self.group_of) + 1
        nth = [self.group_of[:i].count(group) for i, group in enumerate(self.group_of)]  # of a page
        caches = [[new(*shape, dtype=model.kv_dtype) for _ in {*nth}] for _ in range(2)]
        pools = [Pool(k, v) for k, v in zip(*caches, strict=True)]
        self.keys, self.values = ([of[n] for n in nth] for of in caches)
        self.pools = [pools[n] for n in nth]
        self.tokens = tokens = filled(limits.step_tokens + most)  # a row a chunk
        self.width = context // PAGE_SIZE + 1
        # The most answers that our kernel of one row reads; more, and prompts, a library if any.
        self.few = OWN_ROWS if model.products else 2**31
        if not limits.invariant:
            self.few = 1 if model.products else FEW - 1
        self.activations = model.activations(OWN_ROWS if model.products else tokens)
        self.wide = model.activations(tokens, wide=True) if model.products else {}
        widths = {"x": config.dim, "normed": config.dim, "logits": config.vocab}
        self.last = {name: new(most, width) for name, width in widths.items()}
        chosen = put(np.zeros((2, most), np.int32))  # of `Seats`; also of rows that fill up
        self.last["token"] = model.memory.rows(chosen, 0, 1).reshape(most)
        on_gpu = model.memory.on_cuda and not config.logit_cap  # tanh has other bits there
        self.seats: Any = Seats(model.memory, self.last["logits"], chosen) if on_gpu else None
        self.kv_len = put(np.zeros(most, np.int32))
        self.table = np.zeros((most, self.group_count * self.width), np.int32)
        lines = np.arange(most * self.group_count, dtype=np.int32).reshape(-1, self.group_count)
        self._lines = [put(np.ascontiguousarray(of)) for of in lines.T]  # of each group in `table`
        self._sending: list[list[np.ndarray]] = [[], []]  # rows of it: of two steps
        self._held: list[Any] = [(None,)] * most  # of each row: pages, how far known, how many
        self.cascade = Cascade(model, self.pools, self.table.shape, not limits.invariant)
        self.block_table = self.cascade.block_table
        self._lengths = np.zeros(most, np.int32)  # what memory of the target holds as `kv_len`
        self.scratch = Scratch()  # all layers of all steps
        self.attentions = {layer.attention for layer in model.layers}
        self.read_tokens = model.memory.readback(chosen)
        self._views: dict[tuple[int, int], list[KV]] = {}
        every = self._kv(0, most)[0]
        # Of prompts, whose keys are divided where their bits may depend on the batch.
        self._step_plans = {x: x.step_plans(every, tokens, not self.joins) for x in self.attentions}
        # Columns of `Rows`; the rows whose logits are wanted; the work of attention.
        words = sum([own.words(tokens) for own in self._step_plans.values()])
        self.ints = put(np.zeros((3 + self.group_count) * tokens + most + words, np.int32))
        arrays = self.kv_len, self.last["token"], self.ints
        self._send_lengths, self._send_tokens, self._send_ints = map(model.memory.sender, arrays)
        self._steps: dict[int, Step] = {}  # by rows, where none is sampled
        self._sampling: dict[int, Step] = {}
        self._mixed: dict[tuple[int, int], Any] = {}  # with prompts: by rows of answers, and of all
        self._drawing: Any = None  # a step that samples behind prompts
        self.rooms: list[Any] = []  # workspaces in which recorded steps plan
        self._qo_tile = self._answer_plans(1)[model.layers[0].attention].qo_tile  # of every layer

    def run(self, chunks: Sequence[Chunk]) -> Logits:
        """Reads the tokens of the chunks, those of answers first, and computes the logits of the
        requests that want a token. Answers may read tokens that the step before computes, PENDING
        on the host, if it has the same answers, and no prompt ended there."""
        answers = [c for c in chunks if not c.is_prompt]
        prompts, rows = chunks[len(answers) :], len(answers)
        if rows > 8 and self.model.memory.on_cuda:
            rows += -rows % 8  # filled up with rows of a length below 1
        groups = self.cascade.of(answers, rows)
        answers = [answers[i] for i in groups.order]
        joined = bool(prompts and answers and self.joins)  # one pass, in which each reads alone
        rows += -rows % BUCKET if joined else 0
        self.groups = Groups(groups.order) if joined else groups
        # A row more where the last work item of a chunk would have one query: it is read as token
        # 0, nobody sees its result, and its key is overwritten by the next token.
        stops = [c.stop + ((c.stop - c.start) % self._qo_tile == 1) for c in prompts]
        lengths = [c.start + joined for c in answers] + [joined - 1] * (rows - len(answers)) + stops
        lengths += [0] * bool(prompts)  # whose attention has items that are of no key
        if self._lengths[: len(lengths)].tolist() != lengths:
            self._lengths[: len(lengths)] = lengths
            self._send_lengths(lengths)
        by_row = [*answers, *prompts]
        self._write_table([*range(len(answers)), *range(rows, rows + len(prompts))], by_row)
        tokens = [c.request.tokens[c.start] for c in answers]
        if answers and PENDING not in tokens:
            self._send_tokens(tokens)
        ends = [c for c in prompts if c.wants_token]
        seated = [*answers, *[None] * (rows - len(answers))]
        seated += ends if joined or not answers else []  # else these are the host's
        drawn = self.seats.take(seated) if self.seats else set()
        # Prompts first: what is copied for them would wait for the step of the answers.
        if prompts:
            self._read_prompts(by_row if joined else prompts, stops, rows)
        if answers and not joined:
            of = self.cascade.steps if groups.nodes else (self._steps, self._sampling)
            steps = of[bool(drawn)]
            if rows not in steps:
                steps[rows] = self._record(rows, rows, drawn, groups.nodes)
            steps[rows]()
            self._lengths[: len(answers)] += 1
            self.cascade.totals += groups[2:]
        elif drawn:
            self._drawing = self._drawing or Step([self.seats.bind(len(self.table))])
            self._drawing()
        own = zip(np.argsort(groups.order).tolist(), chunks, strict=False)  # the row of each answer
        of_ends = range(rows, rows + len(ends))
        return Logits(self, chunks, [row for row, c in own if c.wants_token] + [*of_ends], drawn)

    def warm(self) -> None:
        """Runs steps of all sizes that one prompt, and one prefix of all answers, can have, so that
        none of those is recorded, and no kernel compiled, while answers wait. Steps of several
        prompts that are longer than the context come later. Overwrites the first page."""
        most, longest = self.limits.step_tokens, (self.width - 1) * PAGE_SIZE

        def step(answers: int, *prompts: tuple[int, int], keys: int = 0, heat: float = 0.0) -> None:
            ranges = [(keys, 1)] * answers + [x for x in prompts if x[1]]  # first key, rows
            requests = [Request(0, [0] * sum(x), Sampling(temperature=heat)) for x in ranges]
            for i, request in enumerate(requests):
                request.in_chunks = (i >= answers) * len(request.tokens)
                request.pages = [0] * self.table.shape[1]
            starts = [(r, start) for r, (start, _) in zip(requests, ranges, strict=True)]
            self.run([Chunk(r, start, len(r.tokens)) for r, start in starts]).wait()

        for answers in range(1, self.limits.running + 1):
            for keys in (0, longest)[: 1 + self.cascade.is_on]:
                step(answers, keys=keys)
                step(answers, keys=keys, heat=1.0)
        others = self.limits.running - 1  # than a prompt
        for answers in range(0, max(others, 1) if self.joins else 1, BUCKET):
            for size in (*range(BUCKET, most - answers, BUCKET), most - answers - 1):
                if answers + self.joins <= others:
                    step(answers + self.joins, (0, min(size, longest)))
                step(0, (longest - min(size, longest), min(size, longest)))

    def _write_table(self, rows: Sequence[int], chunks: Sequence[Chunk]) -> None:
        """The rows of the page table that have changed, to memory of the target."""
        memory = self.model.memory
        self._sending = [self._sending[1], []]
        for i, chunk in zip(rows, chunks, strict=True):
            pages, node = chunk.request.pages, chunk.request.node
            held, now = self._held[i], (pages, node, len(pages), chunk.request.ahead)
            # A list grows in place, and has other pages once the prefix tree knows the full ones.
            if not (pages is held[0] and node is held[1] and now[2:] == held[2:]):
                blocks = np.reshape(pages, (-1, self.group_count))
                self.table[i].reshape(self.group_count, -1)[:, : len(blocks)] = blocks.T
                row = memory.rows(self.block_table, i, i + 1)
                # The row is written anew while the copy may be under way: it has one of its own.
                self._sending[1].append(sent := self.table[i : i + 1].copy())
                memory.write(row, sent, waits=False)
                self._held[i] = now

    def _rows(self, tokens: int, few: bool) -> Rows:
        of = self.wide if self.model.is_wide(few) else self.activations
        rows = self.model.memory.rows
        begins = (i * self.tokens for i in range(3 + self.group_count))
        ids, position, slot, *pages = (rows(self.ints, at, at + tokens) for at in begins)
        own = {k: rows(a, 0, tokens) for k, a in of.items()}
        return Rows(tokens, few, {0: ids}, position, slot, [pages[g] for g in self.group_of], own)

    def _kv(self, begin: int, end: int) -> list[KV]:
        """The KV of each layer for requests begin … end-1."""
        if (begin, end) not in self._views:
            rows, every = self.model.memory.rows, self.block_table.reshape(-1, self.width)
            lengths, *lines = (rows(x, begin, end) for x in (self.kv_len, *self._lines))
            tables = [Table(lengths, every, rows=of) for of in lines]
            if self.group_count == 1:  # kernels that look no line up
                tables = [Table(lengths, rows(every, begin, end))]
            of_layers = zip(self.group_of, self.pools, strict=True)
            self._views[begin, end] = [KV(tables[group], pool) for group, pool in of_layers]
        return self._views[begin, end]

    def _answer_plans(self, requests: int) -> dict[Attention, Plan]:
        """The plan of each attention for the first requests: one query each, on a whole context. On
        a GPU `share` SMs for each KV head cut keys at equal places for any number of requests."""
        views, known = self._kv(0, requests), np.full(requests, self.width * PAGE_SIZE)
        heads, most = self.model.config.kv_heads, len(self.table)
        share = max(1, min(8, 1024 // (heads * most)))  # partial results of more take much memory
        workers = requests * heads * share if self.model.memory.on_cuda else None
        indptr = np.arange(requests + 1)
        of = self.attentions
        return {x: x.plan(indptr, views[0], workers=workers, lengths=known) for x in of}

    def _read_prompts(self, chunks: Sequence[Chunk], stops: list[int], first: int) -> None:
        """Reads prompts up to `stops`, whose rows of the page table begin at `first`, behind the
        answers in front of them, if any; so do rows of the logits of those that want a token."""
        model, rows, n = self.model, self.model.memory.rows, len(chunks) - len(stops)
        front = first if n else 0  # rows of answers, and those that fill them up
        sizes = [1] * n + [end - c.start for c, end in zip(chunks[n:], stops, strict=True)]
        indptr = np.cumsum([0, *sizes[n:]])
        *begins, total = (front + indptr).tolist()
        count = filled(total)
        while min([own.left(count, indptr) for own in self._step_plans.values()]) < 0:
            count = filled(count + 1)
        if (front, count) not in self._mixed:
            make = self._record if model.products else self._bind_prompts
            self._mixed[front, count] = make(front, count)
        # Tokens (not read for answers), positions, slots, pages by group. A row more than a chunk
        # has tokens has token 0; rows that fill the step up have no page.
        at = [*range(n), *range(front, total)]
        columns = np.zeros((3 + self.group_count, self.tokens), np.int32)
        of = np.repeat([*range(n), *range(first, first + len(stops))], sizes)
        placed = [*zip(chunks, sizes, [*range(n), *begins], strict=True)]
        tokens = [(*c.request.tokens[c.start : c.stop], 0)[:size] for c, size, _ in placed]
        positions = np.concatenate([np.arange(c.start, c.start + size) for c, size, _ in placed])
        columns[0, at], columns[1, at], columns[3:] = np.concatenate(tokens), positions, -1
        columns[2] = columns[1] % PAGE_SIZE
        by_group = self.table.reshape(-1, self.group_count, self.width)
        columns[3:, at] = by_group[of, :, positions // PAGE_SIZE].T
        lasts = [row + c.stop - c.start - 1 for c, _, row in placed[n:] if c.wants_token]
        picked = [*range(front), *lasts]
        work = [x.work(count, indptr, np.array(stops), first) for x in self._step_plans.values()]
        wanted = np.array(picked + [0] * (len(self.table) - len(picked)))
        self._send_ints(np.concatenate([columns.reshape(-1), wanted, *work]))
        read, b = self._mixed[front, count], self._rows(total, few=False)
        if model.products:
            read()
        else:  # call by call, of no more rows than there are
            model.forward(b, (self.keys, self.values), lambda i, *_: read[i](), do=call)
        if picked:
            begin, few = first - front, len(picked) <= self.few
            last = {name: rows(a, begin, begin + len(picked)) for name, a in self.last.items()}
            if model.is_wide(few):
                last["normed"] = rows(self.wide["normed"], 0, len(picked))
            ids, x = rows(self.ints, columns.size, columns.size + len(picked)), b.a["x"]
            embedding_kernel("f32", model.name)(ids, x, out=last["x"])
            model.finish(last, few, do=call)

    def _bind_prompts(self, answers: int, count: int) -> list[Any]:
        """The attention of prompts in each layer, whose rows come behind those of answers."""
        model, rows, every = self.model, self.model.memory.rows, self._kv(0, len(self.table))
        a, plans = self._rows(count, few=False).a, dict[Attention, Plan]()
        end = (3 + self.group_count) * self.tokens + len(self.table)  # in front of the work
        for attention, own in self._step_plans.items():
            begin, end = end, end + own.words(count)
            plans[attention] = own.plan(count, count - answers, rows(self.ints, begin, end))
        heads = count, model.config.qo_heads, model.config.head_dim
        q, out = (rows(a[x].reshape(*heads), answers, count) for x in ("rotated", "attended"))
        of = zip([layer.attention for layer in model.layers], every, strict=True)
        return [x.bind(q, kv, out, plan=plans[x], scratch=self.scratch) for x, kv in of]

    def _record(self, answers: int, count: int, samples: Any = 0, cascaded: Any = 0) -> Step:
        """The step of one row of each of some answers, of which some are sampled (`samples`) or
        share reads (`cascaded`); or of `count` rows, of which those of answers are the first and
        those of prompts the others, up to the residual behind the last layer."""
        bounds, planners, alone = list[Any](), list[Any](), count == answers
        model, rows = self.model, self.model.memory.rows
        views, plans = (self._kv(0, answers), self._answer_plans(answers)) if answers else ([], {})
        theirs = [] if alone else self._bind_prompts(answers, count)

        def do(kernel: Any, *args: Any, out: Any = None) -> None:
            bounds.append(kernel.bind(*args, out=out))

        def attend(layer: int, q: Any, out: Any) -> None:
            attention = model.layers[layer].attention
            bounds.extend(planners if layer == 0 else ())
            if answers:
                mine = rows(q, 0, answers), views[layer], rows(out, 0, answers)
                scratch = None if planners else self.scratch
                bounds.append(attention.bind(*mine, plan=plans[attention], scratch=scratch))
            bounds.extend(theirs[layer : layer + 1])

        b = self._rows(count, alone and count <= self.few)
        if alone:
            of_rows = self.kv_len, self.block_table, self.cascade.base, self.cascade.own
            *read, own = (rows(x, 0, count) for x in of_rows)
            first, *others = (b.page[self.group_of.index(g)] for g in range(self.group_count))
            for n, page in enumerate(others, 1):
                do(pages_kernel(model.name), *read[:2], PAGE_SIZE, n * self.width, out=page)
            do(positions_kernel(PAGE_SIZE, model.name), *read, out=(b.position, first, b.slot, own))
        elif answers:  # whose tokens are where the step in front, or the host, has put them
            ids = rows(self.last["token"], 0, answers), rows(b.ids[0], answers, count)
            b = replace(b, ids=dict(zip((0, answers), ids, strict=True)))
        if cascaded:
            views, plan, planners = self.cascade.bind(answers)
            plans = dict.fromkeys(plans, plan)
        elif answers and self.joins and self.model.memory.on_cuda:  # bits may depend on all lengths
            plans = {x: x.reserve(answers, kv=views[0]) for x in self.attentions}
            planners = [room.bind(views[0].table) for room in plans.values()]
        self.rooms += dict.fromkeys(plans.values()) if planners else ()
        if not alone:
            model.forward(b, (self.keys, self.values), attend, do)
            return Step(bounds)
        last = {name: rows(self.last[name], 0, count) for name in ("logits", "token")}
        b = replace(b, ids={0: last["token"]})
        normed = model.forward(b, (self.keys, self.values), attend, do)
        model.finish({**b.a, **last}, b.few, do, normed)
        if samples:
            bounds.append(self.seats.bind(count))
        return Step(bounds)
