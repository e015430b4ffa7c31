import io
import sys

import pytest

from distill import progress
from distill.progress import Progress, clock


@pytest.fixture
def now(monkeypatch):
    class Clock:
        time = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.time)
    return Clock


@pytest.fixture
def lines(capsys):
    return lambda: capsys.readouterr().err.splitlines()


def test_plain_lines_come_every_few_seconds_and_at_the_end(now, lines):
    with Progress("traces", 100, "samples") as bar:
        for _ in range(50):
            now.time += 0.25
            bar.advance(2, loss=0.123456)
    assert lines() == [
        "traces  40/100 samples  8/s  ETA 0:08  loss 0.1235",
        "traces  80/100 samples  8/s  ETA 0:03  loss 0.1235",
        "traces  100/100 samples  8/s  ETA 0:00  loss 0.1235",
    ]


def test_resumed_units_count_in_the_total_but_not_in_the_rate(now, lines):
    with Progress("traces", 100, "samples", done=90) as bar:
        now.time += 10
        bar.advance(5)
    assert lines() == ["traces  90/100 samples  0/s  ETA -:--", "traces  95/100 samples  0.5/s  ETA 0:10"]


def test_unknown_total(now, lines):
    with Progress("train", None, "steps") as bar:
        now.time += 1
        bar.advance(3)
    assert lines() == ["train  3 steps  3/s"]


def test_beat_comes_every_two_seconds(now, lines):
    beats = []
    with Progress("eval", 100, "samples", beat=lambda: beats.append(now.time)) as bar:
        for _ in range(10):
            now.time += 1
            bar.advance()
    assert beats == [102.0, 104.0, 106.0, 108.0, 110.0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch, columns):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    return out


def test_told_rate_and_words_stand_on_the_plain_line(now, lines):
    with Progress("traces", 100, "samples") as bar:
        now.time += 10
        bar.tell(2.0, ["in 5, out 7 tokens/s", "a 3/8 in flight"])
        bar.advance(50)
        bar.total = 80
    assert lines() == [
        "traces  50/100 samples  2/s  ETA 0:25  in 5, out 7 tokens/s  a 3/8 in flight",
    ]


def test_words_stand_below_the_bar_on_a_terminal_and_are_cut_at_its_edge(monkeypatch):
    terminal = open_terminal(monkeypatch, 80)
    with Progress("traces", 10, "samples") as bar:
        bar.tell(2.0, ["in 5, out 7 tokens/s", "x" * 100])
        bar.advance(5)
        bar.total = 8
        bar.advance(1)
    last = [line.rstrip() for line in terminal.getvalue().replace("\r", "\n").splitlines() if line.strip()][-4:]
    assert any("6/8" in line for line in last)
    assert "         in 5, out 7 tokens/s" in last
    assert any(line.endswith("x…") and len(line) == 80 for line in last)


def test_bar_on_a_terminal(monkeypatch):
    out = open_terminal(monkeypatch, 120)
    with Progress("traces", 10, "samples", done=2) as bar:
        bar.advance(8)
    assert "10/10" in out.getvalue() and "samples" in out.getvalue() and "ETA" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
