"""The comparing filters' digests of all traces: columns in unnamed files, mapped, so that memory can be given back."""

import mmap
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_RELEASE = 1 << 16  # rows after which memory is given back


class DigestColumns:
    """By filter, uint8 of shape (rows, WIDTH). The files lie in `folder` and vanish with this object."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self._rows = folder, rows
        self._columns: dict[str, np.ndarray] = {}
        self._pages: list[mmap.mmap] = []

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> "np.ndarray":
        """Of a filter that has no digests: WIDTH 0."""
        import numpy as np

        return self._columns[name] if name in self._columns else np.zeros((self._rows, 0), dtype=np.uint8)

    def add(self, widths: Mapping[str, int]) -> None:
        import numpy as np

        for name, width in widths.items():
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.truncate(self._rows * width)
                self._pages.append(mmap.mmap(file.fileno(), 0))
            self._columns[name] = np.frombuffer(self._pages[-1], dtype=np.uint8).reshape(self._rows, width)

    def fill(self, row: int, found: "Iterable[tuple[str, np.ndarray]]") -> None:
        """The digests of rows `row` and following."""
        for name, digests in found:
            self._columns[name][row : row + len(digests)] = digests
            if row // _RELEASE != (row + len(digests)) // _RELEASE:
                self.release()

    def release(self) -> None:
        """Give the memory back; the digests stay in their files."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for pages in self._pages:
                pages.madvise(mmap.MADV_DONTNEED)
