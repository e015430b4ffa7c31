"""The supervisor of `vllm serve`, against a server without vLLM in it."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from distill.serving.supervise import Patience, ServerLost, Supervisor

STUB = Path(__file__).with_name("stub_server.py")
QUICK = {"start": 20, "grace": 1, "restarts": 2, "steady": 600, "silent": 3}


def gone(pid):
    """Within a second: what is killed need not be dead at once."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


class Kept:
    """A supervised stub. It runs in the main thread, as signals want it; what happens meanwhile in another."""

    def __init__(self, folder, *flags, **patience):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.log = folder / "starts"
        command = [sys.executable, str(STUB), str(port), str(self.log), *flags]
        self.supervisor = Supervisor(command, f"http://127.0.0.1:{port}", Patience(**QUICK | patience))

    @property
    def starts(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [tuple(map(int, line.split())) for line in lines]

    def run(self, *events):
        """Each event waits for its turn; at last the supervisor is asked to stop."""

        def happen():
            for event in events:
                event(self)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=happen, daemon=True)
        thread.start()
        self.supervisor.run()
        thread.join(5)


def until(what):
    def wait(kept):
        end = time.monotonic() + 20
        while not what(kept):
            assert time.monotonic() < end
            time.sleep(0.05)

    return wait


def ready(capsys, times=1):
    seen = []

    def look(_):
        seen.append(capsys.readouterr().err)
        return "".join(seen).count("distill: ready after") >= times

    return until(look), seen


def test_it_waits_for_health_passes_the_log_on_and_leaves_nothing(tmp_path, capsys):
    kept = Kept(tmp_path)
    answered, seen = ready(capsys)
    before = signal.getsignal(signal.SIGTERM)
    kept.run(answered)
    assert "stub: starting\n" in "".join(seen) and kept.supervisor.restarts == 0
    [(server, child)] = kept.starts
    assert gone(server) and gone(child)  # the child ignores SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_killed_server_comes_again(tmp_path, capsys):
    kept = Kept(tmp_path)
    once, _ = ready(capsys)
    twice, seen = ready(capsys)
    kept.run(once, lambda kept: os.kill(kept.starts[0][0], signal.SIGKILL), twice)
    assert "the server died (SIGKILL); restart 1 in 1 s" in "".join(seen)
    assert len(kept.starts) == 2 and all(gone(pid) for start in kept.starts for pid in start)


def test_a_server_that_falls_silent_is_replaced(tmp_path, capsys):
    kept = Kept(tmp_path, "--hang", "--deaf", silent=0.5)
    kept.run(until(lambda kept: len(kept.starts) == 2))
    assert "no answer from" in capsys.readouterr().err
    assert all(gone(pid) for start in kept.starts for pid in start)


def test_a_server_that_never_was_ready_is_not_tried_again(tmp_path):
    with pytest.raises(ServerLost, match="before it was ready; it said last: vllm serve: error: unrecognized"):
        Kept(tmp_path, "--fail").supervisor.run()
    with pytest.raises(ServerLost, match="'/no/python' does not start: No such file"):
        Supervisor(["/no/python"], "http://127.0.0.1:1", Patience()).run()


def test_one_that_keeps_dying_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distill.serving.supervise._MOST_BACK_OFF", 0.1)
    kept = Kept(tmp_path)

    def killing():
        dead = set()
        while len(dead) < 3:
            for pid, _ in kept.starts:
                if pid not in dead and "ready after" in capsys.readouterr().err:
                    os.kill(pid, signal.SIGKILL)
                    dead.add(pid)
            time.sleep(0.05)

    threading.Thread(target=killing, daemon=True).start()
    with pytest.raises(ServerLost, match="died 3 times in a row"):
        kept.supervisor.run()
    assert kept.supervisor.restarts == 2 and len(kept.starts) == 3
