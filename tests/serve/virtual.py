"""The scheduler on a virtual clock: a step takes one tick, a token follows from those before it.

The simulated cache holds in each slot a hash of the tokens up to its position. A step checks that
every slot it reads holds the right one, so that a page that was freed, shared or written wrongly is
seen at once. With a window the slots behind it are not read, and what is there does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tilewright.serve.request import Request, Sampling
from tilewright.serve.scheduler import Batch, Chunk, Limits, Scheduler


@dataclass(frozen=True)
class Arrival:
    """A request: tokens of its prompt and of its answer, and the steps at which it comes and is
    cancelled (0: never)."""

    prompt: list[int]
    answer: int
    at: int = 1
    priority: int = 0
    cancel: int = 0


def token_after(tokens: list[int]) -> int:
    return 1000 + hash(tuple(tokens)) % 1000


def line(batch: Batch) -> str:
    """Number of the step, chunks, + who was admitted, - who was preempted."""
    words = [f"{c.request.id}[{c.start}:{c.stop}]" for c in batch.chunks]
    words += [f"+{i}" for i in batch.decision.admit] + [f"-{i}" for i in batch.preempted]
    return " ".join([f"{batch.step}:", *words])


@dataclass
class Clock:
    limits: Limits
    arrivals: list[Arrival]
    log: list[str] = field(default_factory=list)

    def run(self, most: int = 5000) -> list[Request]:
        """Runs until all requests have ended."""
        self.scheduler = Scheduler(self.limits)
        self.slots: dict[tuple[int, int], int] = {}
        self.requests = [
            Request(i, list(a.prompt), Sampling(max_tokens=a.answer, priority=a.priority))
            for i, a in enumerate(self.arrivals)
        ]
        for tick in range(1, most):
            for request, arrival in zip(self.requests, self.arrivals, strict=True):
                if arrival.at == tick and not request.finish:
                    self.scheduler.add(request)
                if arrival.cancel == tick:
                    self.scheduler.finish(request, "cancel")
            self.step()
            if all(r.finish for r in self.requests):
                assert self.scheduler.pages.held == 0 and not self.scheduler.has_work
                return self.requests
        raise AssertionError(f"not done after {most} steps: {self.log[-3:]}")

    def step(self) -> None:
        scheduler = self.scheduler
        decision = scheduler.schedule()
        if scheduler.has_work:
            assert decision.chunks, "a step with work reads nothing"
        self.log.append(line(decision))
        self.check(decision)
        for chunk in decision.chunks:
            self.write(chunk)
        for request in scheduler.commit(decision):
            request.tokens.append(token_after(request.tokens))
            if request.answered == request.sampling.max_tokens:
                scheduler.finish(request, "length")

    def write(self, chunk: Chunk) -> None:
        """The keys of a chunk, which differ by group."""
        for n in range(chunk.start, chunk.stop):
            for group, page in enumerate(self.block(chunk.request, n)):
                key = hash((group, *chunk.request.tokens[: n + 1]))
                self.slots[page, n % self.limits.page_size] = key

    def block(self, request: Request, token: int) -> list[int]:
        """The pages of a token, one for each group of layers."""
        groups = len(self.limits.windows)
        first = token // self.limits.page_size * groups
        return request.pages[first : first + groups]

    def check(self, decision: Batch) -> None:
        scheduler, size, pages = self.scheduler, self.limits.page_size, self.scheduler.pages
        windows = self.limits.windows
        assert sum(c.stop - c.start for c in decision.chunks) <= self.limits.step_tokens
        assert len(scheduler.running) <= self.limits.running
        assert len({c.request.id for c in decision.chunks}) == len(decision.chunks)
        is_prompt = [c.is_prompt for c in decision.chunks]
        assert is_prompt == sorted(is_prompt), "answers come first"
        chosen = {c.request.id for c in decision.chunks}
        for request in scheduler.running:
            if request.computed >= request.in_chunks:
                assert request.id in chosen, "an answer waits"
        nodes = [*scheduler.prefix.nodes()]
        for node in nodes:
            there = {w > 0: page >= 0 for page, w in zip(node.pages, windows, strict=True)}
            assert there.get(False, True), "a node without the pages of groups without a window"
            assert any(there.values()) or node.children, "a node of nothing"
        kept = {page for node in nodes for page in node.pages} - {-1}
        held: dict[int, int] = {}
        for request in scheduler.running:
            assert len(request.pages) % len(windows) == 0
            assert not any(windows) or request.ahead - request.unseen <= scheduler.most
            for i, page in enumerate(request.pages):
                is_held = request.unseen <= i // len(windows) < request.ahead
                if windows[i % len(windows)] and not is_held:
                    continue  # behind the window, or not computed yet
                held[page] = held.get(page, 0) + 1
                assert held[page] == 1 or page in kept, "a page is written by two"
        assert [pages.holders[p] for p in range(pages.count)] == [
            held.get(p, 0) for p in range(pages.count)
        ]
        for request in scheduler.waiting:
            path = scheduler.prefix.match(request.tokens)
            assert scheduler.prefix.match(request.tokens, request.walk) == path
            full = [[p for p, w in zip(node.pages, windows, strict=True) if not w] for node in path]
            is_held = [all(pages.holders[p] for p in own) for own in full]
            assert is_held == sorted(is_held, reverse=True), "a block is held, one in front not"
        assert not kept & set(pages.free) and not held.keys() & set(pages.free)
        assert len(kept | held.keys()) + len(pages.free) == pages.count, "a page is lost"
        for chunk in decision.chunks:
            tokens = chunk.request.tokens
            assert chunk.start < chunk.stop <= len(chunk.request.pages) // len(windows) * size
            for n in range(chunk.start, chunk.stop + chunk.is_prompt):  # a row of padding behind
                assert min(self.block(chunk.request, n)) >= 0, "a token without a page"
            for n in range(chunk.start):
                for group, page in enumerate(self.block(chunk.request, n)):
                    if (window := windows[group]) and n <= chunk.start - window:
                        continue  # not seen
                    given_back = window and n // size < chunk.request.unseen
                    assert not given_back, "a page that was given back is read"
                    key = self.slots.get((page, n % size))
                    assert key == hash((group, *tokens[: n + 1])), "a wrong key is read"
