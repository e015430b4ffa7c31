"""Several endpoints: some misbehave, one dies and comes back, all die."""

import time

from tests.faults.running import FaultServer, Run, check_against_log, check_complete
from tests.faults.server import ANSWERS


def until(condition, limit=20.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def asked(server):
    return sum(event["event"] == "asked" for event in server.events())


def test_three_endpoints_of_which_one_is_bad(zygote, tmp_path):
    quick = [name for name in ANSWERS if name not in ("hang", "hang_midway", "endless_drip", "huge")]
    with (
        FaultServer(tmp_path / "a.log", name="a") as a,
        FaultServer(tmp_path / "b.log", quick, name="b") as b,
        FaultServer(tmp_path / "c.log", name="c") as c,
    ):
        run = Run(tmp_path, [a, b, c], problems=60, samples=3, concurrency=8)
        status, said = zygote.run(run.argv())
        assert status == 0, said
        rows = check_complete(run)
        check_against_log(rows, run.events())
        assert all(asked(server) for server in (a, b, c)), "an endpoint got nothing to do"
        assert len({row["endpoint"] for row in rows}) == 3


def test_one_endpoint_dies_and_returns(zygote, tmp_path):
    with (
        FaultServer(tmp_path / "a.log", latency=0.03, name="a") as a,
        FaultServer(tmp_path / "b.log", latency=0.03, name="b") as b,
        FaultServer(tmp_path / "c.log", latency=0.03, name="c") as c,
    ):
        run = Run(tmp_path, [a, b, c], problems=600, samples=3, concurrency=4)
        command = zygote.start(run.argv())
        until(lambda: asked(b) > 30)
        b.stop()
        there = asked(b)
        until(lambda: len(run.rows()) > 300)
        b.start()
        assert command.wait() == 0, command.said()
        rows = check_complete(run)
        check_against_log(rows, run.events(), restarted=True)
        assert asked(b) > there + 10, "the endpoint that came back was not used again"


def test_a_single_endpoint_that_restarts_is_waited_for(zygote, tmp_path):
    with FaultServer(tmp_path / "log", latency=0.02) as server:
        run = Run(tmp_path, [server], problems=150, samples=2, concurrency=8)
        command = zygote.start(run.argv())
        until(lambda: asked(server) > 30)
        server.stop()
        time.sleep(0.5)
        server.start()
        assert command.wait() == 0, command.said()
        rows = check_complete(run)
        check_against_log(rows, run.events(), restarted=True)


def test_samples_that_nobody_answers_are_named_and_asked_again_at_the_next_start(zygote, tmp_path):
    with FaultServer(tmp_path / "log", ["http_500"], share=1.0) as server:
        run = Run(tmp_path, [server], problems=6, attempts=2)
        status, said = zygote.run(run.argv())
    assert status != 0
    assert "http_500" in said and "Traceback" not in said
    assert run.rows() == []
    with FaultServer(tmp_path / "later.log") as healthy:
        again = Run(tmp_path, [healthy], problems=6, attempts=2)
        status, said = zygote.run(again.argv())
        assert status == 0, said
        check_complete(again)
