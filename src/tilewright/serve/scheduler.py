"""The scheduler: which tokens of which requests the next step reads.

Continuous batching: a step has one token of every request that is being answered, then chunks of
prompts as far as `step_tokens` reach. A request is admitted when the pages of its whole prompt are
available; the answer takes pages as it grows. Where none is left, the running request of the lowest
rank, among equals the latest, gives its pages back and is read again later (preemption by
recompute). A waiting request of a higher priority preempts one of a lower rank. Waiting raises the
rank by one every `PATIENCE` steps, so that nobody waits for ever.

Decisions depend on token ids and counts only: no clock, no arrays, no threads.

    while scheduler.has_work:
        decision = scheduler.schedule()
        ...                                   # run decision.chunks
        for request in scheduler.commit(decision): ...   # each wants its next token
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.serve.kv_pool import PAGE_SIZE, Pages
from tilewright.serve.prefix import PrefixTree
from tilewright.serve.request import Request

PATIENCE = 256  # steps


@dataclass(frozen=True, slots=True)
class Limits:
    """`pages`: of the pool; `running`: most requests at once; `step_tokens`: most tokens of a step;
    `share`: whether pages of equal prefixes are shared; `invariant`: an answer that was preempted
    is read again token by token, as it was written, else in chunks."""

    pages: int
    running: int = 16
    step_tokens: int = 512
    share: bool = True
    invariant: bool = True
    page_size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        assert 0 < self.running < self.step_tokens, "a step has no tokens left for prompts"


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

    def __str__(self) -> str:
        return f"{self.request.id}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a step does: its chunks, those of answers first; ids of who was admitted and who was
    preempted before it."""

    step: int
    chunks: tuple[Chunk, ...]
    admitted: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()

    def __str__(self) -> str:
        words = [f"{self.step}:", *map(str, self.chunks)]
        words += [f"+{i}" for i in self.admitted] + [f"-{i}" for i in self.preempted]
        return " ".join(words)


class Scheduler:
    """The waiting and the running requests, and the pages they hold."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pages = Pages(limits.pages)
        self.prefix = PrefixTree(self.pages, limits.page_size)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.step = 0
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Adds a new request. The caller has checked that its longest answer fits the pool."""
        request.since = self.step
        self.waiting.append(request)

    def finish(self, request: Request, reason: str) -> None:
        """Ends a request, wherever it is; its full pages stay in the prefix tree."""
        if request.finish:
            return
        request.finish = reason
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> Decision:
        """The next step. One that failed and was not committed is decided again."""
        self.step += 1
        for request in self.running:  # a failure after commit: the last token is read again
            request.computed = min(request.computed, len(request.tokens) - 1)
        preempted = self._make_room()
        admitted = self._admit()
        self.running.sort(key=_order)
        chunks, budget = [], self.limits.step_tokens
        for request in [r for r in self.running if r.computed >= r.in_chunks]:
            if request not in self.running or not self._grow(request, preempted):
                continue
            chunks.append(Chunk(request, request.computed, request.computed + 1))
            budget -= 1
        for request in [r for r in self.running if r.computed < r.in_chunks]:
            stop = min(request.in_chunks, request.computed + budget)
            if stop > request.computed:
                chunks.append(Chunk(request, request.computed, stop))
                budget -= stop - request.computed
        return Decision(self.step, tuple(chunks), tuple(admitted), tuple(preempted))

    def commit(self, decision: Decision) -> list[Request]:
        """Notes that a step was run. Returns the requests that want their next token, in the order
        of the chunks."""
        for chunk in decision.chunks:
            chunk.request.computed = chunk.stop
            if self.limits.share:
                self._keep(chunk.request)
        return [c.request for c in decision.chunks if c.wants_token]

    # -- inside ----------------------------------------------------------------------------------

    def _rank(self, request: Request) -> int:
        """The rank of a waiting request now."""
        return request.rank + (self.step - request.since) // PATIENCE

    def _make_room(self) -> list[int]:
        """Preempts for waiting requests of a higher priority, while these lack a seat or pages."""
        preempted: list[int] = []
        for request in sorted(self.waiting, key=lambda r: (-r.priority, r.id)):
            worst = max(self.running, key=_order, default=None)
            if worst is None or worst.rank >= request.priority:
                break
            while worst is not None and worst.rank < request.priority:
                if len(self.running) < self.limits.running and self._fits(request):
                    break
                preempted.append(self._preempt(worst))
                worst = max(self.running, key=_order, default=None)
        return preempted

    def _admit(self) -> list[int]:
        """Moves waiting requests to the running ones, as far as a step can read their prompts."""
        admitted: list[int] = []
        backlog = sum(r.left for r in self.running)
        for request in sorted(self.waiting, key=lambda r: (-self._rank(r), r.id)):
            if len(self.running) == self.limits.running or backlog >= self.limits.step_tokens:
                break
            if not self._fits(request):
                break
            request.rank = self._rank(request)
            self.waiting.remove(request)
            self._seat(request)
            self.running.append(request)
            admitted.append(request.id)
            backlog += request.left
        return admitted

    def _needed(self, request: Request) -> int:
        """The number of pages for the tokens of a request and the next one."""
        return len(request.tokens) // self.limits.page_size + 1

    def _fits(self, request: Request) -> bool:
        """Whether its pages are available, and one more for each running request."""
        path = self.prefix.match(request.tokens) if self.limits.share else []
        shared = sum(self.pages.holders[n.page] > 0 for n in path)
        needed = self._needed(request) - shared
        return self.pages.available >= needed + len(self.running)

    def _seat(self, request: Request) -> None:
        """Gives a request the pages of its tokens: known ones, then new ones."""
        path = self.prefix.match(request.tokens) if self.limits.share else []
        for node in path:
            self.pages.hold(node.page)
        request.pages = [node.page for node in path]
        request.node = path[-1] if path else None
        request.computed = len(path) * self.limits.page_size
        if request.answered == 0:
            request.cached = request.computed
        self.prefix.touch(request.node)
        while len(request.pages) < self._needed(request):
            request.pages.append(self._take())

    def _take(self) -> int:
        """A page for a request; the caller knows that one is available."""
        if not self.pages.free:
            self.prefix.evict(1 + self.limits.pages // 32)  # a few at once: the search is linear
        return self.pages.take()

    def _grow(self, request: Request, preempted: list[int]) -> bool:
        """Gives a request the page of its next token, whoever must give one up; False if that is
        itself."""
        while len(request.pages) * self.limits.page_size < len(request.tokens):
            if self.pages.available:
                request.pages.append(self._take())
                continue
            worst = max(self.running, key=_order)
            preempted.append(self._preempt(worst))
            if worst is request:
                return False
        return True

    def _preempt(self, request: Request) -> int:
        self.running.remove(request)
        self._release(request)
        request.computed, request.since = 0, self.step
        if not self.limits.invariant:
            request.in_chunks = len(request.tokens)
        self.waiting.append(request)
        self.preemptions += 1
        return request.id

    def _release(self, request: Request) -> None:
        self.prefix.touch(request.node)
        for page in request.pages:
            self.pages.release(page)
        request.pages, request.node = [], None

    def _keep(self, request: Request) -> None:
        """Enters the pages of a request that have become full into the prefix tree. Where the tree
        knows the same tokens, the request takes the tree's page for its own."""
        size, pages = self.limits.page_size, request.pages
        known = 0 if request.node is None else request.node.depth
        for n in range(known, request.computed // size):
            key = tuple(request.tokens[n * size : (n + 1) * size])
            request.node = self.prefix.insert(request.node, key, pages[n])
            if request.node.page != pages[n]:
                self.pages.hold(request.node.page)
                self.pages.release(pages[n])
                pages[n] = request.node.page


def _order(request: Request) -> tuple[int, int]:
    """The best first: by rank, then by arrival."""
    return -request.rank, request.id
