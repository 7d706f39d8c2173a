"""Which answers share the reads of their prefix: hand-worked steps, and random ones."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.serve import cascade
from tilewright.serve.cascade import JOIN_BYTES, Groups, group

PAGE = 64 << 10  # bytes of a page of 16 tokens: 8 heads × 128, bfloat16; 256 of them pay for a row


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
    for count, pages in ((16, 128), (16, 32), (1, 4096), (0, 0)):  # 16 × (2048 …), 16 × (512 …)
        made = grouped([prefix(1, pages) + prefix(2 + i, 17) for i in range(count)])
        assert made == (range(count), (), 0, 0)


def test_two_groups_and_two_answers_alone():
    """Rows are in the order of the first answer of each group; those alone come last."""
    a, b = prefix(1, 900), prefix(2, 700)
    made = grouped([[*a, 7, 1], [5], [*b, 2], [*a, 8], [*b, 9], [*a, 7, 3], [6]])
    assert made == ([0, 3, 5, 2, 4, 1, 6], ((0, 3, 900), (3, 5, 700), (5, 7, 0)), 5, 2500)


def test_a_system_prompt_of_all_and_documents_of_some():
    """A short one is left out, where the documents behind it pay; a long one is all that counts:
    groups have one level."""
    for system, nodes in ((100, ((0, 8, 700), (8, 16, 700))), (300, ((0, 16, 300),))):
        pages = [[*prefix(1, system), *prefix(2 + i // 8, 600), 90_000 + i, 1] for i in range(16)]
        assert grouped(pages).nodes == nodes


def test_a_group_pays_for_the_joins_of_all_rows():
    """Two of 66 share 33 000 tokens: less than joining all rows costs."""
    two = [[*prefix(1, 2060), 1], [*prefix(1, 2060), 2]]
    assert grouped(two).saved == 2060
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
    """Each row in one node, nodes side by side, their pages common and full; answers that
    begin alike are together; all that is joined pays."""
    rng = np.random.default_rng(seed)
    join = float(rng.choice([0.0, 0.4, 1.0, 2.5]))
    monkeypatch.setattr(cascade, "JOIN_BYTES", join * 1000)
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

    node_of = {made.order[row]: node for node in made.nodes for row in range(*node[:2])}
    least = int(join) + 1
    for i in range(count):
        for j in range(i):
            alike = min(full[i], full[j]) >= least and pages[i][:least] == pages[j][:least]
            if made.nodes and (alike or node_of[i] == node_of[j]):
                assert node_of[i] == node_of[j] and (alike or node_of[i][2] == 0)
    if made.nodes:
        assert saved > join * count
        assert all(
            (end - begin - 1) * n > join * (end - begin) for begin, end, n in made.nodes if n
        )
    else:
        assert made.order == range(count)


def test_the_source_of_the_threshold():
    """Figures of decode-attention.md: requests, prefix, µs of a cascade and flat. What does not pay
    by the constant was slower; of the others the first saved too little to be sure of."""
    assert JOIN_BYTES == 16 << 20
    rows = ((16, 2048, 56, 36), (64, 8192, 126, 393), (256, 8192, 370, 1541))
    for requests, tokens, joined, flat in (*rows, (64, 32768, 321, 1728), (16, 512, 44, 17)):
        made = grouped([prefix(1, tokens // 16) + prefix(2 + i, 17) for i in range(requests)])
        assert bool(made.nodes) == (joined < flat)
