"""Packing: every example whole, exactly once, in an order that a cursor can resume."""

import random
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.batches import IGNORE, Cursor, Example, StepBatch, ahead, step_batches
from teacher.prefetch import Prefetch

LONGEST = 40


def example(index: int) -> Example:
    """Tokens that name their example and place, so that any mix-up shows: index * 1000 + place."""
    rng = random.Random(index)
    length = rng.randint(2, LONGEST)
    return {"input_ids": [index * 1000 + at for at in range(length)], "loss_start": rng.randrange(length)}


def batches(cursor: Cursor, steps: int, **changes: int) -> list[StepBatch]:
    fields = {"rows": 4, "micro_rows": 2, "seq_len": 64, "longest": LONGEST, "depths": 2} | changes
    return list(islice(step_batches(example, cursor, **fields), steps))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), micro_rows=st.integers(1, 6), seq_len=st.integers(LONGEST, 150))
def test_every_example_is_whole_and_there_once(rows: int, micro_rows: int, seq_len: int) -> None:
    seen: list[int] = []
    steps = batches(Cursor(), 6, rows=rows, micro_rows=micro_rows, seq_len=seq_len)
    for step in steps:
        found: list[int] = []
        for micro in step.micro:
            assert micro.input_ids_BT.shape[1] == seq_len and len(micro.input_ids_BT) <= micro_rows
            for row in range(len(micro.input_ids_BT)):
                segments = micro.segment_ids_BT[row]
                for segment in range(1, int(segments.max()) + 1):
                    where = (segments == segment).nonzero().squeeze(1)
                    assert where.tolist() == list(range(int(where[0]), int(where[-1]) + 1))
                    ids = micro.input_ids_BT[row, where].tolist()
                    index = ids[0] // 1000
                    whole = example(index)
                    assert ids == whole["input_ids"]
                    assert micro.position_ids_BT[row, where].tolist() == list(range(len(ids)))
                    start = max(1, whole["loss_start"])
                    expected = [IGNORE] * (start - 1) + ids[start:] + [IGNORE]
                    assert micro.targets_BT[row, where].tolist() == expected
                    found.append(index)
                assert (micro.targets_BT[row, segments == 0] == IGNORE).all()
        assert sorted(found) == sorted(step.indices)
        assert step.tokens == sum(len(example(i)["input_ids"]) for i in found)
        assert step.positions == rows * seq_len
        seen += found
    last = steps[-1].cursor
    assert len(seen) == len(set(seen))
    assert sorted([*seen, *last.pending]) == list(range(last.next_index))


def test_a_cursor_continues_the_stream() -> None:
    whole = batches(Cursor(), 7)
    again = batches(whole[2].cursor, 4)
    assert [s.indices for s in again] == [s.indices for s in whole[3:]]
    assert torch.equal(again[-1].micro[-1].input_ids_BT, whole[-1].micro[-1].input_ids_BT)
    assert any(s.cursor.pending for s in whole)  # else the test shows nothing


def test_the_oldest_example_set_aside_is_next() -> None:
    steps = batches(Cursor(), 30)
    waited = [(a.cursor.pending[0], b.indices) for a, b in pairwise(steps) if a.cursor.pending]
    assert waited and all(oldest in indices for oldest, indices in waited)


def test_loss_counts_are_those_of_the_targets() -> None:
    for step in batches(Cursor(), 4):
        counts = [0, 0, 0]
        for micro in step.micro:
            counts[0] += int((micro.targets_BT != IGNORE).sum())
            for depth in (1, 2):
                counts[depth] += int((ahead(micro.targets_BT, micro.segment_ids_BT, depth, IGNORE) != IGNORE).sum())
        assert tuple(counts) == step.losses


def test_ahead_stays_within_an_example() -> None:
    values = torch.tensor([[10, 11, 12, 20, 21, 0]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 0]])
    assert ahead(values, segments, 1, -1).tolist() == [[11, 12, -1, 21, -1, -1]]
    assert ahead(values, segments, 2, -1).tolist() == [[12, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"input_ids": [1] * 41, "loss_start": 0}, "example 3 has 41 tokens; at most 40"),
        ({"input_ids": [1], "loss_start": 0}, "example 3 has 1 tokens and loss_start 0"),
        ({"input_ids": [1, 2, 3], "loss_start": 3}, "example 3 has 3 tokens and loss_start 3"),
    ],
)
def test_an_example_that_does_not_fit_is_named(bad: Example, says: str) -> None:
    def stream(index: int) -> Example:
        return bad if index == 3 else example(index)

    fields = {"rows": 2, "micro_rows": 2, "seq_len": 64, "longest": LONGEST}
    with Prefetch(step_batches(stream, Cursor(), **fields)) as source, pytest.raises(ValueError, match=says):
        next(source)


def test_prefetch_hands_on_items_then_the_error_and_ends_its_thread() -> None:
    def stream():
        yield from range(3)
        raise OSError("no more")

    with Prefetch(stream(), ahead=2) as source:
        assert [next(source) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(OSError, match="no more"):
                next(source)
    endless = Prefetch(iter(int, 1), ahead=2)
    with endless as source:
        next(source)
    assert not endless._thread.is_alive()
