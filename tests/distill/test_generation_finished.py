"""The index of finished samples: always what the file says, however the two came apart."""

import json
import os

import pytest

from distill.errors import UserError
from distill.generation.finished import Finished, number
from distill.generation.lines import encode, parse

NAME = ".traces.index"


def row(n, **fields):
    return {"id": f"{n:016x}", "prompt_tokens": 3, "reasoning_tokens": n, "answer_tokens": 2, "cost": 0.5, **fields}


def write(path, rows):
    path.write_bytes(b"".join(encode(r) for r in rows))
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "traces.jsonl", [row(n) for n in range(100, 200)])


def found(path):
    finished = Finished(path)
    finished.close()
    ids = {n for n in range(1000) if f"{n:016x}" in finished}
    for n in sorted(ids)[::17]:
        assert finished.read(n)["id"] == f"{n:016x}"
    assert len(finished) == len(ids)
    return ids


def scans(path, monkeypatch):
    """How many lines are parsed to know what is there."""
    import distill.generation.finished as module

    count = 0

    def counting(line, place):
        nonlocal count
        count += 1
        return parse(line, place)

    with monkeypatch.context() as patch:
        patch.setattr(module, "parse", counting)
        Finished(path).close()
    return count


def test_a_second_opening_reads_no_line_again(path, monkeypatch):
    assert scans(path, monkeypatch) == 100
    assert scans(path, monkeypatch) == 0
    with open(path, "ab") as file:
        file.write(encode(row(7)))
    assert scans(path, monkeypatch) == 1
    assert scans(path, monkeypatch) == 0
    assert found(path) == {*range(100, 200), 7}


def test_what_is_added_while_it_is_open_is_known_at_the_next_opening(path, monkeypatch):
    finished = Finished(path)
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(encode(row(8)))
    finished.add([(8, size, 0.5, 3, 10)])
    finished.close()
    assert scans(path, monkeypatch) == 0
    assert found(path) == {*range(100, 200), 8}


def test_sums_are_over_all_lines(path):
    finished = Finished(path)
    assert (finished.lines, finished.cost) == (100, (50.0, 25.0))
    assert finished.tokens == (sum(n + 5 for n in range(100, 200)), sum((n + 5) ** 2 for n in range(100, 200)))


def shorter(path):
    write(path, [row(n) for n in range(100, 150)])


def one_line_less_at_the_start(path):
    write(path, [row(n) for n in range(101, 200)])


def other_ids(path):
    write(path, [row(n) for n in range(300, 400)])


def one_other_line_of_the_same_length(path):
    write(path, [row(n) for n in [*range(100, 199), 999]])


def torn_index(path):
    index = path.with_name(NAME)
    os.truncate(index, index.stat().st_size - 5)


def empty_index(path):
    path.with_name(NAME).write_bytes(b"")


def index_of_another_version(path):
    index = path.with_name(NAME)
    index.write_bytes(b"X" + index.read_bytes()[1:])


def index_out_of_order(path):
    index = path.with_name(NAME)
    data = index.read_bytes()
    index.write_bytes(data[:32] + data[64:96] + data[32:64] + data[96:])


def index_longer_than_the_file(path):
    index = path.with_name(NAME)
    data = index.read_bytes()
    index.write_bytes(data + data[-32:-24] + (1 << 40).to_bytes(8, "little") + data[-16:])


def no_index(path):
    path.with_name(NAME).unlink()


CHANGES = [
    shorter, one_line_less_at_the_start, other_ids, one_other_line_of_the_same_length, torn_index, empty_index,
    index_of_another_version, index_out_of_order, index_longer_than_the_file, no_index,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_however_they_come_apart_the_file_is_right(path, change, monkeypatch):
    found(path)
    change(path)
    expected = {int(json.loads(line)["id"], 16) for line in path.read_bytes().splitlines()}
    assert found(path) == expected
    assert scans(path, monkeypatch) == 0, "the index was not mended"
    assert found(path) == expected


def test_an_empty_file_and_blank_lines(tmp_path):
    path = write(tmp_path / "traces.jsonl", [])
    assert found(path) == set()
    path.write_bytes(b"\n" + encode(row(1)) + b"  \n" + encode(row(2)))
    assert found(path) == {1, 2} == found(path)


def test_a_repeated_line_is_one_sample_and_the_first_counts(tmp_path):
    path = write(tmp_path / "traces.jsonl", [row(1, text="first"), row(2), row(1, text="second")])
    finished = Finished(path)
    assert (len(finished), finished.lines) == (2, 3) and finished.read(1)["text"] == "first"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken\n", r"traces\.jsonl:101: the line is not valid JSON"),
        (b"[1]\n", r"traces\.jsonl:101: expected a JSON object"),
        (b'{"id": 5}\n', r"traces\.jsonl:101: expected the field 'id' with text in it"),
        (b'{"id": "5", "cost": null}\n', r"traces\.jsonl:101: expected numbers in the fields of tokens and cost"),
    ],
)
def test_a_line_that_is_no_trace_is_named(path, line, message):
    found(path)
    with open(path, "ab") as file:
        file.write(line)
    with pytest.raises(UserError, match=message):
        Finished(path)


def test_ids_of_other_tools_are_told_apart():
    names = ["chatcmpl-1", "chatcmpl-2", "", "g" * 16, "0" * 15, "0" * 17, "\ud800"]
    assert len({number(name) for name in names}) == len(names)
    assert number("00000000000000ff") == 255


@pytest.mark.parametrize(
    "value",
    ["é\u2028\x00\x1b😀", "lone \ud83d surrogate", 2**63 - 1, 2**70, -0.0, 1e-300, None, [], {"a": ["b"]}],
)
def test_lines_carry_what_json_carries(value):
    line = encode({"id": "x", "value": value})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert parse(line, "here") == {"id": "x", "value": value} == json.loads(line)


def test_readable_text_stays_readable():
    assert "é∞😀".encode() in encode({"text": "é∞😀"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="JSON has no number"):
        encode({"seconds": value})
