"""Which pages of a key/value cache are in use, and which hold the beginning of a prompt that other prompts may share."""

from collections import OrderedDict

ROOT = -1  # what stands in a name for the page before the first one


class Pages:
    """The numbers first, …, first + count − 1 of pages that rows take and give back.

    The name of a page is the page before it and its tokens, so that it says the whole beginning of a prompt. keep: a named page that
    no row uses any more keeps its name and content until another one is needed and no page is free.
    """

    def __init__(self, first: int, count: int, keep: bool):
        self.first, self.count, self.keep = first, 0, keep
        self.free: list[int] = []
        self.users: dict[int, int] = {}  # how many rows use a page
        self.names: dict[int, tuple] = {}
        self.named: dict[tuple, int] = {}
        self.idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # kept without a user; those that were given back first are first
        self.extend(count)

    def extend(self, count: int) -> None:
        """Add `count` pages, with the numbers that follow."""
        end = self.first + self.count
        self.free = [*range(end + count - 1, end - 1, -1), *self.free]
        self.count += count

    def take(self) -> int:
        """A page for one row, whose content may be overwritten. The caller makes sure that not all pages are in use."""
        if self.free:
            page = self.free.pop()
        else:  # a page is given back before the one in front of it, so that no name refers to a page with other content
            page, _ = self.idle.popitem(last=False)
            self._forget(page)
        self.users[page] = 1
        return page

    def find(self, before: int, tokens: tuple[int, ...]) -> int | None:
        """The page with these tokens behind the page `before` (or ROOT), or None."""
        return self.named.get((before, tokens))

    def share(self, page: int) -> int:
        """Let one more row use a page that `find` gave; returns it."""
        self.idle.pop(page, None)
        self.users[page] = self.users.get(page, 0) + 1
        return page

    def name(self, page: int, before: int, tokens: tuple[int, ...]) -> None:
        """Let `find` give this page, unless it already gives another one."""
        if (before, tokens) not in self.named:
            self.named[before, tokens] = page
            self.names[page] = before, tokens

    def give_back(self, pages: list[int]) -> None:
        """End a row's use of its pages, which are in the order of its tokens."""
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page]:
                del self.users[page]
                if self.keep and page in self.names:
                    self.idle[page] = None
                else:
                    self._forget(page)
                    self.free.append(page)

    def _forget(self, page: int) -> None:
        if page in self.names:
            del self.named[self.names.pop(page)]
