"""Who holds which page of the cache, and which pages can be found again by the tokens in them.

A page that has been filled is entered in an index under (the page before it, its tokens), so sequences that begin alike
share pages: the samples of one problem, the turns of one conversation. Pages that nobody holds keep their content until
they are needed for something else, the longest unused first. Keys hold the tokens themselves, not a hash of them: no
prompt can be made to collide with another's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

_Key = tuple[int, tuple[int, ...]]


class PagePool:
    """Pages 1 to `pages`, counted by how many sequences hold each."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size
        self._blank = list(range(pages, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # indexed pages that nobody holds, longest unused first
        self._holders = [0] * (pages + 1)
        self._page_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        # What names a page as another's predecessor: its own number would come again after it is reused.
        self._serial_of: dict[int, int] = {}
        self._serials = 0
        self._drafted: set[int] = set()  # indexed pages that hold the draft module's latents too

    @property
    def available(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._blank) + len(self._idle)

    def take(self) -> int:
        """A page to write to, held once. There must be one available."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            del self._serial_of[page]
            self._drafted.discard(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more sequence holds the page."""
        if self._holders[page] == 0:
            del self._idle[page]
        self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One sequence fewer holds each of these; its last page is the first to be reused."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def find(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        """The indexed pages that hold the beginning of `tokens`, at most `most` of them, and the last one's serial."""
        pages: list[int] = []
        serial, size = 0, self.page_size
        for start in range(0, min(most * size, len(tokens) - size + 1), size):
            page = self._page_of.get((serial, tuple(tokens[start : start + size])))
            if page is None:
                break
            pages.append(page)
            serial = self._serial_of[page]
        return pages, serial

    def undrafted(self, pages: Sequence[int]) -> int:
        """How many of these pages come up to and with the last one without the draft module's latents."""
        return next((len(pages) - n for n, page in enumerate(reversed(pages)) if page not in self._drafted), 0)

    def index(self, page: int, before: int, tokens: Sequence[int], drafted: bool = False) -> int:
        """Enter a full page that follows the page with serial `before` (0: it is the first); returns its serial.

        `drafted`: it holds the draft module's latents too (the last one's as if the next token were this sequence's).

        If another page with this content is known already, that one stays and its serial is returned.
        """
        key = (before, tuple(tokens))
        known = self._page_of.get(key)
        if known is not None:
            return self._serial_of[known]
        assert page not in self._key_of, "a page is indexed once"
        self._serials += 1
        self._page_of[key], self._key_of[page], self._serial_of[page] = page, key, self._serials
        if drafted:
            self._drafted.add(page)
        return self._serials
