"""The pages of the KV cache: an allocator that counts who uses each, and the prefix tree, of pages
that hold the keys and values of known beginnings of prompts.

A page has the keys and values of `PAGE_SIZE` tokens in one group of layers, `layer_groups`. All
groups take their pages from one pool; a *block* is a page for each group, of the same tokens. A
request that runs holds the pages of its tokens; of groups with a sliding window only those from the
window to the tokens that are computed next.

A node of the tree is a full block, its key the tokens in it; a path from the root is a prefix. What
a running request reads is never evicted. A node may lose its pages of groups with a window while
the others, and later nodes, stay.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PAGE_SIZE = 16  # tokens
Key = tuple[int, ...]


def layer_groups(windowed: Sequence[bool]) -> list[int]:
    """The group of each layer. A group has layers of one kind, with a window or without, and at
    most as many as there are of the rarer kind, so that few layers of a page are unused."""
    sizes = [windowed.count(kind) for kind in (False, True)]
    counts = [-(-size // min(filter(None, sizes))) for size in sizes]
    before = [windowed[:i].count(kind) for i, kind in enumerate(windowed)]
    return [kind * counts[0] + n % counts[kind] for kind, n in zip(windowed, before, strict=True)]


class Pages:
    """Which pages are in use. A page is *held* by the requests that read or write it, and may be
    *kept* by the prefix tree; it is free without either."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = list(range(count - 1, -1, -1))
        self.holders = [0] * count
        self.kept = [False] * count
        self.windowed = [False] * count  # of a group with a window, while it is in use
        self.held = self.held_windowed = 0

    def take(self, windowed: bool = False) -> int:
        """A free page, held once."""
        page = self.free.pop()
        self.windowed[page] = windowed
        self.hold(page)
        return page

    def hold(self, page: int) -> None:
        if self.holders[page] == 0:
            self.held, self.held_windowed = self.held + 1, self.held_windowed + self.windowed[page]
        self.holders[page] += 1

    def release(self, page: int) -> None:
        assert self.holders[page] > 0, f"page {page} is released more often than held"
        self.holders[page] -= 1
        if self.holders[page] == 0:
            self.held, self.held_windowed = self.held - 1, self.held_windowed - self.windowed[page]
            if not self.kept[page]:
                self.free.append(page)

    def keep(self, page: int) -> None:
        """The prefix tree keeps a page that a request holds."""
        assert self.holders[page] and not self.kept[page]
        self.kept[page] = True

    def evict(self, page: int) -> None:
        """The prefix tree gives up a page that no request holds."""
        assert self.kept[page] and not self.holders[page]
        self.kept[page] = False
        self.free.append(page)


class Node:
    """A block with its tokens, after those of its parents. `pages`: by group, -1 where one was
    evicted; `parent`: of the root itself; `depth`: blocks from the root to it. Times of the last
    use: `used`, and `seen` through a window."""

    __slots__ = ("children", "depth", "key", "pages", "parent", "seen", "used")

    def __init__(self, key: Key, groups: int, parent: "Node | None", used: int) -> None:
        self.key, self.pages, self.used, self.seen = key, [-1] * groups, used, used
        self.parent, self.depth = (parent, parent.depth + 1) if parent else (self, 0)
        self.children: dict[Key, Node] = {}


@dataclass(slots=True)
class Walk:
    """How far a request has followed the tree: `path`, of which the first `known` blocks are the
    longest known prefix and the last of those that are not whole is number `missing`."""

    path: list[Node] = field(default_factory=list)
    known: int = 0
    missing: int = 0
    changes: int = 0


class PrefixTree:
    """Blocks by the tokens in them and before them. `windows`: keys that a token sees in the layers
    of each group (0: all)."""

    def __init__(self, pages: Pages, page_size: int, windows: Sequence[int] = (0,)) -> None:
        self.pages, self.page_size, self.count = pages, page_size, len(windows)
        self.groups = [[g for g, w in enumerate(windows) if bool(w) == kind] for kind in (0, 1)]
        self.window = max(*windows, page_size) if any(windows) else 0
        self.root = Node((), self.count, None, 0)
        self.time = 0
        self.changes = 0  # of the pages of groups with a window, in nodes that stay

    def unseen(self, computed: int) -> int:
        """How many first blocks no token sees through a window once so many are computed, nor where
        the last of them is computed again; the last full block is never among them."""
        return max(0, computed - (self.window or computed)) // self.page_size

    def part(self, pages: Sequence[int], begin: int, end: int, windowed: bool) -> list[int]:
        """Of the pages of blocks, one behind the other, in blocks begin … end - 1 those of groups
        with a window, or of those without."""
        n = self.count
        return [p for g in self.groups[windowed] for p in pages[begin * n + g : end * n : n]]

    def match(self, tokens: Sequence[int], walk: Walk | None = None) -> list[Node]:
        """The path of the longest prefix of `tokens` in full blocks, of which all that a later
        token sees is there; a last token at least is left out, since its logits are wanted. `walk`:
        of the same tokens before, perhaps one more, which was lost; this one goes on where it
        ended, if the tree still has that."""
        walk = Walk() if walk is None else walk
        if walk.changes != self.changes or len(walk.path) * self.page_size >= len(tokens):
            walk.path, walk.known, walk.missing, walk.changes = [], 0, 0, self.changes
        path, size = walk.path, self.page_size
        while path and max(path[-1].pages) < 0:  # evicted with all behind it
            path.pop()
        for begin in range(len(path) * size, len(tokens) - size, size):
            node = path[-1] if path else self.root
            child = node.children.get(tuple(tokens[begin : begin + size]))
            if child is None:
                break
            path.append(child)
            walk.missing = len(path) if min(child.pages) < 0 else walk.missing
            walk.known = len(path) if walk.missing <= self.unseen(len(path) * size) else walk.known
        return path[: walk.known]

    def insert(self, parent: Node | None, key: Key, pages: Sequence[int]) -> Node:
        """The node of a block after `parent`: one of the same tokens if there is one, else a new
        one; it keeps those of `pages` that it lacks."""
        parent = self.root if parent is None else parent
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, self.count, parent, self.time)
        elif min(node.pages) < 0:
            self.changes += 1
        for group, page in enumerate(pages):
            if node.pages[group] < 0:
                node.pages[group] = page
                self.pages.keep(page)
        return node

    def touch(self, node: Node | None) -> None:
        """Notes that a path was used now, and its last blocks through a window."""
        self.time += 1
        unseen = self.unseen(node.depth * self.page_size) if node else 0
        while node is not None and node is not self.root:
            node.used, node.seen = self.time, self.time if node.depth > unseen else node.seen
            node = node.parent

    def evict(self, count: int) -> None:
        """Frees at least `count` pages that no request holds, as far as there are any, the least
        recently used first: those of groups with a window before their children, others after."""
        unused = [one for node in self.nodes() for one in self._unused(node)]
        heapq.heapify(unused)
        self.changes += self.window > 0
        while unused and count > 0:
            *_, groups, node = heapq.heappop(unused)
            for group in groups:
                self.pages.evict(node.pages[group])
                node.pages[group], count = -1, count - 1
            while node is not self.root and max(node.pages) < 0 and not node.children:
                del node.parent.children[node.key]
                node = node.parent
            for one in self._unused(node):
                if one[2] is self.groups[0]:  # else it is there already
                    heapq.heappush(unused, one)

    def _unused(self, node: Node) -> list[tuple[int, int, list[int], Node]]:
        """What can be evicted of a node next, if any: time of its last use, a page, the groups."""
        every, windowed = self.groups
        if windowed and node.pages[windowed[0]] >= 0:
            used, groups = node.seen, windowed
        else:
            used, groups = node.used, [] if node.children else every
        page = node.pages[groups[0]] if groups else -1
        return [(used, page, groups, node)] if page >= 0 and not self.pages.holders[page] else []

    def nodes(self) -> Iterator[Node]:
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node
