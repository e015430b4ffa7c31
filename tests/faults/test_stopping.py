"""Ctrl-C once and twice, two processes on one folder, and shards."""

import signal
import time

from tests.faults.running import FaultServer, Run, check_against_log, check_complete, whole_rows
from tests.faults.test_endpoints import asked, until


def test_ctrl_c_lets_what_is_in_flight_finish(zygote, tmp_path):
    with FaultServer(tmp_path / "log", latency=0.3) as server:
        run = Run(tmp_path, [server], problems=60, concurrency=8)
        command = zygote.start(run.argv())
        until(lambda: len(run.rows()) >= 8)
        command.signal(signal.SIGINT)
        status = command.wait()
        assert status == 130, command.said()
        assert "Traceback" not in command.said()
        events = run.events()
        answered = {event["sample"] for event in events if event["event"] == "answered"}
        assert {event["sample"] for event in events} == answered, "what was in flight was dropped"
        assert {row["sampling"]["seed"] for row in run.rows()} == answered
        assert len(answered) < 60
        assert zygote.run(run.argv())[0] == 0
        check_against_log(check_complete(run), run.events())


def test_a_second_ctrl_c_stops_at_once(zygote, tmp_path):
    with FaultServer(tmp_path / "log", ["hang"], share=0.5) as server:
        run = Run(tmp_path, [server], problems=60, concurrency=64, idle_timeout=60, timeout=60)
        command = zygote.start(run.argv())
        until(lambda: len(run.rows()) >= 5)
        command.signal(signal.SIGINT)
        time.sleep(0.3)
        begun = time.monotonic()
        command.signal(signal.SIGINT)
        status = command.wait()
        assert time.monotonic() - begun < 3
        assert status == 130, command.said()
        assert "Traceback" not in command.said()
        recorded = {row["sampling"]["seed"] for row in run.rows()}
    with FaultServer(tmp_path / "later.log") as healthy:
        again = Run(tmp_path, [healthy], problems=60)
        assert zygote.run(again.argv())[0] == 0
        check_complete(again)
        assert not recorded & {event["sample"] for event in healthy.events()}, "a recorded answer was asked again"


def test_a_second_process_is_refused_with_a_sentence(zygote, tmp_path):
    with FaultServer(tmp_path / "log", latency=0.1) as server:
        run = Run(tmp_path, [server], problems=60, concurrency=8)
        first = zygote.start(run.argv())
        until(lambda: len(run.rows()) >= 3)
        status, said = zygote.run(run.argv())
        assert status == 2
        assert f"another process (pid {first.pid})" in said and said.count("\n") == 1
        assert first.wait() == 0, first.said()
        check_against_log(check_complete(run), run.events())


def test_shards_in_processes_and_their_merge(zygote, tmp_path):
    with FaultServer(tmp_path / "log", ["cut", "http_500", "refusal"], latency=0.02) as server:
        run = Run(tmp_path, [server], problems=50, samples=2, concurrency=8)
        parts = (1, 2, 3)
        commands = [zygote.start(run.argv("--shard", f"{part}/3")) for part in parts]
        for command in commands:
            assert command.wait() == 0, command.said()
        folders = [run.folder.with_name(f"faults.shard-{part}-of-3") for part in parts]
        made = [{row["id"] for row in whole_rows(folder / "traces" / "traces.jsonl")} for folder in folders]
        assert all(made) and sum(map(len, made)) == len(set.union(*made)), "two shards made the same"
        for _ in range(2):  # the second time adds nothing
            status, said = zygote.run(["traces", "merge", str(run.folder), *map(str, folders)])
            assert status == 0, said
        check_against_log(check_complete(run), run.events())
        before = asked(server)
        assert zygote.run(run.argv())[0] == 0
        assert asked(server) == before, "the merged folder was asked for again"
        assert (run.folder / "traces" / "traces.parquet").is_file()
