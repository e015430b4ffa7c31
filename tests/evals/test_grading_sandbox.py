"""The sandbox: what a program that wants out can read, write, reach and use up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.grading import grade
from evals.grading.code import grade_code
from evals.grading.sandbox import KINDS, Limits, NoIsolation, Sandbox, choose, why_not

WORKING = [kind for kind in KINDS[:2] if why_not(kind) is None]
isolated = pytest.mark.skipif(not WORKING, reason=f"no isolation here: {why_not(KINDS[0])}, {why_not(KINDS[1])}")
everywhere = pytest.mark.parametrize("isolation", WORKING)

ECHO = json.dumps({"stdin": [{"input": "1 2\n", "output": "3\n"}], "seconds": 5})
CALLS = json.dumps({"function": "add", "calls": [{"args": [1, 2], "expected": 3}], "seconds": 5})
ADD = "def add(a, b):\n    return a + b\n"
SUM = "a, b = map(int, input().split())\nprint(a + b)\n"


PROBE = """
import os, sys
def attempt(name, action):
    try:
        result = action()
    except BaseException as error:
        print(name, "refused", type(error).__name__)
    else:
        print(name, "ALLOWED", result)
"""


def probe(isolation: str, actions: str, limits: Limits | None = None) -> str:
    """What a program prints that attempts things."""
    with Sandbox(isolation, "stdin", PROBE + actions, limits or Limits(seconds=10)) as sandbox:
        assert sandbox.start() is None
        outcome = sandbox.outcome()
    assert outcome.status == "ended" and outcome.code == 0, outcome
    return outcome.stdout.decode()


@isolated
@everywhere
def test_nothing_outside_can_be_read_written_or_reached(isolation, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_SECRET_KEY", "hunter2")
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    home = Path.home()
    listening = subprocess.Popen(
        [sys.executable, "-c", "import socket,time; s=socket.create_server(('127.0.0.1', 0)); "
         "print(s.getsockname()[1], flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert listening.stdout is not None
    port = int(listening.stdout.readline())
    try:
        printed = probe(
            isolation,
            f"""
import socket, ctypes, signal
attempt("secret", lambda: open({str(secret)!r}).read())
attempt("home", lambda: os.listdir({str(home)!r} + "/.ssh"))
attempt("repository", lambda: open({str(Path(__file__))!r}).read())
attempt("passwd", lambda: open("/etc/passwd").read())
attempt("shadow", lambda: open("/etc/shadow").read())
attempt("parent's environment", lambda: open("/proc/{os.getpid()}/environ").read())
attempt("first process", lambda: open("/proc/1/environ").read())
attempt("own parent", lambda: open(f"/proc/{{os.getppid()}}/environ").read())
attempt("write tmp", lambda: open("/tmp/x", "w"))
attempt("write outside", lambda: open({str(tmp_path / "written")!r}, "w"))
attempt("write root", lambda: open("/x", "w"))
attempt("write library", lambda: open(os.__file__, "a"))
attempt("make folder", lambda: os.makedirs("/lib/x"))
attempt("connect", lambda: socket.create_connection(("127.0.0.1", {port}), 2))
attempt("resolve", lambda: socket.create_connection(("example.com", 80), 2))
attempt("unix socket", lambda: socket.socket(socket.AF_UNIX))
attempt("kill parent", lambda: os.kill({os.getpid()}, signal.SIGTERM))
attempt("fork", os.fork)
attempt("shell", lambda: __import__("subprocess").run(["/bin/sh", "-c", "true"]))
attempt("become root", lambda: os.setuid(0))
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    if libc.syscall(*args) < 0: raise OSError(ctypes.get_errno(), "")
    return "done"
attempt("unshare", lambda: call(272, 0x10000000))
attempt("mount", lambda: call(165, b"none", b"/scratch", b"tmpfs", 0, 0))
attempt("ptrace", lambda: call(101, 16, 1, 0, 0))
attempt("memfd", lambda: os.memfd_create("x"))
attempt("shared memory", lambda: call(29, 0, 1 << 20, 0o1600))
attempt("io_uring", lambda: call(425, 1, ctypes.create_string_buffer(256)))
attempt("keyring", lambda: call(250, 0, -3, 0))
attempt("outlive the parent", lambda: call(157, 1, 0, 0, 0, 0))
attempt("devices", lambda: open("/dev/kmsg").read(1))
print("environment", sorted(os.environ))
os.chdir("/scratch")
open("kept", "w").write("fine")
import shutil
shutil.rmtree("/scratch", ignore_errors=True)
print("scratch", os.listdir("/scratch"))
""",
        )
    finally:
        listening.kill()
        listening.wait()
        listening.stdout.close()
    assert "ALLOWED" not in printed, printed
    assert printed.count("refused") == 29
    assert "hunter2" not in printed and "SECRET" not in printed
    assert not (tmp_path / "written").exists()
    assert "scratch []" in printed


@isolated
@everywhere
@pytest.mark.parametrize(
    ("name", "source", "status"),
    [
        ("fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "time"),
        ("clone bomb", "import ctypes\nl = ctypes.CDLL(None)\nwhile True: l.syscall(56, 17, 0, 0, 0, 0)", "time"),
        ("thread bomb", "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,), "
         "daemon=True).start()\n    except Exception: pass", "time"),
        ("endless output", "while True: print('x' * 1000)", "output"),
        ("endless errors", "import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
        ("memory bomb", "x = []\nwhile True: x.append(bytearray(1 << 24))", "ended"),
        ("disk bomb", "for n in range(10**6): open(str(n), 'wb').write(bytes(1 << 22))", "ended"),
        ("sleep", "import time\ntime.sleep(1000)", "time"),
        ("deaf sleep", "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
         "    except (OSError, ValueError): pass\nwhile True: time.sleep(100)", "time"),
        ("closed output", "import os, time\nos.close(1); os.close(2)\ntime.sleep(1000)", "time"),
        ("open files", "x = []\nwhile True: x.append(open('/dev/null'))", "ended"),
    ],
)  # fmt: skip
def test_bombs_end_in_time_and_leave_nothing(isolation, name, source, status):
    limits = Limits(seconds=0.8, memory=256 << 20, output=1 << 20, scratch=16 << 20)
    start = time.monotonic()
    with Sandbox(isolation, "stdin", source, limits) as sandbox:
        assert sandbox.start() is None
        outcome = sandbox.outcome()
        peak = memory_of_descendants(sandbox.process.pid)
    assert outcome.status == status, outcome
    assert status != "ended" or outcome.code not in (0, None)
    assert time.monotonic() - start < 15
    assert peak < 600 << 20
    deadline = time.monotonic() + 5
    while survivors() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not survivors()


def memory_of_descendants(pid: int) -> int:
    total, waiting = 0, [pid]
    while waiting:
        pid = waiting.pop()
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue
    return total


def survivors() -> list[int]:
    """Processes of sandboxes that this test process started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes()
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if b"jail/start.py" in line and (parent in (1, os.getpid())):
                found.append(int(folder.name))
    return found


@isolated
@everywhere
def test_the_program_ends_with_a_grader_that_is_killed(isolation):
    code = (
        "import sys; from evals.grading.sandbox import *\n"
        "s = Sandbox(sys.argv[1], 'stdin', 'import time\\ntime.sleep(300)', Limits(seconds=300))\n"
        "assert s.start() is None; print('up', flush=True); s.outcome()"
    )
    grader = subprocess.Popen(
        [sys.executable, "-c", code, isolation], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert grader.stdout is not None and grader.stdout.readline() == b"up\n"
    inside = descendants(grader.pid)
    assert inside
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    grader.stdout.close()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in inside) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in inside if running(pid)]


def descendants(pid: int) -> list[int]:
    children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [d for child in children for d in descendants(child)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_without_isolation_nothing_runs_unless_it_was_named(monkeypatch):
    monkeypatch.setattr("evals.grading.sandbox.why_not", lambda kind: None if kind == "limits-only" else "not here")
    monkeypatch.delenv("DISTILL_SANDBOX", raising=False)
    with pytest.raises(NoIsolation, match="bubblewrap: not here; namespaces: not here"):
        choose()
    graded = grade(f"```python\n{SUM}```", ECHO, "code")
    assert graded.verdict == "unverifiable" and "DISTILL_SANDBOX=limits-only" in graded.reason
    monkeypatch.setenv("DISTILL_SANDBOX", "limits-only")
    assert choose() == "limits-only"
    monkeypatch.setenv("DISTILL_SANDBOX", "off")
    with pytest.raises(ValueError, match="unknown isolation 'off'"):
        choose()


@pytest.mark.skipif(why_not("limits-only") is not None, reason=f"{why_not('limits-only')}")
def test_limits_alone_still_bound_and_cannot_signal():
    assert grade_code(SUM, ECHO, "limits-only")[0] == "correct"
    assert grade_code(ADD, CALLS, "limits-only")[0] == "correct"
    printed = probe(
        "limits-only", f"import signal, socket\nattempt('kill', lambda: os.kill({os.getpid()}, signal.SIGTERM))\n"
        "attempt('fork', os.fork)\nattempt('socket', socket.socket)"
    )  # fmt: skip
    assert "ALLOWED" not in printed


@pytest.mark.skipif(why_not("limits-only") is not None, reason=f"{why_not('limits-only')}")
def test_limits_alone_end_a_program_as_soon_as_its_time_is_over():
    started = time.monotonic()
    tests = json.dumps(json.loads(ECHO) | {"seconds": 1})
    assert grade_code("while True: pass", tests, "limits-only")[1].endswith("took longer than 1 s")
    assert time.monotonic() - started < 4  # it was 6: five more went by until the process was killed
