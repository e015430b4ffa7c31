"""Live progress of a stage: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_EVERY_SECONDS = 5.0
BEAT_EVERY_SECONDS = 2.0


class Progress:
    """Context manager that shows stage, done/total, rate and ETA on stderr.

    `done` is what an earlier attempt finished: it counts towards done/total, not towards the rate.
    `beat` is called every two seconds or so from advance(); RunFolder uses it to keep a stage's seconds over a kill.
    """

    def __init__(
        self, stage: str, total: int | None, unit: str, *, done: int = 0, beat: Callable[[], None] | None = None
    ) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self._resumed = done
        self._beat = beat
        self._fields: dict[str, Any] = {}
        self._rate: float | None = None
        self._below: Sequence[str] = ()
        self._bar: Any = None
        self._printed: int | None = None
        self._start = self._last_line = self._last_beat = time.monotonic()

    def __enter__(self) -> "Progress":
        self._start = self._last_line = self._last_beat = time.monotonic()
        if sys.stderr.isatty():
            self._open_bar()
        elif self.done:
            self._print_line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self.done != self._printed:
            self._print_line()

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Count `n` more finished units; `fields` (loss=..., accuracy=...) are shown beside the rate until replaced."""
        self.done += n
        self._fields.update(fields)
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, text=self._text(now))
        elif now - self._last_line >= PLAIN_EVERY_SECONDS:
            self._print_line()
        if self._beat is not None and now - self._last_beat >= BEAT_EVERY_SECONDS:
            self._last_beat = now
            self._beat()

    @property
    def on_terminal(self) -> bool:
        return self._bar is not None

    def tell(self, rate: float | None, below: Sequence[str]) -> None:
        """From the next advance() on: the rate to show and to take the ETA from, where the caller knows a better one
        than the mean since the start; and what to say besides, in lines below the bar or on the plain line."""
        self._rate, self._below = rate, below

    def line(self, now: float) -> str:
        count = f"{self.done}/{self.total}" if self.total is not None else f"{self.done}"
        return "  ".join([f"{self.stage}  {count} {self.unit}  {self._text(now)}", *self._below])

    def _text(self, now: float) -> str:
        elapsed = max(now - self._start, 1e-9)
        rate = (self.done - self._resumed) / elapsed if self._rate is None else self._rate
        parts = [f"{rate:.3g}/s" if rate < 1000 else f"{rate:.0f}/s"]
        if self.total is not None:
            left = max(self.total - self.done, 0)
            parts.append(f"ETA {clock(left / rate)}" if rate > 0 else "ETA -:--")
        parts += [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self._fields.items()
        ]
        return "  ".join(parts)

    def _print_line(self) -> None:
        self._last_line, self._printed = time.monotonic(), self.done
        print(self.line(self._last_line), file=sys.stderr, flush=True)

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        shown = self

        class Bar(RichProgress):
            def get_renderables(self) -> "Iterator[RenderableType]":
                yield self.make_tasks_table(self.tasks)
                for line in shown._below:
                    yield Text(" " * 9 + line, no_wrap=True, overflow="ellipsis")

        self._bar = Bar(
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(self.unit),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(self.stage, total=self.total, completed=self.done, text="")


def clock(seconds: float) -> str:
    """'0:07', '12:30', '3:05:00'."""
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
