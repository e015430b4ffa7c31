import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.jsonl import Appender, encode_row, read_jsonl, write_jsonl_atomic

ROWS = [{"id": n, "text": f"line {n} ≤ π\n\u2028"} for n in range(5)]


def rows_of(path, **options):
    return [row for _, row in read_jsonl(path, **options)]


def test_appended_rows_come_back(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    with Appender(path) as out:
        assert out.torn == 0
        out.append(ROWS[0])
        out.append_many(ROWS[1:])
        out.append_many([])
    assert rows_of(path) == ROWS
    assert [number for number, _ in read_jsonl(path)] == [1, 2, 3, 4, 5]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.characters()), st.lists, max_leaves=5))
def test_any_row_is_one_line(value):
    line = encode_row({"value": value})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == {"value": value}


def test_lone_surrogates_survive(tmp_path):
    with Appender(tmp_path / "a.jsonl") as out:
        out.append({"text": "\ud800"})
    assert rows_of(tmp_path / "a.jsonl") == [{"text": "\ud800"}]


def test_nan_is_refused_because_json_has_none(tmp_path):
    with Appender(tmp_path / "a.jsonl") as out:
        with pytest.raises(ValueError, match="JSON"):
            out.append({"x": float("nan")})
        out.append({"x": 1})
    assert rows_of(tmp_path / "a.jsonl") == [{"x": 1}]


def test_torn_tail_of_any_length_is_cut_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = b"".join(map(encode_row, ROWS))
    last = len(encode_row(ROWS[-1]))
    for cut in range(1, last + 3):
        path.write_bytes(whole[:-cut])
        kept = 4 if cut <= last else 3
        with Appender(path) as out:
            assert out.torn == (0 if cut == last else 1)
            assert rows_of(path) == ROWS[:kept]
            out.append({"new": 1})
        assert rows_of(path) == [*ROWS[:kept], {"new": 1}]


def test_torn_tail_longer_than_a_block(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl_atomic(path, ROWS[:1])
    with open(path, "ab") as file:
        file.write(b'{"text": "' + b"x" * 200_000)
    with Appender(path) as out:
        assert out.torn == 1
    assert rows_of(path) == ROWS[:1]


def test_zeros_left_by_a_power_cut_are_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl_atomic(path, ROWS[:2])
    with open(path, "ab") as file:
        file.write(b"\0" * 100 + b'"tail": 1}\n')
    with Appender(path) as out:
        assert out.torn == 1
    assert rows_of(path) == ROWS[:2]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1')
    with Appender(path) as out:
        assert out.torn == 1
    assert path.read_bytes() == b""


def test_reader_may_pass_over_a_torn_tail(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encode_row(ROWS[0]) + b'{"a": 1')
    assert rows_of(path, torn_ok=True) == ROWS[:1]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the line is not valid JSON"):
        rows_of(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{bad}\n", r"rows\.jsonl:3: the line is not valid JSON \(.* at column \d+\)"),
        (b'{"a": \n', r"rows\.jsonl:3: the line is not valid JSON \(Expecting value at column 6\)"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", r"rows\.jsonl:3: the line has a whole number of more than 4300 digits"),
        (b"[1, 2]\n", r"rows\.jsonl:3: expected a JSON object, found list"),
        (b'{"a": "\xff"}\n', r"rows\.jsonl:3: the line is not UTF-8 text"),
        (b"[" * 200_000 + b"\n", r"rows\.jsonl:3: the line is not valid JSON"),
    ],
)
def test_bad_line_is_named_by_number(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encode_row(ROWS[0]) + b"\n" + line + encode_row(ROWS[1]))
    with pytest.raises(UserError, match=message):
        rows_of(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        rows_of(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        rows_of(tmp_path)


def test_atomic_write_leaves_the_old_file_when_rows_fail(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert write_jsonl_atomic(path, ROWS) == 5

    def failing():
        yield ROWS[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_jsonl_atomic(path, failing())
    assert rows_of(path) == ROWS
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_full_device_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    real = os.pwrite
    calls = []

    def filling(handle, data, offset):
        calls.append(offset)
        if len(calls) == 2:  # the device takes a part of the second row, then nothing
            return real(handle, bytes(data)[:5], offset)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, offset)

    with Appender(path) as out:
        monkeypatch.setattr(os, "pwrite", filling)
        out.append(ROWS[0])
        with pytest.raises(OSError, match="No space left") as caught:
            out.append(ROWS[1])
        assert caught.value.filename == str(path)
        assert rows_of(path) == ROWS[:1]
        out.append(ROWS[2])
    assert rows_of(path) == [ROWS[0], ROWS[2]]


WRITER = """
import sys
from distill.jsonl import Appender
with Appender(sys.argv[1]) as out:
    n = 0
    while True:
        out.append({"n": n, "text": "x" * 5000})
        print(n, flush=True)
        n += 1
"""


def test_kill_9_while_appending_loses_nothing_that_was_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        before = len(rows_of(path, torn_ok=True)) if path.exists() else 0
        reported = int(process.stdout.readline())
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
        process.wait()
        with Appender(path):
            pass
        rows = rows_of(path)
        assert len(rows) - before in (reported + 1, reported + 2)  # written, maybe not reported any more
        assert [row["n"] for row in rows[before:]] == list(range(len(rows) - before))
