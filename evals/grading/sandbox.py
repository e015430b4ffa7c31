"""Running a program that a model wrote: what it may use, how it is shut in, and how it ended.

Isolation, best first: 'bubblewrap' (Debian's `bubblewrap`), 'namespaces' (the same by hand, see jail/namespaces.py).
Inside, in both: no network, no view of other processes, a read-only root with nothing but Python and the system's
libraries, an in-memory /scratch, an empty environment, rlimits and a seccomp filter. Where neither can be had,
nothing runs, unless 'limits-only' was asked for by name (argument, or DISTILL_SANDBOX=limits-only): rlimits and the
filter alone, so the program reads and writes whatever its user can.
"""

import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

JAIL = Path(__file__).parent / "jail"
KINDS = ("bubblewrap", "namespaces", "limits-only")
START_SECONDS = 60.0  # to start Python inside on a busy machine; the program's clock starts after it
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": "/scratch", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1",  # each further one reserves 64 MB of the address space
}  # fmt: skip
_sandboxes = itertools.count()


class NoIsolation(RuntimeError):
    """This machine cannot shut a program in."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one run of a program."""

    seconds: float = 10.0  # wall clock, and of CPU time rounded up
    memory: int = 1 << 29  # bytes of address space; threads share it and there is one process
    output: int = 16 << 20  # bytes written to stdout, and to stderr
    scratch: int = 64 << 20  # bytes of files
    threads: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a run ended. status: 'ended', 'time', 'output' or 'failed' (the sandbox, not the program)."""

    status: str
    code: int | None
    stdout: bytes
    error: str  # the last line of stderr, shortened; what a model wrote


@lru_cache(maxsize=1)
def _view() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """(binds, links): what of this machine is seen inside. Python, shared libraries, three devices, the jail."""
    binds, links = [], []
    for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if os.path.islink(folder):
            links.append((os.readlink(folder), folder))
        elif os.path.isdir(folder):
            binds.append((folder, folder))
    python = os.path.realpath(sys.executable)
    library = os.path.realpath(sysconfig.get_path("stdlib"))
    shared = os.path.realpath(os.path.join(sysconfig.get_config_var("LIBDIR") or "", "none")).removesuffix("/none")
    files = [python, library, "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    name = sysconfig.get_config_var("INSTSONAME") or ""
    if ".so" in name:
        files.append(os.path.join(shared, name))
    inside = [folder for folder, _ in binds]
    binds += [(f, f) for f in files if os.path.exists(f) and not any(f.startswith(i + "/") for i in inside)]
    binds += [(str(JAIL), "/jail")]
    return tuple(binds), tuple(links)


def _bubblewrap_command(program: str, limits: Limits) -> list[str]:
    binds, links = _view()
    command = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # given up before the program starts
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    parents = {str(parent) for _, inside in (*binds, *links) for parent in Path(inside).parents} - {"/"}
    for parent in sorted(parents):  # which bubblewrap itself would make for its own user only
        command += ["--perms", "0755", "--dir", parent]
    for source, inside in binds:
        command += ["--dev-bind" if inside.startswith("/dev/") else "--ro-bind", source, inside]
    for target, inside in links:
        command += ["--symlink", target, inside]
    command += ["--perms", "0777", "--size", str(limits.scratch), "--tmpfs", "/scratch", "--remount-ro", "/"]
    return [*command, "--chdir", "/", "--"]


class Sandbox:
    """One shut-in process; a context manager that leaves no process behind.

    mode and source: see jail/start.py. `peer`: for 'serve' and 'check', this side of the socket that joins them.
    """

    def __init__(
        self, isolation: str, mode: str, source: str, limits: Limits, *, stdin: bytes = b"", peer: int | None = None
    ) -> None:
        self.limits, self._isolation = limits, isolation
        self._folder = tempfile.TemporaryDirectory(prefix="distill-") if isolation == "limits-only" else None
        self._control, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        binds, links = _view()
        config: dict[str, Any] = asdict(limits) | {
            "mode": mode,
            "source": source,
            "isolation": isolation,
            "binds": binds,
            "links": links,
            "uid": 1_900_000_000 + (os.getpid() * 1000 + next(_sandboxes)) % 100_000_000,
            "cpu": int(limits.seconds) + 1,
            "file": limits.scratch,
            "processes": limits.threads,
            "folder": self._folder.name if self._folder else "",
        }
        if peer is not None:
            config["peer"] = peer
        command = [os.path.realpath(sys.executable), "-S", "-s", "-P", "-B", "-X", "utf8"]
        if isolation == "bubblewrap":
            program = shutil.which("bwrap", path=_PATH)
            assert program is not None
            start = [*_bubblewrap_command(program, limits), *command, "/jail/start.py", str(theirs.fileno()), "-1"]
        else:
            start = [*command, str(JAIL / "start.py"), str(theirs.fileno()), str(lifeline)]
        with _read_only(stdin) as given:
            self.process = subprocess.Popen(
                start,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                cwd="/",
                bufsize=0,
                start_new_session=True,
                pass_fds=[theirs.fileno(), lifeline, *([peer] if peer is not None else [])],
            )
        theirs.close()
        os.close(lifeline)
        self._config = json.dumps(config).encode() + b"\n"
        self._started = 0.0

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._lifeline)
        if self._isolation != "namespaces":
            self.process.kill()  # bubblewrap takes the process inside with it; limits alone have no other process
        try:
            self.process.wait(5)  # what watches over the process inside sees its lifeline end, and ends it
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._control.close()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        if self._folder:
            self._folder.cleanup()

    def start(self) -> str | None:
        """Hand over the program; None when it runs (its clock starts now), else what failed."""
        self._control.settimeout(START_SECONDS)
        try:
            self._control.sendall(self._config)
            line = self.line(START_SECONDS)
        except OSError:
            line = None
        if line is None or "ready" not in line:
            failed = line.get("failed") if isinstance(line, dict) else None
            if failed is None:
                self.process.kill()
                failed = _last_line(self.process.stderr.read() if self.process.stderr else b"")
            return failed or "the sandbox did not start"
        self._started = time.monotonic()
        return None

    def left(self) -> float:
        """Seconds that the program has left."""
        return self._started + self.limits.seconds - time.monotonic()

    def line(self, seconds: float) -> Any:
        """One line of JSON from inside, None if the process ends or the time is over."""
        deadline, data = time.monotonic() + seconds, b""
        while not data.endswith(b"\n") and len(data) < 65536:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._control], [], [], left)[0]:
                return None
            part = self._control.recv(4096)
            if not part:
                return None
            data += part
        return json.loads(data)

    def outcome(self) -> Outcome:
        """Wait for the end, reading all output within the limits."""
        assert self.process.stdout is not None and self.process.stderr is not None
        parts: dict[int, list[bytes]] = {self.process.stdout.fileno(): [], self.process.stderr.fileno(): []}
        sizes = dict.fromkeys(parts, 0)
        streams = set(parts)
        out, err = parts
        status = "ended"
        while streams and status == "ended":
            left = self.left()
            ready = select.select(list(streams), [], [], left)[0] if left > 0 else []
            if not ready:
                status = "time"
            for stream in ready:
                part = os.read(stream, 1 << 16)
                if not part:
                    streams.discard(stream)
                    continue
                sizes[stream] += len(part)
                parts[stream].append(part)
                if stream == err:
                    parts[err] = [b"".join(parts[err])[-4096:]]
                if sizes[stream] > self.limits.output:
                    status = "output"
        if status == "ended":
            try:  # it may have closed its output and go on
                self.process.wait(max(0.0, self.left()))
            except subprocess.TimeoutExpired:
                status = "time"
        return Outcome(status, self.process.poll(), b"".join(parts[out]), _last_line(b"".join(parts[err])))


class _read_only:
    """Bytes as a descriptor that can only be read: no pipe to feed, no file that the program could fill."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __enter__(self) -> int:
        with tempfile.TemporaryFile() as file:
            file.write(self.data)
            file.flush()
            self.descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "".join(c for c in last if c.isprintable())[:120]


_working: set[str] = set()


def why_not(isolation: str) -> str | None:
    """None if programs can be shut in this way here, else the reason. Tried until it works, with an empty program."""
    if isolation in _working:
        return None
    if not sys.platform.startswith("linux"):
        return "the sandbox needs Linux"
    if isolation == "bubblewrap" and shutil.which("bwrap", path=_PATH) is None:
        return "bubblewrap (bwrap) is not installed"
    with Sandbox(isolation, "stdin", "", Limits()) as sandbox:
        reason = sandbox.start()
    if reason is None:
        _working.add(isolation)
    return reason


def choose(isolation: str | None = None) -> str:
    """The isolation to use: the named one, else DISTILL_SANDBOX's, else the best that works.

    Raises NoIsolation if it does not work here, ValueError for another name.
    """
    named = isolation or os.environ.get("DISTILL_SANDBOX") or None
    if named is not None and named not in KINDS:
        raise ValueError(f"unknown isolation {named!r} (DISTILL_SANDBOX); expected one of {', '.join(KINDS)}")
    reasons = []
    for kind in [named] if named else KINDS[:2]:
        reason = why_not(kind)
        if reason is None:
            return kind
        reasons.append(f"{kind}: {reason}")
    raise NoIsolation(
        f"no isolation for programs here ({'; '.join(reasons)}); install bubblewrap, or allow it without by name: "
        "DISTILL_SANDBOX=limits-only"
    )
