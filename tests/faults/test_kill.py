"""kill -9 at random moments: nothing that was written is lost, nothing is there twice, no recorded answer asked again.

Two hundred kills behind `slow`, and as many as KILLS says:

    KILLS=1000 python -m pytest -m slow tests/faults/test_kill.py -s
"""

import json
import os
import random
import re
import time
from contextlib import suppress
from functools import partial

import psutil
import pytest

from tests.faults.running import FaultServer, Run, check_against_log, check_complete
from tests.faults.server import FAILURES, OUTCOMES, STREAMED_FAILURES
from tests.faults.test_endpoints import until

# Those that cost no waiting, so that the kills meet samples being written.
QUICK = [
    name
    for name in (*FAILURES, *OUTCOMES, *STREAMED_FAILURES)
    if name not in ("huge", "hang", "hang_midway", "endless_drip")
]


def moved_or_ended(run, command, before):
    return command.ended or (run.traces.exists() and run.traces.read_bytes().count(b"\n") > before.count(b"\n"))


def kill_again_and_again(zygote, kills, lifetime, server, run, seed=0):
    """Start and kill; returns how many of the kills came after new samples. Every other one waits for the first."""
    pause = random.Random(seed)
    before = b""
    recorded = set()
    at_work = refused = 0
    for number in range(kills):
        log_size = server.log.stat().st_size if server.log.exists() else 0
        command = zygote.start(run.argv())
        time.sleep(pause.uniform(0, lifetime))
        if number % 2:  # a busy machine may need longer than any pause
            until(partial(moved_or_ended, run, command, before))
        status = command.kill()
        if status == 2 and "another process" in command.said():
            refused += 1  # a child of the killed process that was yet to become git held the lock a moment longer
            continue
        assert status == -9, f"the run was over, or failed, after {number} kills: {command.said()[-1000:]}"
        left = run.traces.read_bytes() if run.traces.exists() else b""
        whole = left[: left.rfind(b"\n") + 1]
        assert left.startswith(before), "a line that was written is gone or changed"
        with open(server.log, "rb") as log:
            log.seek(log_size)
            asked = [json.loads(line)["sample"] for line in log.read().split(b"\n")[:-1]]
        again = recorded.intersection(asked)
        assert not again, f"{len(again)} samples with a recorded answer were asked again"
        assert shown(command.said()) <= whole.count(b"\n"), "a sample was counted that is not there"
        at_work += whole != before
        recorded |= {json.loads(line)["sampling"]["seed"] for line in whole[len(before) :].split(b"\n")[:-1]}
        before = whole
    assert refused <= kills // 50
    return at_work


def shown(said):
    """The most samples that a run has said are finished."""
    return max((int(count) for count in re.findall(r"^traces +(\d+)/\d+ traces", said, re.MULTILINE)), default=0)


def finish(zygote, run, server, limit):
    status, said = zygote.run(run.argv(), limit)
    assert status == 0, said
    rows = check_complete(run)
    check_against_log(rows, run.events(), restarted=True)
    return rows


def left_behind(zygote):
    """Processes in the sessions of commands that have ended: graders, say, that nobody is there to tell."""
    sessions = {command.pid for command in zygote.commands}
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getsid(pid) in sessions:
                found.append(pid)
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_kills_lose_nothing_and_repeat_nothing(stream, zygote, tmp_path):
    with FaultServer(tmp_path / "log", ["cut", "http_500", "empty"], latency=0.02) as server:
        # Graded as they come; nothing is right, so all four are wanted of every problem.
        graded = {"sampling": {"adaptive": {"verified": 1, "most": 4}}, "filters": {"correctness": {}}}
        run = Run(tmp_path, [server], problems=150, samples=4, concurrency=8, stream=stream, **graded)
        at_work = kill_again_and_again(zygote, 5, 0.8, server, run, seed=stream)
        assert at_work >= 2, "the kills came too early or too late"
        finish(zygote, run, server, 60)
        until(lambda: not left_behind(zygote), limit=5)


def test_a_power_cut_may_leave_half_a_line_and_zeros(zygote, tmp_path):
    with FaultServer(tmp_path / "log", latency=0.02) as server:
        run = Run(tmp_path, [server], problems=150, samples=2, concurrency=8)
        kill_again_and_again(zygote, 1, 0.6, server, run)
        run.traces.parent.mkdir(parents=True, exist_ok=True)
        with open(run.traces, "ab") as file:
            file.write(b'{"id": "0123456789abcdef", "problem_id": "torn')
            file.write(bytes(5000))
        finish(zygote, run, server, 30)


@pytest.mark.slow
def test_two_hundred_kills(zygote, tmp_path):
    kills = int(os.environ.get("KILLS", "200"))
    with FaultServer(tmp_path / "log", QUICK, latency=0.05) as server:
        run = Run(tmp_path, [server], problems=5 * kills, samples=4, concurrency=8, attempts=20)
        begun = time.monotonic()
        at_work = kill_again_and_again(zygote, kills, 0.8, server, run)
        seconds = time.monotonic() - begun
        rows = finish(zygote, run, server, 1200)
        print(
            f"\n{kills} kills in {seconds:.0f} s, {at_work} of them after new samples; {len(rows)} samples, each once"
        )
        assert at_work > kills / 3
        until(lambda: not left_behind(zygote), limit=5)
