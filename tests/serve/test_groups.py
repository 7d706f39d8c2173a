"""Which answers share the reads of their prefix: hand-worked steps, and random ones."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.serve import cascade
from tilewright.serve.cascade import Groups, group

PAGE = (
    64 << 10
)  # bytes of a page of 16 tokens: 8 heads × 128, bfloat16; 12 pay for a row, 480 for a launch


def prefix(number: int, pages: int) -> list[int]:
    return list(range(10_000 * number, 10_000 * number + pages))


def grouped(pages: list[list[int]], page_bytes: int = PAGE) -> Groups:
    """Groups of answers that write the last of their pages."""
    return group(pages, [len(own) - 1 for own in pages], page_bytes)


def test_many_on_a_long_prefix():
    """64 × (8192 + 256): all of them, and the pages behind 512 are their own."""
    made = grouped([prefix(1, 512) + prefix(2 + i, 17) for i in range(64)])
    assert made == (list(range(64)), ((0, 64, 512),), 64, 63 * 512)


def test_short_prefixes_and_few_answers_are_read_flat():
    for count, pages in ((4, 128), (16, 32), (1, 4096), (0, 0)):  # 4 × (2048 …), 16 × (512 …)
        made = grouped([prefix(1, pages) + prefix(2 + i, 17) for i in range(count)])
        assert made == (range(count), (), 0, 0)


def test_two_groups_and_two_answers_alone():
    """Rows are in the order of the first answer of each group; those alone come last."""
    a, b = prefix(1, 900), prefix(2, 700)
    made = grouped([[*a, 7, 1], [5], [*b, 2], [*a, 8], [*b, 9], [*a, 7, 3], [6]])
    assert made == ([0, 3, 5, 2, 4, 1, 6], ((0, 3, 900), (3, 5, 700), (5, 7, 0)), 5, 2500)


def test_a_system_prompt_of_all_and_documents_of_some():
    """Groups have one level, that which saves more: the documents, or a system prompt that is
    longer than what they add for seven of eight rows."""
    for system, document, nodes in (
        (100, 600, ((0, 8, 700), (8, 16, 700))), (300, 600, ((0, 8, 900), (8, 16, 900))),
        (600, 30, ((0, 16, 600),)),
    ):  # fmt: skip
        own = [[*prefix(2 + i // 8, document), 90_000 + i, 1] for i in range(16)]
        assert grouped([prefix(1, system) + pages for pages in own]).nodes == nodes


def test_a_group_pays_for_the_joins_of_all_rows():
    """Two of 66 share 20 000 tokens: less than joining all rows costs."""
    two = [[*prefix(1, 1260), 1], [*prefix(1, 1260), 2]]
    assert grouped(two).saved == 1260
    assert not grouped(two + [prefix(9 + i, 3) for i in range(64)]).nodes


def test_the_page_being_written_is_not_shared():
    """Equal pages of which the last is not full for one answer."""
    pages = [prefix(1, 1000)] * 3
    assert group(pages, [1000, 999, 998], PAGE).nodes == ((0, 3, 998),)


def common(pages: list[list[int]], full: list[int], rows: list[int]) -> int:
    count = 0
    while all(full[i] > count and pages[i][count] == pages[rows[0]][count] for i in rows):
        count += 1
    return count


@pytest.mark.parametrize("seed", range(60))
def test_random_answers(monkeypatch: pytest.MonkeyPatch, seed: int):
    """Each row in one node, nodes side by side, their pages common and full; all that is joined
    pays, and no prefix of another length saves more."""
    rng = np.random.default_rng(seed)
    join, launch = float(rng.choice([0.0, 0.4, 1.0, 2.5])), int(rng.choice([0, 0, 4]))
    monkeypatch.setattr(cascade, "JOIN_BYTES", join * 1000)
    monkeypatch.setattr(cascade, "LAUNCH_BYTES", launch * 1000)
    count = int(rng.integers(0, 8))
    pages = [rng.integers(0, 2, rng.integers(1, 12)).tolist() for _ in range(count)]
    full = [int(rng.integers(0, len(own) + 1)) for own in pages]
    made = group(pages, full, 1000)
    assert sorted(made.order) == list(range(count))
    ends = [0, *(end for _, end, _ in made.nodes)]
    assert [begin for begin, _, _ in made.nodes] == ends[:-1] and ends[-1] in (0, count)
    assert (ends[-1] == count) == bool(made.nodes) or not count
    saved = rows = 0
    for n, (begin, end, pages_of_node) in enumerate(made.nodes):
        members = [made.order[row] for row in range(begin, end)]
        assert members == sorted(members) and begin < end
        if pages_of_node:
            assert len(members) > 1 and pages_of_node == common(pages, full, members)
            saved, rows = saved + (end - begin - 1) * pages_of_node, rows + end - begin
        else:
            assert n == len(made.nodes) - 1
    assert (made.rows, made.saved) == (rows, saved)

    # The most that prefixes of a length save, by another way: pairs of answers.
    first, most = int(join) + 1, 0.0
    while first <= max(full, default=0):
        classes = {
            tuple(
                j for j in range(count) if full[j] >= first and pages[i][:first] == pages[j][:first]
            )
            for i in range(count)
        }
        gains = [(len(c) - 1) * common(pages, full, list(c)) for c in classes if len(c) > 1]
        pay = [len(c) * join for c in classes if len(c) > 1]
        most = max(most, sum(g for g, p in zip(gains, pay, strict=True) if g > p))
        first *= 2
    assert saved == (most if most > launch + join * count else 0)
    if not made.nodes:
        assert made.order == range(count)


def test_what_pays_was_faster():
    """Figures of decode-attention.md on an H200: requests, prefix, µs of a cascade and flat. All
    that is shared gained; what is not would have gained less than 5 %."""
    for requests, tokens, joined, flat in (
        (16, 2048, 17.3, 33.8), (64, 8192, 61.4, 391), (256, 8192, 176.3, 1541),
        (64, 32768, 118.9, 1736), (32, 1024, 21.7, 33.7), (16, 4096, 18.8, 55.6),
        (16, 1024, 13.0, 18.9), (16, 512, 12.4, 12.9), (64, 512, 32.7, 39.8), (4, 2048, 14.8, 14.0),
        (8, 512, 12.0, 10.4), (2, 2048, 13.8, 11.3),
    ):  # fmt: skip
        made = grouped([prefix(1, tokens // 16) + prefix(2 + i, 17) for i in range(requests)])
        assert bool(made.nodes) == (1.05 * joined < flat), (requests, tokens)
