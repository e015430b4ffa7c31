"""Packed log-probabilities: what is written is read, and a kill at any byte loses no trace's."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.generation.logprobs import MISSING, NAME, LogprobsReader, LogprobsWriter, decode, encode, read_logprobs
from distill.generation.token_texts import FIRST_ID, ids_of_texts, read_texts
from distill.records import Reply, TopLogprobs

IDS = st.integers(0, FIRST_ID - 1) | st.integers(0, 300)
VALUES = st.floats(-60000, 0, width=16)


def reply(name: str, top: TopLogprobs | None) -> Reply:
    return Reply(name, "text", "stop", 1, 1, 1, 0.1, logprobs=top)


def top(seed: int, positions: int = 5, most: int = 4) -> TopLogprobs:
    rng = np.random.default_rng(seed)
    values = -np.sort(rng.exponential(3, (positions, most))).astype(np.float16).astype(float)
    return TopLogprobs(rng.integers(0, 150_000, (positions, most)).tolist(), values.tolist(), [])


def write(folder: Path, names: list[str], finished: set[str]) -> LogprobsWriter:
    writer = LogprobsWriter(folder / "traces", finished)
    writer.write(reply(name, top(int(name[:8], 16))) for name in names)
    return writer


def same(found: TopLogprobs, logprobs) -> bool:
    return found.tokens == logprobs.tokens_TK.tolist() and found.logprobs == logprobs.logprobs_TK.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6).flatmap(lambda k: st.lists(
    st.tuples(st.lists(IDS, min_size=k, max_size=k), st.lists(VALUES, min_size=k, max_size=k), IDS), max_size=8
)), st.booleans())  # fmt: skip
def test_round_trip(rows, told):
    given_ = TopLogprobs([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows] if told else ())
    found = decode(encode("0123456789abcdef", given_, lambda texts: pytest.fail("no texts here")))
    assert same(given_, found)
    assert (found.tokens_TK.dtype, found.logprobs_TK.dtype) == (np.int64, np.float16)
    assert found.chosen_T is None if not (told and rows) else found.chosen_T.tolist() == list(given_.chosen)


def test_short_rows_are_filled_up_and_extreme_values_are_minus_infinity():
    given_ = TopLogprobs([[7, 8], [9]], [[-0.5, -1e30], [-0.25]])
    found = decode(encode("a", given_, lambda texts: []))
    assert found.tokens_TK.tolist() == [[7, 8], [9, MISSING]]
    assert found.logprobs_TK.tolist() == [[-0.5, -np.inf], [-0.25, -np.inf]]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (TopLogprobs([[1]], [[-1.0, -2.0]]), "differ in shape"),
        (TopLogprobs([[-1]], [[-1.0]]), "whole number"),
        (TopLogprobs([[2**31]], [[-1.0]]), "whole number"),
        (TopLogprobs([[10**30]], [[-1.0]]), "whole number"),
        (TopLogprobs([[1]], [[-1.0]], [1, 2]), "2 chosen tokens for 1 positions"),
    ],
)
def test_what_is_no_table_of_tokens_is_refused_by_name(broken, says):
    with pytest.raises(ValueError, match=f"trace abc: .*{says}"):
        encode("abc", broken, lambda texts: [])


def test_reader_finds_each_trace_and_names_what_is_not_there(tmp_path):
    names = [f"{n:016x}" for n in range(20)]
    write(tmp_path, names, set()).close()
    with LogprobsReader(tmp_path) as reader:
        assert [name for name, _ in reader] == names and len(reader) == 20
        for name in reversed(names):
            assert same(top(int(name[:8], 16)), reader.read(name))
        with pytest.raises(UserError, match="no log-probabilities of trace ffff"):
            reader.read("ffff")
    with pytest.raises(UserError, match=r"set sampling\.logprobs"):
        read_logprobs(tmp_path / "elsewhere", names[0])


def test_replies_without_logprobs_leave_no_frame(tmp_path):
    with LogprobsWriter(tmp_path / "traces", set()) as writer:
        writer.write([reply("a", None)])
    assert (tmp_path / "traces" / NAME).stat().st_size == 0


def test_a_kill_at_any_byte_loses_no_trace_that_has_its_line(tmp_path):
    names = [f"{n:016x}" for n in range(3)]
    path = tmp_path / "traces" / NAME
    write(tmp_path, names[:1], set()).close()
    first = path.stat().st_size
    write(tmp_path, names[1:], {names[0]}).close()
    whole = path.read_bytes()
    for cut in range(first, len(whole) + 1, 7):
        path.write_bytes(whole[:cut])
        # The first trace's line was written, the others' came after their frames and were not.
        with write(tmp_path, names[1:], {names[0]}) as writer:
            assert writer.cut == cut - first
        assert path.read_bytes() == whole


def test_zeros_that_a_power_cut_left_are_cut(tmp_path):
    write(tmp_path, ["0" * 16], set()).close()
    path = tmp_path / "traces" / NAME
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(5000))
    with write(tmp_path, [], {"0" * 16}) as writer:
        assert writer.cut == 5000
    assert path.read_bytes() == whole


def test_damaged_bytes_are_told_of(tmp_path):
    write(tmp_path, ["0" * 16, "1" * 16], set()).close()
    path = tmp_path / "traces" / NAME
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"logprobs.bin: trace 0000000000000000: its bytes are damaged"):
        read_logprobs(tmp_path, "0" * 16)
    assert same(top(int("1" * 8, 16)), read_logprobs(tmp_path, "1" * 16))


def test_of_two_frames_of_a_trace_the_later_counts(tmp_path):
    with LogprobsWriter(tmp_path / "traces", set()) as writer:
        writer.write([reply("a", top(1)), reply("a", top(2))])
    assert same(top(2), read_logprobs(tmp_path, "a"))


def test_texts_are_kept_in_a_table_and_mapped_by_who_knows_them(tmp_path):
    folder = tmp_path / "traces"
    spoken = TopLogprobs([["yes", " no"], [" no", "perhaps"]], [[-0.5, -1.0], [-0.5, -1.0]], ["yes", "perhaps"])
    with LogprobsWriter(folder, set()) as writer:
        writer.write([reply("a", spoken)])
    with LogprobsWriter(folder, {"a"}) as writer:
        writer.write([reply("b", TopLogprobs([["perhaps", "never", 17]], [[-1.0, -2.0, -3.0]]))])
    assert read_texts(folder) == ["yes", " no", "perhaps", "never"]
    yes, no, perhaps, never = range(FIRST_ID, FIRST_ID + 4)
    first = read_logprobs(tmp_path, "a")
    assert first.tokens_TK.tolist() == [[yes, no], [no, perhaps]] and first.chosen_T.tolist() == [yes, perhaps]
    assert read_logprobs(tmp_path, "b").tokens_TK.tolist() == [[perhaps, never, 17]]
    with LogprobsReader(tmp_path, {"yes": 5, "never": 6}.get) as reader:
        assert reader.read("a").tokens_TK.tolist() == [[5, no], [no, perhaps]]
        assert reader.read("a").chosen_T.tolist() == [5, perhaps]
        assert reader.read("b").tokens_TK.tolist() == [[perhaps, 6, 17]]


def test_frames_of_a_shard_are_copied_and_their_texts_numbered_anew(tmp_path):
    given_ = TopLogprobs([["b", 17], ["c"]], [[-0.5, -1.0], [-0.25]], ["b", "c"])
    with LogprobsWriter(tmp_path / "shard" / "traces", set()) as writer:
        writer.write([reply("1", given_), reply("2", top(2))])
    with LogprobsWriter(tmp_path / "out" / "traces", set()) as writer:
        writer.write([reply("0", TopLogprobs([["c", "a"]], [[-1.0, -2.0]]))])
        with LogprobsReader(tmp_path / "shard") as reader:
            assert (reader.top("1"), reader.top("2")) == (given_, top(2))
            writer.copy(reader, ["2", "1", "not there"])
    with LogprobsReader(tmp_path / "out") as reader:
        assert [name for name, _ in reader] == ["0", "2", "1"]
        assert (reader.top("1"), reader.top("2")) == (given_, top(2))
    assert read_texts(tmp_path / "out" / "traces") == ["c", "a", "b"]


def test_ids_of_texts_leaves_out_what_several_tokens_read_as():
    words = ["a", "\ufffd", "b", "\ufffd"]

    class Tokenizer:
        def __len__(self):
            return len(words)

        def decode(self, ids):
            return words[ids[0]]

    assert ids_of_texts(Tokenizer()) == {"a": 0, "b": 2}


def test_a_token_of_twenty_likeliest_takes_a_quarter_of_what_json_takes():
    """Random ids of a vocabulary of 150,000, which no packing shortens below 17 bits, and peaked distributions."""
    rng = np.random.default_rng(0)
    logits = -np.sort(rng.exponential(4, (1000, 20)))
    values = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    given_ = TopLogprobs(rng.integers(0, 150_000, (1000, 20)).tolist(), values.tolist())
    frame = encode("0123456789abcdef", given_, lambda texts: [])
    text = json.dumps([given_.tokens, np.round(values, 4).tolist()], separators=(",", ":"))
    assert len(frame) / 1000 < 90 < len(text) / 1000 / 3
    error = np.abs(decode(frame).logprobs_TK.astype(float) - values)
    assert (error <= np.abs(values) / 2048).all()
