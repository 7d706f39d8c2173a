"""The pages of the KV cache: an allocator that counts who uses each, and the prefix tree, of pages
that hold the keys and values of known beginnings of prompts.

A node of the tree is a full page, its key the tokens of that page; a path from the root is a
prefix. A running request holds the pages of its path, so what it reads is never evicted. Where
every layer has a sliding window it gives those back that lie behind the window, and a node may lose
its page while later ones stay.
"""

import heapq
from collections.abc import Iterator, Sequence

PAGE_SIZE = 16  # tokens
Key = tuple[int, ...]


class Pages:
    """Which pages are in use. A page is *held* by the requests that read or write it, and may be
    *kept* by the prefix tree; it is free without either."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = list(range(count - 1, -1, -1))
        self.holders = [0] * count
        self.kept = [False] * count
        self.held = 0

    @property
    def available(self) -> int:
        """Pages that no request holds: the free ones, and those that the prefix tree can evict."""
        return self.count - self.held

    def take(self) -> int:
        """A free page, held once."""
        page = self.free.pop()
        self.hold(page)
        return page

    def hold(self, page: int) -> None:
        self.held += self.holders[page] == 0
        self.holders[page] += 1

    def release(self, page: int) -> None:
        assert self.holders[page] > 0, f"page {page} is released more often than held"
        self.holders[page] -= 1
        if self.holders[page] == 0:
            self.held -= 1
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
    """A page with its tokens, after those of its parents. `page`: -1 where it was evicted before
    its children; `parent`: of the root itself; `depth`: pages from the root to it; `used`: the time
    of its last use."""

    __slots__ = ("children", "depth", "key", "page", "parent", "used")

    def __init__(self, key: Key, page: int, parent: "Node | None", used: int) -> None:
        self.key, self.page, self.used = key, page, used
        self.parent, self.depth = (parent, parent.depth + 1) if parent else (self, 0)
        self.children: dict[Key, Node] = {}


class PrefixTree:
    """Pages by the tokens in them and before them. `window`: keys that a token sees (0: all)."""

    def __init__(self, pages: Pages, page_size: int, window: int = 0) -> None:
        self.pages, self.page_size = pages, page_size
        self.window = max(window, page_size) if window else 0
        self.root = Node((), -1, None, 0)
        self.time = 0

    def unseen(self, computed: int) -> int:
        """How many first pages no token sees once so many are computed, nor where the last of them
        is computed again; the last full page is never among them."""
        return max(0, computed - (self.window or computed)) // self.page_size

    def match(self, tokens: Sequence[int]) -> list[Node]:
        """The path of the longest prefix of `tokens` in full pages, of which all that a later token
        sees are there; a last token at least is left out, since its logits are wanted."""
        path: list[Node] = []
        known = missing = 0  # pages of the prefix, and up to the last that is not there
        node, size = self.root, self.page_size
        for begin in range(0, len(tokens) - size, size):
            child = node.children.get(tuple(tokens[begin : begin + size]))
            if child is None:
                break
            path.append(node := child)
            missing = len(path) if node.page < 0 else missing
            known = len(path) if missing <= self.unseen(len(path) * size) else known
        return path[:known]

    def insert(self, parent: Node | None, key: Key, page: int) -> Node:
        """The node of a page after `parent`: one of the same tokens if there is one, else a new one
        that keeps `page`."""
        parent = self.root if parent is None else parent
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, -1, parent, self.time)
        if node.page < 0:
            node.page = page
            self.pages.keep(page)
        return node

    def touch(self, node: Node | None) -> None:
        """Notes that a path was used now."""
        self.time += 1
        while node is not None and node is not self.root:
            node.used = self.time
            node = node.parent

    def evict(self, count: int) -> None:
        """Frees at least `count` pages that no request holds, as far as there are any; the least
        recently used first, children before parents, but for those in front of a held one."""
        holders, front = self.pages.holders, {self.root}
        nodes = [*self.nodes()]
        for node in [n for n in nodes if n.page >= 0 and holders[n.page]] if self.window else ():
            while node.parent not in front:
                front.add(node := node.parent)
        unused = [(n.used, n.page, n) for n in nodes if not n.children or n in front]
        unused = [one for one in unused if one[1] >= 0 and not holders[one[1]]]
        heapq.heapify(unused)
        while unused and count > 0:
            *_, node = heapq.heappop(unused)
            self.pages.evict(node.page)
            node.page, count = -1, count - 1
            while node is not self.root and node.page < 0 and not node.children:
                del node.parent.children[node.key]
                node = node.parent
            if node is not self.root and not (node.children or holders[node.page]):
                heapq.heappush(unused, (node.used, node.page, node))

    def nodes(self) -> Iterator[Node]:
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node
