"""The sandbox's first process: close the doors, say 'ready', then run the program.

argv: control socket, lifeline (-1: bubblewrap looks after the end). The control socket gives one line of JSON:
    mode       'stdin' (a script), 'serve' (a script whose functions are called from outside), 'check' (tests)
    source     the program, or the tests
    peer       'serve' and 'check': the descriptor of the socket that joins the two
    isolation  'bubblewrap', 'namespaces', 'limits-only'
    binds, links, uid, memory, cpu, scratch, file, processes   see evals.grading.sandbox
"""

import itertools
import json
import os
import resource
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import namespaces  # type: ignore[import-not-found]
import programs  # type: ignore[import-not-found]
import seccomp  # type: ignore[import-not-found]


def read_line(control: socket.socket) -> bytes:
    """One line of at most 256 MB from the grader."""
    data = bytearray()
    while not data.endswith(b"\n"):
        part = control.recv(1 << 20)
        if not part:
            os._exit(70)
        data += part
    return bytes(data)


def limits(config: dict) -> None:
    """rlimits, hard as soft."""

    def limit(what: int, value: int) -> None:
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, config["cpu"])
    limit(resource.RLIMIT_FSIZE, config["file"])
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_STACK, 8 << 20)  # also each thread's
    limit(resource.RLIMIT_NPROC, config["processes"])
    limit(resource.RLIMIT_MEMLOCK, 0)
    limit(resource.RLIMIT_AS, config["memory"])


def become_nobody(uid: int) -> None:
    """From root to a user that owns nothing. One uid a sandbox, so that they do not share a count of processes."""
    os.setgroups([])
    for user in (uid, 65534):
        try:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return
        except OSError:  # not mapped in this container
            if user == 65534:
                raise


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    lifeline = int(sys.argv[2])
    config = json.loads(read_line(control))
    isolation = config["isolation"]
    try:
        if isolation == "namespaces":
            namespaces.enter(config["binds"], config["links"], config["scratch"])
            namespaces.supervise(lifeline)
        if isolation != "limits-only" and os.getuid() == 0:
            become_nobody(config["uid"])
        if isolation != "bubblewrap":
            namespaces.die_with_parent()
        os.chdir("/scratch" if isolation != "limits-only" else config["folder"])
        os.umask(0o077)
        namespaces.drop_capabilities()
        kept = sorted({2, control.fileno(), config.get("peer", 2), 4096})
        for low, high in itertools.pairwise(kept):
            os.closerange(low + 1, high)
        limits(config)
        seccomp.lock("program", signals=isolation != "limits-only")
    except OSError as error:
        control.sendall(json.dumps({"failed": str(error)}).encode() + b"\n")
        os._exit(71)
    control.sendall(b'{"ready": true}\n')
    programs.run(config["mode"], config["source"], control, config.get("peer", -1))


if __name__ == "__main__":
    main()
