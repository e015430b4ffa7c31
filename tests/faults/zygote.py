"""The command line without its second of imports: a process that has them, and forks a child for each command.

    python -m tests.faults.zygote

Reads jobs, a JSON object a line: {"argv": ["traces", ...], "stderr": PATH, "done": PATH, "uid": 65534,
"file_size": 100000}, the last two if wanted. Each is answered by the child's process id; when the child has ended, its
exit status (negative: the signal) stands in the file `done`. The child is the real main(), in a session of its own.
"""

import importlib
import json
import os
import resource
import signal
import sys
from typing import Any


def warm() -> None:
    """Import what `distill traces` with endpoints would, and make it wait a tenth as long before it tries again."""
    for name in (
        "rich.console", "rich.progress", "pyarrow.parquet", "distill.cli", "distill.endpoints", "distill.pipeline",
        "distill.problems", "distill.recipe_load", "distill.traces",
    ):  # fmt: skip
        importlib.import_module(name)
    work: Any = importlib.import_module("distill.endpoints.work")
    work._FIRST_PAUSE /= 10  # of the back-off, which doubles: of many samples some fail five times in a row


def child(job: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    if job.get("uid"):
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    sys.argv = ["distill", *job["argv"]]
    from distill.__main__ import main

    status = 1
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watch(job: dict[str, Any]) -> None:
    """In a process between: starts the child, tells its id, waits for its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        child(job)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    with open(job["done"] + ".part", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))
    os.rename(job["done"] + ".part", job["done"])
    os._exit(0)


def main() -> None:
    warm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes between
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            watch(json.loads(line))


if __name__ == "__main__":
    main()
