"""Servers that go wrong at 30% of the requests: every sample finishes or carries a named outcome, none twice."""

import pytest

from tests.faults.running import FaultServer, Run, check_against_log, check_complete
from tests.faults.server import ANSWERS, FAILURES, HARMLESS, OUTCOMES, STREAMED_FAILURES

# Each costs a second or two of waiting for a timeout, or a hundred megabytes of blanks.
SLOW = ("hang", "hang_midway", "endless_drip", "huge")
# Several at once, so that the suite is quick; alone behind `slow`.
GROUPS = {
    "statuses": ("http_429", "http_429_seconds", "http_429_date", "http_500", "http_503"),
    "silence": ("hang", "hang_midway", "endless_drip"),
    "broken": ("cut", "reset", "bad_json", "wrong_model", *STREAMED_FAILURES),
    "outcomes": (*OUTCOMES, *HARMLESS),
    "everything": tuple(ANSWERS),
}


def test_every_fault_is_of_one_kind():
    kinds = (*FAILURES, *STREAMED_FAILURES, *OUTCOMES, *HARMLESS)
    assert sorted(kinds) == sorted(ANSWERS)


def meet(zygote, folder, faults, stream, api="chat", problems=30):
    if not stream:
        faults = [fault for fault in faults if fault not in STREAMED_FAILURES]
    with FaultServer(folder / "log", faults) as server:
        tokenizer = "tiny-r1" if api == "completions" else None
        run = Run(folder, [server], problems=problems, samples=2, stream=stream, api=api, tokenizer=tokenizer)
        status, said = zygote.run(run.argv())
        assert status == 0, said
        rows = check_complete(run)
        events = run.events()
        check_against_log(rows, events)
        assert set(faults) <= {event["fault"] for event in events}, "the test did not meet all it is about"
        return rows, events


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("group", GROUPS)
def test_all_samples_finish_in_spite_of(group, stream, zygote, tmp_path):
    problems = {"everything": 60, "silence": 12}  # enough to meet all, and few where each costs a time out
    meet(zygote, tmp_path, GROUPS[group], stream, problems=problems.get(group, 30))


@pytest.mark.slow  # it imports transformers, for the chat template
def test_completions_meet_the_same(zygote, tmp_path):
    faults = [name for name in ANSWERS if name not in SLOW and name not in ("refusal",)]  # chat alone has refusals
    meet(zygote, tmp_path, faults, True, api="completions", problems=60)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("fault", ANSWERS)
def test_all_samples_finish_in_spite_of_one(fault, stream, zygote, tmp_path):
    if fault in STREAMED_FAILURES and not stream:
        pytest.skip("a fault of streams")
    rows, events = meet(zygote, tmp_path, [fault], stream)
    if fault in OUTCOMES:
        ends = [row["finish_reason"] for row in rows]
        assert ends.count(OUTCOMES[fault]) == sum(
            event["fault"] == fault for event in events if event["event"] == "asked"
        )
