"""Programs in the sandbox: ordinary ones, and ones that want out, or a verdict that they did not earn."""

import ast
import json
import os
import threading
from pathlib import Path

import pytest

from evals.grading import grade, grade_many
from evals.grading.code import grade_code, read_tests, same_output
from evals.grading.sandbox import KINDS, why_not

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))


WORKING = [kind for kind in KINDS[:2] if why_not(kind) is None]


isolated = pytest.mark.skipif(not WORKING, reason=f"no isolation here: {why_not(KINDS[0])}, {why_not(KINDS[1])}")


everywhere = pytest.mark.parametrize("isolation", WORKING)


ECHO = {"stdin": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11\n"}], "seconds": 5}


CALLS = {"function": "add", "calls": [{"args": [1, 2], "expected": 3}, {"args": [5, 6], "expected": 11}], "seconds": 5}


ASSERTS = {"asserts": ["assert add(1, 2) == 3", "assert add(5, 6) == 11"], "seconds": 5}


CHECK = {"function": "add", "check": "def check(f):\n    assert f(1, 2) == 3\n    assert f(5, 6) == 11\n", "seconds": 5}


ADD = "def add(a, b):\n    return a + b\n"


SUM = "a, b = map(int, input().split())\nprint(a + b)\n"


def verdict(source: str, tests: dict, isolation: str | None = None) -> tuple[str, str]:
    return grade_code(source, json.dumps(tests), isolation)


@isolated
@everywhere
@pytest.mark.parametrize(
    ("source", "tests", "expected", "reason"),
    [
        (SUM, ECHO, "correct", "passed 2 tests"),
        ("print(3)", ECHO, "wrong", "test 2 of 2: another output"),
        ("import sys\nprint(3)\nsys.exit(3)", ECHO, "wrong", "ended with 3"),
        ("def (", ECHO, "wrong", "SyntaxError"),
        ("print(undefined)", ECHO, "wrong", "NameError"),
        (ADD, CALLS, "correct", "passed 2 tests"),
        (ADD, ASSERTS, "correct", "passed 2 tests"),
        (ADD, CHECK, "correct", "passed 1 tests"),
        ("class Solution:\n    def add(self, a, b):\n        return a + b\n", CALLS, "correct", "passed"),
        ("def add(a, b): return 3", CALLS, "wrong", "test 2 of 2: another value"),
        ("def add(a, b): return 3", ASSERTS, "wrong", "test 2 of 2: AssertionError"),
        ("def plus(a, b): return a + b", CALLS, "wrong", "defines no function add"),
        ("def add(a, b): raise KeyError(a)", CALLS, "wrong", "KeyError"),
        ("def add(", CALLS, "wrong", "SyntaxError"),
        (
            "def add(a, b): return a + b if a < 5 else 0",
            {**CALLS, "calls": CALLS["calls"][:1], **ASSERTS},
            "wrong",
            "2",
        ),
        (
            "def add(a, b): return 3",
            {**CHECK, "check": "def check(f):\n    f(1, 2)\n", **ASSERTS},
            "wrong",
            "test 2 of 3",
        ),
        (ADD, {**CHECK, "check": "def test(f):\n    assert f(1, 2) == 4\n"}, "unverifiable", "checks nothing"),
        (ADD, {"asserts": ["", "def test_add():\n    assert add(1, 2) == 4\n"]}, "unverifiable", "checks nothing"),
        (ADD, {"asserts": ["sum = add(1, 2)", "assert sum == 3"]}, "correct", "passed 2 tests"),
    ],
)
def test_verdicts_of_ordinary_programs(isolation, source, tests, expected, reason):
    found, why = verdict(source, tests, isolation)
    assert (found, reason in why) == (expected, True), why


@isolated
def test_values_cross_between_the_tests_and_the_program():
    source = """
import math
LIMIT = 7
class Node:
    def __init__(self, value): self.value, self.next = value, None
def same(x): return x
def kinds(): return (1, [2.5, None], {3}, {"a": (True,)}, b"x", 1j, float("inf"))
def fill(items): items.append(9); items.sort()
def length(node): return 1 + length(node.next) if node else 0
def fail(): raise ValueError("no")
def count(): yield from range(3)
"""
    asserts = [
        "assert kinds() == (1, [2.5, None], {3}, {'a': (True,)}, b'x', 1j, math.inf) and LIMIT == 7",
        "assert same({1: [2, (3,)]}) == {1: [2, (3,)]} and same('😀é') == '😀é'",
        "numbers = [3, 1]; fill(numbers); assert numbers == [1, 3, 9]",
        "root = Node(1); root.next = Node(2); assert length(root) == 2 and root.next.value == 2",
        "try:\n    fail()\n    assert False\nexcept ValueError as error:\n    assert 'no' in str(error)",
        "assert list(count()) == [0, 1, 2] and math.isclose(same(0.1) + 0.2, 0.3)",
    ]
    assert verdict(source, {"asserts": asserts}) == ("correct", "passed 6 tests")
    assert verdict("def sum(a, b): return a + b", {"asserts": ["assert sum(1, 2) == 3"]})[0] == "correct"
    assert verdict(ADD, {"asserts": ["assert add(lambda: 1, 2) == 3"]})[0] == "unverifiable"


@isolated
def test_a_program_does_not_bring_the_yardstick():
    near = {"asserts": ["assert isclose(area(2), 12.566, rel_tol=1e-3)"]}
    assert verdict("def isclose(*a, **k): return True\ndef area(r): return 0", near)[0] == "wrong"
    assert verdict("from math import isclose, pi\ndef area(r): return pi * r * r", near)[0] == "correct"
    counted = {"asserts": ["assert Counter(letters('aab')) == Counter({'a': 2, 'b': 1})"]}
    assert verdict("def Counter(x): return 5\ndef letters(text): return []", counted)[0] == "wrong"
    assert verdict("from collections import Counter\ndef letters(text): return list(text)", counted)[0] == "correct"
    own = {"asserts": ["assert gcd(12, 18) == 6"]}
    assert verdict("def gcd(a, b): return 6 if b else a", own)[0] == "correct"
    assert verdict("def gcd(a, b): return 5", own)[0] == "wrong"


@isolated
@everywhere
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("exit", "import sys\nsys.exit(0)"),
        ("hard exit", "import os\nos._exit(0)"),
        ("exit in the function", "import os\ndef add(a, b): os._exit(0)"),
        ("exit by exception", "def add(a, b): raise SystemExit(0)"),
        ("always equal", "class Yes:\n    def __eq__(self, o): return True\ndef add(a, b): return Yes()"),
        ("equal int", "class Yes(int):\n    def __eq__(self, o): return True\ndef add(a, b): return Yes()"),
        ("equal list", "class Yes(list):\n    def __eq__(self, o): return True\ndef add(a, b): return Yes()"),
        ("patched builtins", "import builtins\nbuiltins.len = builtins.all = lambda *a: True\ndef add(a, b): return 0"),
        ("patched checker", "import programs\nprograms._same = lambda *a: True\ndef add(a, b): return 0"),
        ("patched modules", "import sys\nfor m in list(sys.modules.values()):\n"
         "    m.__dict__['_same'] = m.__dict__['check'] = lambda *a: True\ndef add(a, b): return 0"),
        ("own check", "def check(f): return True\ndef add(a, b): return 0"),
        ("traced", "import sys\nsys.settrace(lambda *a: None)\nAssertionError = KeyError\ndef add(a, b): return 0"),
        ("forged verdict", "import os, json\nfor n in range(3, 64):\n"
         "    try: os.write(n, b'[\"correct\", \"forged\"]\\n')\n    except OSError: pass\ndef add(a, b): return 0"),
        ("forged greeting", "import os, json\nh = json.dumps({'values': {'add': 3}, 'modules': {'math': 'os'}})"
         "\nfor n in range(3, 64):\n    try: os.write(n, h.encode() + b'\\n{\"value\": 3}\\n' * 9)\n"
         "    except OSError: pass"),
        ("no JSON", "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[' * 100000 + b'\\n')\n"
         "    except OSError: pass"),
        ("odd greeting", "import os\nfor n in range(3, 64):\n    try: os.write(n, b'7\\n')\n    except OSError: pass"),
    ],
)  # fmt: skip
def test_no_function_wins_that_does_not_compute(isolation, name, source):
    for tests in (CALLS, ASSERTS, CHECK):
        assert verdict(source, tests, isolation)[0] != "correct", (name, tests)


@isolated
@everywhere
def test_expected_values_cannot_be_found_from_inside(isolation):
    search = """
import gc, glob, os, sys
MARK = "s3cr" + "3t-"
def seen():
    for item in gc.get_objects():
        if type(item) in (dict, list, tuple, set):
            for value in (item.values() if type(item) is dict else item):
                if isinstance(value, (str, bytes)):
                    yield str(value)
    frame = sys._getframe()
    while frame:
        yield repr(frame.f_locals)
        frame = frame.f_back
    for path in glob.glob("/scratch/**", recursive=True) + glob.glob("/jail/**", recursive=True):
        if os.path.isfile(path):
            yield open(path).read()
def find():
    for text in seen():
        at = text.find(MARK)
        if at >= 0 and len(text) >= at + 12:  # not the mark itself
            return text[at:at + 12]
"""
    for tests in (
        {"function": "find", "calls": [{"expected": "s3cr3t-value"}]},
        {"asserts": ["assert find() == 's3cr3t-value'"]},
        {"stdin": [{"input": "", "output": "s3cr3t-value"}]},
    ):
        assert verdict(search + ("print(find())" if "stdin" in tests else ""), tests, isolation)[0] == "wrong"
    planted = search.replace("MARK = ", 'PLANTED = ["s3cr3t-value"]\nMARK = ')  # the search does find what is there
    assert verdict(planted, {"function": "find", "calls": [{"expected": "s3cr3t-value"}]}, isolation)[0] == "correct"


@isolated
def test_a_response_is_graded_by_its_last_block_that_may_be_meant():
    tests = json.dumps(ECHO)
    assert (
        grade(
            f"first\n```python\nprint(0)\n```\nthen\n```python\n{SUM}```\nOutput:\n```\n3\n```", tests, "code"
        ).verdict
        == "correct"
    )
    assert grade(f"<think>\n```python\n{SUM}```\n</think>\nno block", tests, "code").reason == "no code block"
    assert grade(f"```\n{SUM}```", tests, "code").verdict == "correct"
    text = f"```python\n{ADD}```\nUse it:\n```python\nprint(7)\n```"
    graded = grade(text, json.dumps(CALLS), "code")
    assert graded.verdict == "correct" and graded.extracted == ADD
    assert grade("```cpp\nint main(){}\n```", tests, "code").reason == "no code block"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("5", "no JSON object"),
        ("{", "not JSON"),
        ("{}", "has no tests"),
        ('{"stdin": [{"input": "1"}]}', "'output'"),
        ('{"calls": [{"args": [1], "expected": 1}]}', "no 'function'"),
        ('{"function": "f", "calls": [{"args": [1]}]}', "'expected'"),
        ('{"language": "cobol", "asserts": ["assert f()"]}', "cobol"),
        ('{"asserts": ["assert f()"], "seconds": -1}', "positive"),
        ('{"inputs": ["1", "2"], "outputs": ["1"]}', "2 'inputs' and 1 'outputs'"),
        ('{"inputs": 5, "outputs": 5}', "no list"),
        ('{"inputs": ["1"], "outputs": [["x"], 3], "stdin": 4, "fn_name": "f"}', "input"),
    ],
)
def test_tests_that_cannot_be_read_are_unverifiable_with_the_reason(answer, reason):
    graded = grade(f"```python\n{ADD}```", answer, "code")
    assert graded.verdict == "unverifiable" and reason in graded.reason


def test_outputs_are_compared_as_judges_do():
    assert (
        same_output(b"1 2\n3\n", "1 2\n3")
        and same_output(b"1.0\n", "1")
        and same_output(b"0.3333333333\n", "0.33333333334")
    )
    assert same_output(b"a  b \n\n", "a b") and same_output(b"", "\n")
    assert not same_output(b"1\n2\n", "1 2") and not same_output(b"nan", "1") and not same_output(b"Yes", "YES")
    assert not same_output(b"\xff\xfe", "ok") and not same_output(b"3.0001", "3.0")
    assert read_tests('{"inputs": ["1\\n"], "outputs": ["2\\n"]}').stdin == (("1\n", "2\n"),)


@isolated
def test_published_solutions_pass_their_tests_and_fail_others():
    path = DATA / "benchmarks"
    if not (path / "mbpp.jsonl").is_file():
        pytest.skip(f"no benchmarks in {DATA}")
    items = []
    with (path / "mbpp.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, list(file)[:12]):
            tests = row["test_list"]
            tests = ast.literal_eval(tests) if isinstance(tests, str) else tests
            items.append(
                (f"```python\n{row['code']}\n```", json.dumps({"asserts": tests, "setup": row["test_setup_code"]}))
            )
    with (path / "humaneval.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, list(file)[:12]):
            tests = {"check": row["test"], "function": row["entry_point"]}
            items.append((f"```python\n{row['prompt']}{row['canonical_solution']}\n```", json.dumps(tests)))
    graded = grade_many([(text, tests, "code") for text, tests in items])
    assert [g for g in graded if g.verdict != "correct"] == []
    shifted = [(items[n - 1][0], items[n][1], "code") for n in range(len(items))]
    assert [g for g in grade_many(shifted) if g.verdict == "correct"] == []


@isolated
def test_many_programs_at_once_from_threads():
    results: list[str] = []
    items = [(SUM, ECHO, "correct"), ("while True: pass", ECHO | {"seconds": 1}, "wrong"), (ADD, CALLS, "correct")] * 3

    def run(source: str, tests: dict, expected: str) -> None:
        results.append("ok" if verdict(source, tests)[0] == expected else "no")

    threads = [threading.Thread(target=run, args=item) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == ["ok"] * len(items)
