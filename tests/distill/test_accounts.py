"""The accounts of generation: sums that are right, lines that can be read, and what a kill leaves."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.generation.accounts import Accounts, gpus
from distill.generation.live import Standing, host, lines, short
from distill.generation.record import Record, merge_accounts
from distill.generation.throughput import Amount, Recent, Throughput
from distill.generation.totals import Totals, error_kind
from distill.progress import Progress
from distill.recipe import Teacher
from distill.records import EndpointState, Reply

UP = EndpointState(832, 1024, True, {})


class Run:
    """What Accounts uses of a RunFolder."""

    def __init__(self, folder: Path, **teacher) -> None:
        self.folder = folder
        self.recipe = SimpleNamespace(teacher=Teacher(model="m", **teacher), sampling=None)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def progress(self, stage, total, unit, *, done=0) -> Progress:
        return Progress(stage, total, unit, done=done)


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def reply(name: str, seconds: float = 1.0, reason: str = "stop", **more) -> Reply:
    return Reply(name, "text", reason, 10, 70, 30, seconds, **more)


def line(reply: Reply) -> dict:
    keys = ("id", "finish_reason", "prompt_tokens", "reasoning_tokens", "answer_tokens", "seconds", "cost", "attempts")
    row = {key: getattr(reply, key) for key in keys}
    return row if reply.endpoint is None else {**row, "endpoint": reply.endpoint}


@given(st.lists(st.floats(1e-4, 1e6), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_right_to_three_per_cent(seconds, share):
    totals = Totals()
    for value in seconds:
        totals.trace(line(reply("a", value)))
    exact = sorted(seconds)[max(0, -int(-share * len(seconds) // 1) - 1)]
    assert totals.all().percentile(share) == pytest.approx(exact, rel=0.03)


def test_times_outside_the_histogram_count_at_its_ends():
    totals = Totals()
    for value in (0.0, -1.0, 1e9):
        totals.trace(line(reply("a", value)))
    assert totals.all().percentile(0.5) == pytest.approx(1e-4, rel=0.05)
    assert totals.all().percentile(1) == pytest.approx(1e6, rel=0.05)
    assert Totals().all().percentile(0.5) is None


def test_sums_survive_json_and_add_up():
    replies = [reply(str(n), n, endpoint="ab"[n % 2], cost=0.5, attempts=n % 3 + 1) for n in range(1, 8)]
    replies.append(reply("x", 2.0, "length"))
    whole, parts = Totals(), [Totals(), Totals()]
    for n, one in enumerate(replies):
        whole.trace(line(one))
        parts[n % 2].trace(line(one))
    again = Totals.from_json(json.loads(json.dumps(parts[0].to_json())))
    again.add(parts[1])
    assert again.all().to_json() == whole.all().to_json()
    assert {name: part.finished for name, part in again.parts.items()} == {"a": 3, "b": 4, None: 1}
    assert (whole.all().cost, whole.all().attempts, whole.all().retried) == (3.5, 15, 5)
    assert whole.all().outcomes == {"stop": 7, "length": 1}


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(0, 5)), max_size=60))
def test_throughput_keeps_its_sum_in_a_bounded_number_of_steps(counts):
    throughput = Throughput()
    for at, finished in counts:
        throughput.count(at, Amount(finished, 1, 2))
    assert len(throughput.amounts) <= 240
    assert sum(amount.finished for amount in throughput.amounts) == sum(finished for _, finished in counts)
    last = max((at for at, _ in counts), default=0)
    assert last < throughput.step * 240
    assert throughput.step == 1 or last >= throughput.step * 120
    assert Throughput.from_json(json.loads(json.dumps(throughput.to_json()))).amounts == throughput.amounts


def test_a_thinned_throughput_keeps_its_sum_and_leaves_the_other_alone():
    throughput = Throughput()
    for second in range(101):
        throughput.count(second, Amount(1, 2, 3))
    thin = throughput.thinned(60)
    assert (thin.step, len(thin.amounts), thin.amounts[0], thin.amounts[-1]) == (2, 51, (2, 4, 6), (1, 2, 3))
    assert len(throughput.amounts) == 101 and throughput.thinned(101).amounts == throughput.amounts


def test_throughput_of_two_shards_is_laid_over_each_other():
    one, other = Throughput(), Throughput()
    one.count(3, Amount(5, 0, 0))
    other.count(500, Amount(7, 0, 0))
    one.add(other)
    assert one.step == 4 and (one.amounts[0].finished, one.amounts[125].finished) == (5, 7)


def test_rates_are_of_the_last_half_minute_unless_little_finished_in_it():
    recent = Recent(0.0, Amount(0, 0, 0))
    for second in range(1, 101):
        recent.mark(second, Amount(10 * second, 0, 0))
    assert recent.rates(100, Amount(1300, 0, 0))[0] == pytest.approx((1300 - 700) / 30, rel=0.1)
    slow = Recent(0.0, Amount(0, 0, 0))
    for second in range(1, 601):
        slow.mark(second, Amount(second // 60 * 10, 0, 0))
    assert slow.rates(600, Amount(100, 1000, 5000))[0] == pytest.approx(10 / 60, rel=0.3)


def test_accounts_add_up_over_starts_and_forget_what_is_done_already(tmp_path, clock, capsys):
    run = Run(
        tmp_path, kind="endpoint", endpoints=[{"url": "http://a/v1", "gpus": 8}, {"url": "http://b/v1", "gpus": 8}]
    )
    for start in range(2):
        with Accounts(run, 100, 10 * start) as accounts:
            for n in range(10):
                clock.now += 2
                accounts.add([reply(f"{start}{n}", n + 1, endpoint="a", cost=0.25, attempts=1 + (n == 0))])
                accounts.tick({"a": EndpointState(5, 8, True, {"timeout": n}), "b": UP})
            accounts.add([reply("f", 1, "failed", endpoint="a", cost=0.5, error="http_500: broken")])
            accounts.graded(3, 1)
        clock.now += 1000  # between two starts
    facts = accounts.facts()
    assert (facts["finished"], facts["wall_seconds"], facts["starts"]) == (20, 40, 2)
    assert facts["gpu_hours"] == pytest.approx(16 * 40 / 3600, abs=1e-6)
    assert facts["cost"] == 20 * 0.25 + 2 * 0.5 and facts["failed"] == {"http_500": 2}
    assert facts["errors"] == {"timeout": 18} and facts["endpoints"]["a"]["errors"] == {"timeout": 18}
    idle = facts["endpoints"]["b"]
    assert (idle["finished"], idle["latency"], idle["errors"], idle["limit"]) == (0, None, {}, 1024)
    assert facts["verified"] == {"right": 6, "wrong": 2} and facts["attempts"] == 22 and facts["retried"] == 2
    assert facts["per_finished"]["completion_tokens"] == 100 and facts["per_finished"]["cost"] == 6 / 20
    assert facts["per_verified"]["wall_seconds"] == pytest.approx(40 / 6)
    assert sum(facts["throughput"]["finished"]) == 20 and len(facts["throughput"]["finished"]) == 41
    assert facts["latency"]["p50"] == pytest.approx(5, rel=0.03)
    spent = accounts.spent
    assert (spent.cost, spent.tokens) == (6.0, 20 * 110)
    assert "20/100 traces" in capsys.readouterr().err


def test_exact_sums_replace_what_a_kill_left_behind(tmp_path, clock):
    run = Run(tmp_path)
    with Accounts(run, 3, 0) as accounts:
        accounts.add([reply("a")])
        clock.now += 1
    totals = Totals()
    for name in "abc":
        totals.trace(line(reply(name, cost=1.0)))
    facts = Accounts(run, 3, 3).facts(totals)
    assert (facts["finished"], facts["cost"], facts["wall_seconds"]) == (3, 3.0, 1.0)


def test_a_kill_loses_the_last_seconds_only(tmp_path, clock):
    accounts = Accounts(Run(tmp_path), 1000, 0)
    accounts.__enter__()
    for n in range(100):
        clock.now += 0.5
        accounts.add([reply(str(n))])
        accounts.tick({})
    kept = Record.load(tmp_path / "traces" / "accounts.json")  # no __exit__: killed
    assert 45 <= kept.wall_seconds <= 50 and kept.totals.all().finished == 2 * kept.wall_seconds
    assert (tmp_path / "traces" / "accounts.json").stat().st_size < 5000


def test_an_error_under_way_is_the_one_told_and_accounts_are_kept_where_they_can_be(tmp_path, monkeypatch):
    def go_away(first=lambda: None):
        with Accounts(Run(tmp_path), 5, 0) as accounts:
            first()
            accounts.add([reply("a")])
            raise ConnectionError("no endpoint is up")

    with pytest.raises(ConnectionError):
        go_away()
    assert Record.load(tmp_path / "traces" / "accounts.json").totals.all().finished == 1

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ConnectionError):
        go_away(lambda: monkeypatch.setattr(Record, "save", full))
    with pytest.raises(OSError, match="No space"), Accounts(Run(tmp_path), 5, 0):
        pass


def test_a_restart_with_nothing_to_do_is_no_start(tmp_path, clock):
    with Accounts(Run(tmp_path), 5, 5) as accounts:
        clock.now += 1
    facts = accounts.facts()
    assert (facts["starts"], facts["wall_seconds"], facts["gpu_hours"], facts["per_finished"]) == (0, None, None, None)
    assert not (tmp_path / "traces").exists()


def test_accounts_of_another_kind_are_refused_by_name(tmp_path):
    path = tmp_path / "traces" / "accounts.json"
    path.parent.mkdir()
    for text in ("{", "[]", '{"version": 2}', '{"version": 1, "totals": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"accounts.json: not the accounts"):
            Accounts(Run(tmp_path), 5, 0)


def test_an_origin_that_would_name_another_file_is_refused(tmp_path):
    path = tmp_path / "traces" / "accounts.json"
    Record().save(path)
    path.write_text(path.read_text().replace(Record.load(path).origin, "../../../../out"))
    with pytest.raises(UserError, match=r"accounts.json: not the accounts"):
        merge_accounts(path.parent, tmp_path)


def test_accounts_of_merged_shards_add_up_however_often_they_are_merged(tmp_path, clock):
    out = Run(tmp_path / "out")
    for shard in ("a", "b", "out"):
        folder = tmp_path / shard
        with Accounts(Run(folder), 5, 0) as accounts:
            clock.now += 7
            accounts.add([reply(shard, endpoint="x"), reply("f", 1, "failed", error="timeout")])
            accounts.tick({"x": EndpointState(0, 4, True, {"timeout": 2})})
    for shard in ("a", "b", "a"):
        merge_accounts(tmp_path / shard / "traces", tmp_path / "out" / "traces")
    merge_accounts(tmp_path / "out" / "traces", tmp_path / "further" / "traces")
    facts = Accounts(out, 5, 3).facts()
    assert Accounts(Run(tmp_path / "further"), 5, 3).facts() == facts
    assert facts["finished"] == facts["endpoints"]["x"]["finished"] == sum(facts["throughput"]["finished"]) == 3
    assert (facts["starts"], facts["wall_seconds"]) == (3, 7.0)
    assert facts["errors"] == {"timeout": 6} and facts["failed"] == {"timeout": 3}


def test_one_endpoint_reads_well_on_80_columns():
    states = {"http://gpu-1:8000/v1": EndpointState(832, 1024, True, {"timeout": 3, "http_500": 12, "cut": 0})}
    said = lines(Standing(1234, 45100, 1020, 180, 0.421, 6.8, states, 2), brief=False)
    assert said == [
        "in 1.23k, out 45.1k tokens/s  1020/1200 right  2 failed",
        "cost 0.42, 6.80 at the end  832/1024 in flight  http_500 12  timeout 3",
    ]
    assert all(len(text) <= 71 for text in said)
    assert lines(Standing(0, 0, 0, 0, 0, 0, {}, 0), brief=False) == ["in 0, out 0 tokens/s"]


def test_several_endpoints_have_a_line_each_or_a_word_each():
    states = {"http://a:1/v1": UP, "http://gpu-2:8000/v1": EndpointState(0, 8, False, {"connect": 7})}
    standing = Standing(1, 2, 0, 0, 0, 0, states, 0)
    assert lines(standing, brief=False)[1:] == [
        "a:1         832/1024 in flight",
        "gpu-2:8000  DOWN (0 in flight)  connect 7",
    ]
    assert lines(standing, brief=True)[1:] == ["a:1 832/1024 in flight, gpu-2:8000 DOWN (0 in flight) connect 7"]


def test_words():
    assert [short(x) for x in (0, 12.4, 999.4, 999.6, 45100, 999600, 1.25e7)] == [
        "0",
        "12",
        "999",
        "1k",
        "45.1k",
        "1M",
        "12.5M",
    ]
    assert (host("http://a:1/v1"), host("embedded"), host("https://x/api/v1")) == ("a:1", "embedded", "x/api")
    assert (error_kind("timeout: 300 s"), error_kind("bad_json"), error_kind(None), error_kind("")) == (
        "timeout", "bad_json", "unknown", "unknown",
    )  # fmt: skip


def test_the_plain_line_tells_rates_errors_and_cost(tmp_path, clock, capsys):
    with Accounts(Run(tmp_path), 100, 50) as accounts:
        accounts.add([reply(str(n), cost=0.01) for n in range(10)])
        clock.now += 6
        accounts.tick({"http://a:8000/v1": EndpointState(7, 8, True, {"timeout": 2})})
        accounts.expect(80)
        clock.now += 6
        accounts.tick({"http://a:8000/v1": EndpointState(7, 8, True, {"timeout": 2})})
    said = capsys.readouterr().err.splitlines()
    assert said[1].startswith("traces  60/100 traces  1.67/s  ETA 0:24  in 17, out 167 tokens/s")
    assert said[1].endswith("cost 0.10, 0.50 at the end  7/8 in flight  timeout 2")
    assert said[2].startswith("traces  60/80 traces")


def test_gpus_of_a_teacher():
    endpoints = [{"url": "http://a/v1", "gpus": 8}, {"url": "http://b/v1", "gpus": 0.5}]
    assert gpus(Teacher(model="m", kind="endpoint", endpoints=endpoints)) == 8.5
    assert gpus(Teacher(model="m")) == 0


@pytest.mark.parametrize(
    ("vllm", "memories", "used"),
    [
        ({}, [80], 1),
        ({}, [80] * 4, 4),
        ({"tensor_parallel": 2}, [80] * 4, 2),
        ({"data_parallel": 1}, [80] * 3, 2),
        ({}, [], 0),
    ],
)
def test_gpus_of_a_vllm_teacher_are_those_that_it_is_given(monkeypatch, vllm, memories, used):
    monkeypatch.setattr("distill.serving.gpus.gpu_memories", lambda: [size << 30 for size in memories])
    assert gpus(Teacher(model="tiny-qwen", kind="vllm", vllm=vllm)) == used


def test_counting_costs_less_than_ten_microseconds_a_reply(tmp_path):
    """Three on an idle machine; the bound leaves room for a busy one, and would catch a pass over what was counted."""
    replies = [reply(str(n), 0.1 + n % 7, endpoint="a", cost=0.1) for n in range(50)]
    with Accounts(Run(tmp_path), 10**6, 0) as accounts:
        best = float("inf")
        for _ in range(40):
            start = time.perf_counter()
            accounts.add(replies)
            accounts.tick({"a": UP})
            best = min(best, time.perf_counter() - start)
    assert best / len(replies) < 10e-6
