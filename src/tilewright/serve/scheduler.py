"""The scheduler: which tokens of which requests the next step reads.

Continuous batching: a step has one token of every request that is being answered, then chunks of
prompts. What a step does, `policy.decide` says, of the state that the scheduler shows it; the
scheduler owns the lists and the pages. A request is admitted when the pages of its whole prompt are
available, in layers with a window as many as it holds at once; the answer takes pages as it grows.
Where none is left, the running request of the lowest
rank, among equals the latest, gives its pages back and is read again later (preemption by
recompute). Waiting raises the rank by one every `PATIENCE` steps, so that nobody waits for ever.

No clock, no arrays, no threads: the caller tells the time, and runs what `schedule` returns.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from tilewright.serve.cost import CostModel, Work
from tilewright.serve.kv_pool import PAGE_SIZE, Pages, PrefixTree, Walk
from tilewright.serve.policy import Decision, Prompt, State, decide
from tilewright.serve.request import Request

PATIENCE = 256  # steps
PENDING = -1  # in place of a token that a GPU has chosen and the host has not read
WINDOW = 64  # waiting requests that the policy sees, the best by rank and arrival


@dataclass(frozen=True, slots=True)
class Limits:
    """`pages`: of the pool; `running`: most requests at once; `step_tokens`: most tokens of a step,
    more than requests; `share`: whether pages of equal prefixes are shared; `invariant`: an answer
    that was preempted is read again token by token, as it was written, else in chunks; `windows`:
    for each group of layers the keys that a token sees (0: all), behind which pages go back."""

    pages: int
    running: int = 16
    step_tokens: int = 512
    share: bool = True
    invariant: bool = True
    page_size: int = PAGE_SIZE
    windows: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start … stop-1 of a request: some of its prompt, or one of its answer."""

    request: Request
    start: int
    stop: int

    @property
    def is_prompt(self) -> bool:
        return self.start < self.request.in_chunks

    @property
    def wants_token(self) -> bool:
        """Whether its last token is the last of the request."""
        return self.stop == len(self.request.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step does: its chunks, those of answers first; the decision that led to it, and ids of
    who was preempted before it; `ahead`: it is launched while the one in front runs."""

    step: int
    chunks: tuple[Chunk, ...]
    decision: Decision
    preempted: tuple[int, ...] = ()
    ahead: bool = False


def work_of(chunks: Sequence[Chunk]) -> Work:
    """What a step of these chunks (answers first) reads; the cost model predicts time from it."""
    stops = [c.stop for c in chunks if not c.is_prompt]
    work = Work(len(stops), sum(stops))
    for chunk in chunks[len(stops) :]:
        work = work.plus(chunk.start, chunk.stop - chunk.start)
    return work


class Scheduler:
    """The waiting and the running requests, and the pages they hold.

    `model`: predicts the seconds of a step; one without constants lets every step be full.
    `policy`: `decide`, or another for comparisons. `late`: tokens after their promised time.
    `pause`: seconds that a GPU waits in front of a step not launched ahead; the caller measures."""

    def __init__(
        self,
        limits: Limits,
        model: CostModel | None = None,
        policy: Callable[[State, CostModel], Decision] = decide,
    ) -> None:
        self.limits = limits
        self.model = model or CostModel()
        self.policy = policy
        self.pages = Pages(limits.pages)
        self.prefix = PrefixTree(self.pages, limits.page_size, limits.windows)
        self.kinds = [len(groups) for groups in self.prefix.groups]  # without, with a window
        # Blocks that a request has at once of a group with a window, at most: those that the first
        # token of a step sees, those of its tokens, and a part of one in front and behind.
        self.most = (self.prefix.window + limits.step_tokens) // limits.page_size + 2
        self.waiting: list[Request] = []
        self.running: list[Request] = []  # by rank, then by arrival
        self.step = 0
        self.preemptions, self.late, self.pause = 0, 0, 0.0

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """A new request; its tokens and the longest answer fit into the pool."""
        request.since = self.step
        self.waiting.append(request)

    def finish(self, request: Request, reason: str) -> None:
        """Ends a request, wherever it is; its full pages stay in the prefix tree."""
        if request.finish:
            return
        request.finish = reason
        if request in self.running:
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self, now: float = 0.0, ahead: bool = False) -> Batch:
        """The next step, at `now` seconds. One that was not committed is decided again."""
        self.step += 1
        for request in (*self.running, *self.waiting):  # a failure after commit: tokens are lost
            request.computed = min(request.computed, len(request.tokens) - 1)
            request.in_chunks = min(request.in_chunks, len(request.tokens))
        preempted: list[int] = []
        while (decision := self.policy(self.state(now, ahead), self.model)).preempt >= 0:
            preempted.append(self._preempt(decision.preempt))
        self._admit([r for r in self.waiting if r.id in decision.admit])
        rows = [(r, 1) for r in self._answers() if decision.kind != "prefill"]
        for request, _ in rows:
            self._grow(request, -(-len(request.tokens) // self.limits.page_size))
        by_id = {r.id: r for r in self.running}
        rows += [(by_id[i], tokens) for i, tokens in decision.chunks]
        for request, tokens in rows:
            self._provide(request, request.computed + tokens)
        chunks = tuple([Chunk(r, r.computed, r.computed + tokens) for r, tokens in rows])
        return Batch(self.step, chunks, decision, tuple(preempted), ahead)

    def commit(self, batch: Batch, now: float = 0.0) -> list[Request]:
        """Notes that a step was run, until `now` seconds. Returns the requests that want their next
        token, in the order of the chunks."""
        chunks = [c for c in batch.chunks if not c.request.finish]  # not cancelled meanwhile
        for chunk in chunks:
            request = chunk.request
            request.computed, request.since = chunk.stop, batch.step
            if self.limits.share:
                self._keep(request)
            unseen = max(request.unseen, self.prefix.unseen(chunk.stop))
            for page in self.prefix.part(request.pages, request.unseen, unseen, True):
                self.pages.release(page)
            request.unseen = unseen
            if chunk.wants_token:
                self.late += request.answered == 0 and now > request.due
                request.due = now + request.gap
        return [c.request for c in chunks if c.wants_token]

    def state(self, now: float, ahead: bool = False) -> State:
        """What the policy sees. Of those that wait the best, by rank and arrival."""
        running, answers = self.running, self._answers()
        now += 0.0 if ahead else self.pause
        read = [r for r in running if r.computed < r.in_chunks]
        waiting = sorted(self.waiting, key=lambda r: (-self._rank(r), r.id))[:WINDOW]
        return State(
            step_tokens=self.limits.step_tokens, quantum=self.limits.page_size,
            pages=self._available(), block=self.prefix.count,
            seats=self.limits.running - len(running),
            answers=len(answers), context=sum([r.computed for r in answers]) + len(answers),
            due=min([r.due for r in answers if r.left == 1], default=inf) - now,
            gap=min([r.gap for r in running], default=inf),
            growth=sum(map(self._lacks, answers)),
            worst=(running[-1].rank, running[-1].id) if running else None,
            prompts=tuple([self._prompt(r, now, r.computed, r.rank) for r in read]),
            waiting=tuple([self._candidate(r, now) for r in waiting]),
        )  # fmt: skip

    def _answers(self) -> list[Request]:
        """The running requests that read a token a step."""
        return [r for r in self.running if r.computed >= r.in_chunks]

    def _rank(self, request: Request) -> int:
        return request.rank + (self.step - request.since) // PATIENCE

    def _prompt(self, r: Request, now: float, start: int, rank: int, pages: int = 0) -> Prompt:
        left, age, priority = r.in_chunks - start, self.step - r.since, r.sampling.priority
        return Prompt(r.id, start, left, r.due - now, r.gap, age, priority, rank, pages)

    def _candidate(self, r: Request, now: float) -> Prompt:
        """A waiting request, with what the prefix tree knows of it."""
        path = self.prefix.match(r.tokens, r.walk)
        start = len(path) * self.limits.page_size
        needed, unseen = len(r.tokens) // self.limits.page_size + 1, self.prefix.unseen(start)
        # Who holds a block holds those in front of it, but for pages behind a window.
        full, holders = self.prefix.groups[0][:1], self.pages.holders
        held = bisect_left(path, 1, key=lambda node: not all(holders[node.pages[g]] for g in full))
        pages = self.kinds[0] * (needed - held) + self.kinds[1] * min(needed - unseen, self.most)
        return self._prompt(r, now, start, self._rank(r), pages)

    def _read(self, request: Request) -> list[int]:
        """The pages that a request holds."""
        part, pages = self.prefix.part, request.pages
        return part(pages, 0, len(pages), False) + part(pages, request.unseen, request.ahead, True)

    def _admit(self, requests: list[Request]) -> None:
        """Moves waiting requests to the running ones, with the pages of their tokens. All hold what
        the prefix tree knows of them before any takes a new page, which may evict another."""
        for request in requests:
            path, request.walk = self.prefix.match(request.tokens, request.walk), Walk()
            request.computed = len(path) * self.limits.page_size
            request.unseen = self.prefix.unseen(request.computed)
            request.pages = [max(p, 0) for node in path for p in node.pages]  # 0: not looked at
            request.ahead = len(path)
            for page in self._read(request):
                self.pages.hold(page)
            request.node = path[-1] if path else None
            if request.answered == 0:
                request.cached = request.computed
            self.prefix.touch(request.node)
        for request in requests:
            self._grow(request, len(request.tokens) // self.limits.page_size + 1)
            request.rank, request.since = self._rank(request), self.step
            self.waiting.remove(request)
            insort(self.running, request, key=lambda r: (-r.rank, r.id))

    def _blocks(self, request: Request) -> int:
        return len(request.pages) // self.prefix.count

    def _grow(self, request: Request, blocks: int) -> None:
        """Gives a request more blocks, so many in all; without the pages of groups with a window,
        which a chunk gets when it needs them."""
        of_block, count = self.limits.windows, blocks - self._blocks(request)
        request.pages += [-1 if w else self._take(False) for _ in range(count) for w in of_block]

    def _available(self) -> int:
        """Pages that can be promised: free ones, and ones that the prefix tree can evict. Of groups
        with a window each request that runs has as many to itself as it may hold at once, though
        others share some, so that none lacks one later."""
        running = self.running if self.kinds[1] else ()
        held = sum([min(self._blocks(r) - r.unseen, self.most) for r in running])
        return self.pages.count - self.pages.held + self.pages.held_windowed - held * self.kinds[1]

    def _provide(self, request: Request, stop: int) -> None:
        """The pages of groups with a window for the tokens in front of `stop` and the next one."""
        end = min(stop // self.limits.page_size + 1, self._blocks(request))
        for block in range(request.ahead, end):
            for group in self.prefix.groups[1]:
                request.pages[block * self.prefix.count + group] = self._take(True)
        request.ahead = max(end, request.ahead)

    def _take(self, windowed: bool) -> int:
        """A page for a request; the caller knows that one is available."""
        if not self.pages.free:
            self.prefix.evict(1 + self.limits.pages // 32)  # a few at once: the search is linear
        return self.pages.take(windowed)

    def _lacks(self, request: Request) -> int:
        """How many pages the next token of an answer needs."""
        blocks = self._blocks(request)
        grows = blocks * self.limits.page_size < len(request.tokens)
        return grows * (self.kinds[0] + self.kinds[1] * (blocks - request.unseen < self.most))

    def _preempt(self, number: int) -> int:
        request = next(r for r in self.running if r.id == number)
        self._release(request)
        request.computed, request.since = 0, self.step
        if not self.limits.invariant:
            request.in_chunks = len(request.tokens)
        self.waiting.append(request)
        self.preemptions += 1
        return number

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.prefix.touch(request.node)
        for page in self._read(request):
            self.pages.release(page)
        request.pages, request.node, request.unseen, request.ahead = [], None, 0, 0

    def _keep(self, request: Request) -> None:
        """Enters the pages of a request that have become full into the prefix tree. Where the tree
        knows the same tokens, the request takes the tree's page for its own."""
        size, count, pages = self.limits.page_size, self.prefix.count, request.pages
        known = 0 if request.node is None else request.node.depth
        for n in range(known, request.computed // size):
            key, at = tuple(request.tokens[n * size : (n + 1) * size]), n * count
            request.node = self.prefix.insert(request.node, key, pages[at : at + count])
            for at, page in enumerate(request.node.pages, n * count):
                if page != pages[at]:
                    self.pages.hold(page)
                    self.pages.release(pages[at])
                    pages[at] = page
