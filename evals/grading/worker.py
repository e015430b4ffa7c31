r"""The template process: imports once, then forks a worker whenever the pool asks; and what a worker does.

Started by file path (not imported), so it holds nothing of the caller: no model, no environment beyond the module
path. Each worker shuts itself in before its first item: RLIMIT_AS for memory, a filter against writing, starting
programs and sockets (reasoning-gym's scorers `eval` parts of answers), and an alarm as a last resort, so that it ends
by itself even if the caller was killed while it was computing.

argv: 'math' or 'gym', bytes of address space, a socket. The socket takes lines: 'f' with a descriptor (fork a
worker that serves it; answers its pid) and 'kPID' (kill it; no answer). A worker reads JSON lines {"task", "answer",
"reference", "seconds"} and writes [verdict, reason].
"""

import gc
import json
import os
import re
import resource
import signal
import socket
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "jail"))
import seccomp  # type: ignore[import-not-found]

del sys.path[0]


def compare(answer: str, reference: str) -> tuple[str, str]:
    """(verdict, reason) of math-verify for one final answer against one reference."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def parsed(text: str) -> list:
        # In a box the whole answer is taken as one expression; bare, parse() would pick a part of it.
        boxed = parse("\\boxed{" + text + "}", configs, parsing_timeout=None)
        return boxed or parse(text, configs, parsing_timeout=None)

    gold = parsed(reference)
    if not gold:
        return "unverifiable", "the reference is not an expression that math-verify reads"
    mine = parsed(answer)
    if not mine:
        return "wrong", "the answer is not an expression that math-verify reads"
    if verify(gold, mine, timeout_seconds=None):
        return "correct", "equal by math-verify"
    return "wrong", "not equal by math-verify"


def matches(answer: str, pattern: str) -> tuple[str, str]:
    """Whether a pattern matches the whole answer."""
    try:
        found = re.fullmatch(pattern, answer, re.DOTALL)
    except re.error as error:
        return "unverifiable", f"the reference is no regular expression: {error}"
    return ("correct", "matches") if found else ("wrong", "does not match")


_TUPLE_BOARDS = ("arc_agi", "rearc")


def score(answer: str, reference: str) -> tuple[str, str]:
    """reasoning-gym's own scorer: correct at a score of 1. `reference`: JSON of the entry, with its source_dataset."""
    import reasoning_gym

    entry = json.loads(reference)
    family = entry["metadata"]["source_dataset"]
    try:
        scorer = reasoning_gym.get_score_answer_fn(family)
    except ValueError:
        return "unverifiable", f"reasoning-gym has no family {family[:40]}"
    try:
        if family in _TUPLE_BOARDS:  # JSON has made lists of them, which equal no tuple
            entry["metadata"]["output"] = tuple(map(tuple, entry["metadata"]["output"]))
        value = float(scorer(answer, entry))
    except Exception as error:  # a scorer that cannot read the answer
        return "wrong", f"reasoning-gym's scorer fails on it: {type(error).__name__}"
    return ("correct" if value >= 1.0 else "wrong"), f"reasoning-gym scores {value:.3g}"


# The first comparison of each sort takes ten to a hundred times as long as the next.
_WARM_UP = (
    ("1+1", r"\frac{4}{2}"),
    ("x+y+1", "5"),
    ("x^2+2x+1", "(x+1)^2"),
    ("y=3x+1", "y=1+3x"),
    (r"\frac{\pi}{2}", r"\sqrt{2}"),
    (r"[0,\infty)", r"(0,1]\cup\{3\}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\x\end{pmatrix}"),
    ("x>3", r"(3,\infty)"),
)

_TASKS = {"math": compare, "regex": matches, "gym": score}


def serve(stream: socket.socket, memory: int) -> None:
    """A worker's life."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if seccomp.supported():
        seccomp.lock("parser", signals=False)
    with stream, stream.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            request: dict[str, Any] = json.loads(line)
            signal.alarm(int(request["seconds"]) + 5)
            # math-verify catches what sympy raises; what is left ends this process, and the caller starts another.
            result = _TASKS[request["task"]](request["answer"], request["reference"])
            signal.alarm(0)
            stream.sendall(json.dumps(result).encode() + b"\n")


def main() -> None:
    """Import, then fork on request until the caller's end of the socket closes."""
    preload, memory, control = sys.argv[1], int(sys.argv[2]), socket.socket(fileno=int(sys.argv[3]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if preload == "math":
        for answer, reference in _WARM_UP:  # what is imported and computed here, no worker needs to
            compare(answer, reference)
    else:
        import reasoning_gym  # noqa: F401
    gc.collect()
    gc.freeze()
    control.sendall(b"ready\n")
    children: set[int] = set()
    dying: set[int] = set()
    descriptors: list[int] = []
    rest = b""
    while True:
        part, given, _, _ = socket.recv_fds(control, 4096, 16)
        if not part:
            break
        descriptors += given
        *messages, rest = (rest + part).split(b"\n")
        for message in messages:
            if message == b"f":
                pid = _fork(control, descriptors, memory)
                children.add(pid)
                control.sendall(b"%d\n" % pid)
            elif (pid := int(message[1:])) in children:
                os.kill(pid, signal.SIGKILL)
                children.discard(pid)
                dying.add(pid)
        dying = {pid for pid in dying if os.waitpid(pid, os.WNOHANG) == (0, 0)}
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children | dying:
        os.waitpid(pid, 0)


def _fork(control: socket.socket, descriptors: list[int], memory: int) -> int:
    """A worker on the oldest descriptor, which is taken from the list; its process id."""
    stream = descriptors.pop(0)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            control.close()
            serve(socket.socket(fileno=stream), memory)
            status = 0
        finally:
            os._exit(status)
    os.close(stream)
    return pid


if __name__ == "__main__":
    main()
