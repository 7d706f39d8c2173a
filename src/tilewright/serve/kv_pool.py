"""The pages of the KV cache: an allocator that counts who uses each."""

PAGE_SIZE = 16  # tokens


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
