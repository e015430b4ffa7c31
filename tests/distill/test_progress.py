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


def test_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("traces", 10, "samples", done=2) as bar:
        bar.advance(8)
    assert "10/10" in out.getvalue() and "samples" in out.getvalue() and "ETA" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
