"""Verdicts on programs: run in a sandbox against tests whose expected results the program never sees.

For stdin tests the program runs alone and its output is compared here. For function tests two sandboxes are joined
by a socket: the tests run in one, the program in the other (jail/programs.py); the verdict comes from the tests' side.
"""

import json
import math
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from evals.grading.pool import cores
from evals.grading.sandbox import Limits, NoIsolation, Outcome, Sandbox, choose

MAX_SECONDS = 60.0  # of one run; and, as a factor of one run's, of all runs of a program
RUNS = 6
TEST_SIDE_MEMORY = 1 << 30
_slots = threading.BoundedSemaphore(max(2, cores()))


@dataclass(frozen=True)
class CodeTests:
    """The reference answer of a code problem; see docs/formats.md for its JSON."""

    stdin: tuple[tuple[str, str], ...] = ()  # (input, expected output)
    function: str | None = None
    calls: tuple[dict[str, Any], ...] = ()  # {"args", "kwargs", "expected"}
    code: tuple[str, ...] = ()  # asserts, or code that defines check(candidate)
    setup: str = ""
    limits: Limits = field(default_factory=Limits)


def read_tests(answer: str) -> CodeTests:
    """The tests of a reference answer. ValueError says what is wrong with it."""
    try:
        row = json.loads(answer)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("the reference is not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("the reference is no JSON object")
    if row.get("language", "python") not in ("python", "python3"):
        raise ValueError(f"programs in {str(row['language'])[:20]} are not run")
    limits = Limits()
    seconds, memory = row.get("seconds", limits.seconds), row.get("memory_mb", limits.memory >> 20)
    if not isinstance(seconds, (int, float)) or not isinstance(memory, int) or seconds <= 0 or memory <= 0:
        raise ValueError("'seconds' and 'memory_mb' are not positive numbers")
    limits = replace(limits, seconds=min(MAX_SECONDS, float(seconds)), memory=min(memory, 4096) << 20)
    function = row.get("function")
    try:
        if "inputs" in row and "outputs" in row and not row.get("fn_name"):  # as APPS and TACO are published
            if len(row["inputs"]) != len(row["outputs"]):
                raise ValueError(f"there are {len(row['inputs'])} 'inputs' and {len(row['outputs'])} 'outputs'")
            row["stdin"] = [{"input": i, "output": o} for i, o in zip(row["inputs"], row["outputs"], strict=True)]
    except TypeError:
        raise ValueError("'inputs' or 'outputs' is no list") from None
    try:
        stdin = tuple((_lines(test["input"]), _lines(test["output"])) for test in row.get("stdin", ()))
        calls: tuple[dict[str, Any], ...] = tuple(
            {"args": [], "kwargs": {}} | dict(call) for call in row.get("calls", ())
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError("a test lacks its 'input' or 'output', or is no JSON object") from None
    if any(not isinstance(c["args"], list) or not isinstance(c["kwargs"], dict) or "expected" not in c for c in calls):
        raise ValueError("a call lacks its 'expected', or its 'args' are no list")
    asserts, setup = row.get("asserts", []), row.get("setup", "")
    if not isinstance(asserts, list) or not all(isinstance(c, str) for c in (*asserts, setup)):
        raise ValueError("'asserts' is no list of strings, or 'setup' no string")
    if not isinstance(row.get("check", ""), str):
        raise ValueError("'check' is no string")
    code = [*asserts, row["check"]] if "check" in row else asserts
    if (calls or "check" in row) and not isinstance(function, str):
        raise ValueError("there is no 'function' to call")
    if not stdin and not calls and not code:
        raise ValueError("the reference has no tests: no 'stdin', 'calls', 'asserts' or 'check'")
    return CodeTests(stdin, function, calls, tuple(code), setup, limits)


def _lines(text: Any) -> str:
    if isinstance(text, list):
        return "\n".join(map(_lines, text))
    if not isinstance(text, str):
        raise TypeError
    return text


def grade_code(source: str, answer: str, isolation: str | None = None) -> tuple[str, str]:
    """(verdict, reason) of a Python program. Never raises for what the program does; bounded by its limits."""
    try:
        tests = read_tests(answer)
    except ValueError as error:
        return "unverifiable", str(error)
    source = source.encode(errors="replace").decode()
    try:
        isolation = choose(isolation)
    except NoIsolation as error:
        return "unverifiable", str(error)
    with _slots:
        if tests.stdin:
            verdict = _stdin(source, tests, isolation)
            if verdict[0] != "correct" or not (tests.calls or tests.code):
                return verdict
        return _functions(source, tests, isolation)


def _stdin(source: str, tests: CodeTests, isolation: str) -> tuple[str, str]:
    budget = RUNS * tests.limits.seconds
    for number, (given, expected) in enumerate(tests.stdin, start=1):
        where = f"test {number} of {len(tests.stdin)}"
        limits = replace(tests.limits, output=max(1 << 20, 16 * len(expected)))
        with Sandbox(isolation, "stdin", source, limits, stdin=given.encode(errors="replace")) as sandbox:
            failed = sandbox.start()
            if failed is not None:
                return "unverifiable", f"{where}: {failed}"
            outcome = sandbox.outcome()
            budget -= tests.limits.seconds - max(0.0, sandbox.left())
        problem = _ending(outcome, limits)
        if problem is not None:
            return "wrong", f"{where}: {problem}"
        if not same_output(outcome.stdout, expected):
            return "wrong", f"{where}: another output"
        if budget <= 0 and number < len(tests.stdin):
            return "unverifiable", f"{where}: all tests would take longer than {RUNS * tests.limits.seconds:g} s"
    return "correct", f"passed {len(tests.stdin)} tests"


def _ending(outcome: Outcome, limits: Limits) -> str | None:
    if outcome.status == "time":
        return f"took longer than {limits.seconds:g} s"
    if outcome.status == "output":
        return f"wrote more than {limits.output} bytes"
    if outcome.code:
        return f"ended with {outcome.code}" + (f": {outcome.error}" if outcome.error else "")
    return None


def same_output(written: bytes, expected: str) -> bool:
    """Equal line by line but for white space around lines, or token by token with numbers as decimals (1.0 is 1)."""
    text = written.decode(errors="replace")
    if text.split() == expected.split():
        return [line.split() for line in text.strip().splitlines()] == [
            line.split() for line in expected.strip().splitlines()
        ]
    ours, theirs = ([line.split() for line in t.strip().splitlines()] for t in (text, expected))
    if [len(line) for line in ours] != [len(line) for line in theirs]:
        return False
    return all(_same_token(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def _same_token(a: str, b: str) -> bool:
    if a == b:
        return True
    with suppress(InvalidOperation):
        x, y = Decimal(a), Decimal(b)
        if not (x.is_finite() and y.is_finite()):
            return False
        # What a judge prints as a decimal is rounded in its last digits.
        return x == y or ("." in b and math.isclose(float(x), float(y), rel_tol=1e-9, abs_tol=1e-9))
    return False


def _functions(source: str, tests: CodeTests, isolation: str) -> tuple[str, str]:
    spec = {"function": tests.function, "calls": tests.calls, "code": tests.code, "setup": tests.setup}
    ours, theirs = socket.socketpair()
    patient = replace(tests.limits, memory=max(tests.limits.memory, TEST_SIDE_MEMORY), seconds=MAX_SECONDS)
    with (
        ours,
        theirs,
        Sandbox(isolation, "check", json.dumps(spec), patient, peer=ours.fileno()) as judge,
        Sandbox(isolation, "serve", source, tests.limits, peer=theirs.fileno()) as program,
    ):
        ours.close()
        theirs.close()
        failed = judge.start() or program.start()
        if failed is not None:
            return "unverifiable", failed
        verdict = judge.line(program.left())
        if isinstance(verdict, list):
            return verdict[0], verdict[1]
        if program.left() <= 0:
            return "wrong", f"took longer than {tests.limits.seconds:g} s"
        return "wrong", "the tests ended without a verdict"
