"""The scheduler on a virtual clock: traces worked by hand, and invariants on random ones.

A line of a trace: step, chunks as request[start:stop], +admitted, -preempted.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.serve.virtual import Arrival, Clock, token_after

from tilewright.serve.kv_pool import Node, Pages, PrefixTree, layer_groups
from tilewright.serve.scheduler import PATIENCE, PENDING, Limits


def span(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


TRACES = {
    "a long prompt is read in chunks, a short one joins it": (
        Limits(16, running=4, step_tokens=8, page_size=4),
        [Arrival(span(10), 3), Arrival(span(3, 50), 2)],
        ["1: 0[0:8] +0", "2: 0[8:10] 1[0:3] +1", "3: 0[10:11] 1[3:4]", "4: 0[11:12]"],
    ),
    "answers come before prompts": (
        Limits(32, running=4, step_tokens=6, page_size=4),
        [Arrival(span(4), 4), Arrival(span(9, 50), 1, at=2)],
        ["1: 0[0:4] +0", "2: 0[4:5] 1[0:5] +1", "3: 0[5:6] 1[5:9]", "4: 0[6:7]"],
    ),
    "no more than `running` at once": (
        Limits(32, running=2, step_tokens=32, page_size=4),
        [Arrival(span(4), 2), Arrival(span(4, 50), 1), Arrival(span(4, 70), 1)],
        ["1: 0[0:4] 1[0:4] +0 +1", "2: 0[4:5] 2[0:4] +2"],
    ),
    # 7 pages of 4: both have 3 from the start; at 13 tokens each wants a fourth, one is left. The
    # later one waits; it is admitted when 0 is done, and knows the 12 tokens it had read.
    "preemption": (
        Limits(7, running=4, step_tokens=16, page_size=4),
        [Arrival(span(8), 9), Arrival(span(8, 50), 8)],
        ["1: 0[0:8] 1[0:8] +0 +1", "2: 0[8:9] 1[8:9]", "3: 0[9:10] 1[9:10]",
         "4: 0[10:11] 1[10:11]", "5: 0[11:12] 1[11:12]", "6: 0[12:13] -1", "7: 0[13:14]",
         "8: 0[14:15]", "9: 0[15:16]", "10: 1[12:13] +1", "11: 1[13:14]", "12: 1[14:15]"],
    ),
    # The same without a prefix tree: all is read again, the prompt as a chunk, the answer token by
    # token, as it was written.
    "recompute": (
        Limits(7, running=4, step_tokens=16, share=False, page_size=4),
        [Arrival(span(8), 9), Arrival(span(8, 50), 6)],
        ["1: 0[0:8] 1[0:8] +0 +1", "2: 0[8:9] 1[8:9]", "3: 0[9:10] 1[9:10]",
         "4: 0[10:11] 1[10:11]", "5: 0[11:12] 1[11:12]", "6: 0[12:13] -1", "7: 0[13:14]",
         "8: 0[14:15]", "9: 0[15:16]", "10: 1[0:8] +1", "11: 1[8:9]", "12: 1[9:10]",
         "13: 1[10:11]", "14: 1[11:12]", "15: 1[12:13]"],
    ),
    "recompute at once": (
        Limits(7, running=4, step_tokens=16, share=False, invariant=False, page_size=4),
        [Arrival(span(8), 9), Arrival(span(8, 50), 6)],
        ["1: 0[0:8] 1[0:8] +0 +1", "2: 0[8:9] 1[8:9]", "3: 0[9:10] 1[9:10]",
         "4: 0[10:11] 1[10:11]", "5: 0[11:12] 1[11:12]", "6: 0[12:13] -1", "7: 0[13:14]",
         "8: 0[14:15]", "9: 0[15:16]", "10: 1[0:13] +1"],
    ),
    # Request 1 has two full pages of 0's prompt; 2 has two pages in all, of which the second is
    # read for its last token.
    "equal beginnings": (
        Limits(16, running=4, step_tokens=16, page_size=4),
        [Arrival(span(10), 2), Arrival([*span(9), 77, 78], 2, at=2), Arrival(span(8), 1, at=3)],
        ["1: 0[0:10] +0", "2: 0[10:11] 1[8:11] +1", "3: 1[11:12] 2[4:8] +2"],
    ),
    # 4 pages: request 1 wants 3, two are free, so the deeper of 0's two pages is evicted.
    "eviction": (
        Limits(4, running=2, step_tokens=16, page_size=4),
        [Arrival(span(9), 1), Arrival(span(9, 50), 1, at=2), Arrival(span(9), 1, at=3)],
        ["1: 0[0:9] +0", "2: 1[0:9] +1", "3: 2[4:9] +2"],
    ),
    # One page more than is free: that of 1 goes, since 0 used its own later, though it came first.
    "the last use counts": (
        Limits(6, running=4, step_tokens=20, page_size=4),
        [Arrival(span(5), 3), Arrival(span(5, 50), 1, at=2), Arrival(span(17, 70), 1, at=4),
         Arrival(span(5), 1, at=5)],
        ["1: 0[0:5] +0", "2: 0[5:6] 1[0:5] +1", "3: 0[6:7]", "4: 2[0:17] +2", "5: 3[4:5] +3"],
    ),
    # One seat. 2 is urgent and takes it from 0, which goes on before 1; its first page is known.
    "priority": (
        Limits(16, running=1, step_tokens=8, page_size=4),
        [Arrival(span(6), 4), Arrival(span(4, 50), 1, at=2),
         Arrival(span(4, 70), 2, at=3, priority=5)],
        ["1: 0[0:6] +0", "2: 0[6:7]", "3: 2[0:4] +2 -0", "4: 2[4:5]", "5: 0[4:6] +0", "6: 0[6:7]",
         "7: 0[7:8]", "8: 0[8:9]", "9: 1[0:4] +1"],
    ),
    # 0 ends in the middle of its prompt, 1 in its answer, 3 before it is admitted.
    "cancel": (
        Limits(16, running=2, step_tokens=8, page_size=4),
        [Arrival(span(12), 4, cancel=2), Arrival(span(4, 50), 5, cancel=4),
         Arrival(span(4, 70), 2), Arrival(span(4, 90), 2, at=2, cancel=3)],
        ["1: 0[0:8] +0", "2: 1[0:4] 2[0:4] +1 +2", "3: 1[4:5] 2[4:5]", "4:"],
    ),
    # 4 pages, of which a window of 6 needs three. Request 1 reads 20 tokens: in step 6 it takes the
    # page of the first four from the tree. 2 needs only the two pages behind it, 3 reads all anew.
    "a window": (
        Limits(4, running=1, step_tokens=16, page_size=4, windows=(6,)),
        [Arrival(span(13), 1), Arrival(span(13), 8, at=2), Arrival(span(13), 1, at=10),
         Arrival(span(9), 1, at=11)],
        ["1: 0[0:13] +0", "2: 1[12:13] +1", "3: 1[13:14]", "4: 1[14:15]", "5: 1[15:16]",
         "6: 1[16:17]", "7: 1[17:18]", "8: 1[18:19]", "9: 1[19:20]", "10: 2[12:13] +2",
         "11: 3[0:9] +3"],
    ),
    # Layers of two kinds, a block has two pages. Request 0 grows to five blocks with nine pages: in
    # step 5 the page behind the window of its first block is evicted for its last. 1 needs none but
    # the two that its window shows; 2 sees that first one and reads all anew.
    "a window in some layers": (
        Limits(9, running=1, step_tokens=16, page_size=4, windows=(0, 6)),
        [Arrival(span(13), 8), Arrival(span(13), 1, at=9), Arrival(span(9), 1, at=10)],
        ["1: 0[0:13] +0", "2: 0[13:14]", "3: 0[14:15]", "4: 0[15:16]", "5: 0[16:17]",
         "6: 0[17:18]", "7: 0[18:19]", "8: 0[19:20]", "9: 1[12:13] +1", "10: 2[0:9] +2"],
    ),
    # 16 pages: eleven for all tokens in the layers that see them all, five in the others, where two
    # chunks and the window lie in no more blocks at once. 1 has to wait for three and one of them.
    "a prompt that is longer than its window": (
        Limits(16, running=2, step_tokens=8, page_size=4, windows=(0, 6)),
        [Arrival(span(40), 2), Arrival(span(9, 50), 1)],
        ["1: 0[0:8] +0", "2: 0[8:16]", "3: 0[16:24]", "4: 0[24:32]", "5: 0[32:40]", "6: 0[40:41]",
         "7: 1[0:8] +1", "8: 1[8:9]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACES)
def test_traces_worked_by_hand(name: str):
    limits, arrivals, wanted = TRACES[name]
    clock = Clock(limits, arrivals)
    clock.run()
    assert clock.log == wanted


def random_trace(seed: int, kind: str = "keys") -> tuple[Limits, list[Arrival]]:
    """Few pages, equal beginnings, priorities and cancels."""
    rng = np.random.default_rng(seed)

    def upto(most: int) -> int:
        return int(rng.integers(1, most + 1))

    size, running, longest = int(rng.choice([1, 2, 4, 16])), upto(5), 3 + upto(56)
    of = {"keys": (0,), "windows": (1,), "both": rng.permutation([0, 0, 1, 1, 1][upto(4) :])}[kind]
    windows = tuple([upto(20) if windowed else 0 for windowed in of])
    least = (-(-longest // size) + 1) * len(windows)
    limits = Limits(
        int(rng.integers(least, 4 * least + 2)), running, running + upto(20),
        bool(rng.integers(2)), bool(rng.integers(2)), size, windows,
    )  # fmt: skip
    stems = rng.integers(0, 3, (2, 60)).tolist()
    arrivals = []
    for _ in range(upto(10)):
        count = upto(longest - 1)
        stem = stems[rng.integers(2)][: int(rng.integers(0, count + 1))]
        prompt = stem + rng.integers(0, 3, count - len(stem)).tolist()
        priority, cancel = int(rng.choice([0, 0, 0, 1, 5])), int(rng.choice([0, 0, 0, upto(60)]))
        arrivals.append(Arrival(prompt, upto(longest - count + 1), upto(30), priority, cancel))
    return limits, arrivals


def alone(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(token_after(tokens))
    return tokens


@pytest.mark.parametrize("kind", ["keys", "windows", "both"])
def test_random_traces(kind: str):
    """Invariants of every step (`Clock.check`), the tokens that each request has alone, and a
    replay equal to the byte."""
    preemptions = cached = 0
    for seed in range(300):
        limits, arrivals = random_trace(seed, kind)
        clock, again = Clock(limits, arrivals), Clock(limits, arrivals)
        for request, arrival in zip(clock.run(), arrivals, strict=True):
            if request.finish == "length":
                assert request.tokens == alone(arrival.prompt, arrival.answer), seed
            else:
                assert arrival.cancel and request.finish == "cancel"
        again.run()
        assert "\n".join(again.log) == "\n".join(clock.log)
        preemptions += clock.scheduler.preemptions
        cached += sum(r.cached for r in clock.requests)
    assert preemptions > 50 and cached > 1000, "the traces are too easy"


@pytest.mark.parametrize("windows", [(0,), (4,), (5,), (6,), (7,), (8,), (0, 5), (6, 0, 6)])
def test_a_step_that_fails_is_decided_again(windows: tuple[int, ...]):
    """Neither what was not committed nor a token that was lost after commit leaves a trace."""
    limits = Limits(16 * len(windows), 4, 8, page_size=4, windows=windows)
    clock = Clock(limits, [Arrival(span(10), 6), Arrival(span(3, 50), 5)])
    step = clock.step

    def failing() -> None:
        scheduler = clock.scheduler
        if scheduler.step in (1, 5):
            scheduler.schedule()
        if scheduler.step in (2, 8):
            decision = scheduler.schedule()
            for chunk in decision.chunks:
                clock.write(chunk)
            scheduler.commit(decision)
        step()

    clock.step = failing
    for request, prompt, count in zip(clock.run(), (span(10), span(3, 50)), (6, 5), strict=True):
        assert request.tokens == alone(prompt, count)


@pytest.mark.parametrize("invariant", [False, True])
def test_a_token_that_is_lost_when_its_request_was_preempted(invariant: bool):
    """By a step that was to be launched ahead of the token, which then never came."""
    limits = Limits(7, 4, 16, invariant=invariant, page_size=4)
    clock = Clock(limits, [Arrival(span(8), 9), Arrival(span(8, 50), 8)])
    step = clock.step

    def losing() -> None:
        scheduler = clock.scheduler
        if scheduler.step != 4:
            return step()
        ready = scheduler.commit(scheduler.schedule())
        for request in ready:
            request.tokens.append(PENDING)
        assert scheduler.schedule().preempted == (1,)
        for request in ready:
            request.tokens.pop()

    clock.step = losing
    for request, prompt, count in zip(clock.run(60), (span(8), span(8, 50)), (9, 8), strict=True):
        assert request.tokens == alone(prompt, count)


def test_nobody_waits_for_ever():
    """Urgent requests keep coming to the one seat; waiting raises the rank of the patient one."""
    urgent = [Arrival(span(4, 10 * n), 1, at=n, priority=2) for n in range(1, 3 * PATIENCE)]
    clock = Clock(Limits(64, 1, 8, page_size=4), [Arrival(span(4), 3), *urgent])
    clock.run()
    first = next(n for n, line in enumerate(clock.log) if " 0[" in f" {line} ")
    assert PATIENCE < first <= 2 * PATIENCE + 1


def test_the_least_recently_used_is_evicted_first():
    """Three chains of two pages; the second is used again, so that the first goes first, its leaf
    before its root; a page that a request holds stays."""
    pages = Pages(6)
    tree = PrefixTree(pages, 2)
    chains = []
    for n in (10, 20, 30):
        a = tree.insert(None, (n, n), [pages.take()])
        chains.append((a, tree.insert(a, (n + 1, n + 1), [pages.take()])))
        tree.touch(chains[-1][1])
    for _, leaf in chains:
        pages.release(leaf.pages[0])
        pages.release(leaf.parent.pages[0])
    assert pages.count - pages.held == 6 and not pages.free
    tree.touch(chains[0][1])
    pages.hold(chains[2][0].pages[0])
    wanted = [chains[1][1], chains[1][0], chains[2][1], chains[0][1], chains[0][0]]
    wanted, left = [n.pages[0] for n in wanted], chains[2][0]
    order = []
    for _ in range(5):
        tree.evict(1)
        order.append(pages.free[-1])
    assert order == wanted
    tree.evict(1)
    assert len(pages.free) == 5 and tree.match([30, 30, 1]) == [left]


def test_pages_behind_a_window_are_evicted_first():
    """Three groups, of which the first sees all: of a path of five blocks those behind the window
    of its end go first, then those in it, then the others from the end on; a longer prefix than the
    window shows is known all the while."""
    pages = Pages(15)
    tree = PrefixTree(pages, 2, (0, 4, 3))
    nodes = list[Node]()
    for n in range(5):
        block = [pages.take() for _ in range(3)]
        nodes.append(tree.insert(nodes[-1] if nodes else None, (n, n), block))
    tokens = [*np.repeat(range(5), 2).tolist(), 9]
    tree.touch(nodes[4])
    for node in nodes:
        for page in node.pages:
            pages.release(page)
    whole = [node.pages.copy() for node in nodes]
    order = []
    while pages.count - pages.held > len(pages.free):
        known = len(tree.match(tokens))
        assert known == (5 if len(order) < 4 else 0), order
        tree.evict(1)
        gone = pages.free[sum(map(len, order)) :]
        order.append(gone)
    windows = [block[1:] for block in whole]
    assert sorted(order[:3]) == windows[:3] and sorted(order[3:5]) == windows[3:]
    assert order[5:] == [block[:1] for block in whole[::-1]] and not [*tree.nodes()]


@pytest.mark.parametrize(("full", "windowed", "sizes"), [
    (4, 0, [4]), (0, 5, [5]), (13, 13, [13, 13]), (5, 2, [2, 2, 1, 2]),
    (4, 22, [4, 4, 4, 4, 4, 3, 3]),
])  # fmt: skip
def test_groups_of_layers(full: int, windowed: int, sizes: list[int]):
    kinds = np.random.default_rng(full).permutation([False] * full + [True] * windowed).tolist()
    of = layer_groups(kinds)
    assert [of.count(group) for group in range(max(of) + 1)] == sizes
    assert all(kinds[i] == kinds[j] for i in range(len(of)) for j in range(i) if of[i] == of[j])
