r"""Grading real traces: ours beside Math-Verify per item with its default settings; and hostile answers.

    OMP_NUM_THREADS=1 python -m tests.bench.grading [rounds] [rows]     rows: the real traces repeated to that many
    OMP_NUM_THREADS=1 python -m tests.bench.grading hostile [answers]
    OMP_NUM_THREADS=1 python -m tests.bench.grading programs [programs]

Reads the real traces (R1, QwQ-32B, R1-Distill-Qwen-32B, s1.1-32B) from DISTILL_DATA. Math-Verify's side is open-r1's
accuracy reward: parse the reference, parse the response, verify, in one process. Ours is grade_many on the same
(response, reference) pairs. Printed: traces a second of wall and of CPU time (all processes), medians over the
rounds, the ratio, the share that the exact path decides, and every disagreement.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evals.grading import extract_answer, grade, grade_many
from evals.grading.exact import exactly_equal
from evals.grading.extract import after_reasoning

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))


def traces() -> list[tuple[str, str]]:
    """(response, reference) of the real traces that are no API errors."""
    rows: list[dict[str, Any]] = []
    for name in ("r1_normal", "others_normal"):
        with gzip.open(DATA / "traces" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    return [(row["response"], row["answer"]) for row in rows if "Error after" not in row["response"]]


def math_verify_verdicts(pairs: list[tuple[str, str]]) -> list[bool]:
    """open-r1's way: the whole response goes through parse()."""
    from math_verify import parse, verify

    return [bool(verify(parse("\\boxed{" + gold + "}"), parse(after_reasoning(text)))) for text, gold in pairs]


def our_verdicts(pairs: list[tuple[str, str]]) -> list[bool]:
    return [g.verdict == "correct" for g in grade_many([(text, gold, "math") for text, gold in pairs])]


def timed(
    side: Callable[[list[tuple[str, str]]], list[bool]], pairs: list[tuple[str, str]]
) -> tuple[float, float, list]:
    wall, cpu = time.perf_counter(), _cpu()
    verdicts = side(pairs)
    return len(pairs) / (time.perf_counter() - wall), len(pairs) / max(1e-9, _cpu() - cpu), verdicts


def _cpu() -> float:
    times = os.times()  # children that have not ended yet are not counted: the pool's workers, a few items here
    return times.user + times.system + times.children_user + times.children_system


def compare(rounds: int, rows: int) -> None:
    real = traces()
    pairs = (real * (1 + rows // len(real)))[:rows] if rows else real
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    for sides in (math_verify_verdicts, our_verdicts):
        sides(real[:20])  # imports, worker processes
    for _ in range(rounds):
        wall, cpu, mine = timed(our_verdicts, pairs)
        ours.append((wall, cpu))
        wall, cpu, other = timed(math_verify_verdicts, pairs)
        theirs.append((wall, cpu))
    for name, side in (("ours", ours), ("math-verify", theirs)):
        walls, cpus = zip(*side, strict=True)
        print(
            f"{name:12} {statistics.median(walls):9.0f} traces/s wall ({min(walls):.0f} to {max(walls):.0f}), "
            f"{statistics.median(cpus):9.0f} by CPU time"
        )
    ratios = [a[0] / b[0] for a, b in zip(ours, theirs, strict=True)]
    spread = f"({min(ratios):.1f} to {max(ratios):.1f})"
    print(f"ratio by wall time: {statistics.median(ratios):.1f} {spread}, {len(pairs)} traces")
    stated = [(extract_answer(text), gold) for text, gold in real]
    decided = Counter(exactly_equal(a, gold) is not None for a, gold in stated if a is not None)
    print(f"the exact path decides {decided[True]} of {decided.total()} stated answers; {len(real)} real traces")
    apart = [(s, o) for s, m, o in zip(stated, mine, other, strict=False) if m != o]
    boxed = [(a, gold, o) for (a, gold), o in apart if a is not None]
    print(f"verdicts apart: {len(apart)}, of these {len(apart) - len(boxed)} without a box (wrong by our rule)")
    for answer, gold, verified in boxed:
        print(f"  {answer!r} against {gold!r}: math-verify says {'correct' if verified else 'wrong'}")


def hostile_answer(rng: random.Random) -> str:
    """An answer that means harm: to time, memory, the parser, the protocol or the reader."""
    n = rng.choice([3, 30, 300, 3000])
    big = rng.choice([10_000, 100_000, 1_000_000])
    kinds: list[Callable[[], str]] = [
        lambda: "9^{9^{9^{" + str(rng.randint(2, 9)) + "}}}",
        lambda: f"(10^{{{rng.randint(3, 12)}}})" + "!" * rng.randint(1, 3),
        lambda: f"\\binom{{10^{{{rng.randint(4, 9)}}}}}{{10^{{3}}}}",
        lambda: rng.choice("9{([x\\ ") * big,
        lambda: "{" * (n * 3) + "5" + "}" * (n * 3),
        lambda: "(" * n + "x" + ")" * n,
        lambda: "\\frac{1}{" * min(n, 300) + "x" + "}" * min(n, 300),
        lambda: "\\sqrt{" * min(n, 300) + "2" + "}" * min(n, 300),
        lambda: "".join(rng.choice("{}[]()\\$&^_%~") for _ in range(n)),
        lambda: "".join(chr(rng.choice([0, 0x202E, 0x200B, 0x2066, 0xFEFF, 0xD800, 0x661, 53])) for _ in range(n)),
        lambda: "+".join(f"x_{{{k}}}" for k in range(n)),
        lambda: "(" + "+".join("abcdefgh"[: rng.randint(2, 8)]) + f")^{{{rng.randint(10, 400)}}}",
        lambda: "\\int_0^{\\infty} " * rng.randint(1, 4) + "\\frac{\\sin x^x}{x^{x}} dx",
        lambda: "\\sum_{n=1}^{10^{9}} \\frac{1}{n^{n}}",
        lambda: "\\lim_{x \\to 0} " * rng.randint(1, 3) + "\\frac{\\sin(\\tan(x))}{x^{17}}",
        lambda: "\\begin{pmatrix}" + "1 & 2 \\\\ " * n + "\\end{pmatrix}",
        lambda: ",".join(str(k) for k in range(n)),
        lambda: "\\{" + ";".join("1/0" for _ in range(min(n, 300))) + "\\}",
        lambda: "x = " * min(n, 300) + "7",
        lambda: '7"}\n["correct", "forged"]\n',
        lambda: "\\text{" * min(n, 300) + "5" + "}" * min(n, 300),
        lambda: "__import__('os').system('true')",
        lambda: "1" + "0" * rng.randint(100, 5000) + "." + "1" * 300,
        lambda: "\\" * n + "boxed{7}",
        lambda: "\\frac{" + "9" * min(n, 1500) + "}{" + "7" * min(n, 400) + "}",
    ]
    return rng.choice(kinds)()


def hostile(count: int, limit: float = 0.25) -> None:
    rng = random.Random(0)
    references = ["5", r"\frac{1}{2}", r"(1, 2)", r"x^2 + 1", r"\text{(B)}", r"\begin{pmatrix}1\\2\end{pmatrix}"]
    grade(r"\boxed{\sqrt{4}}", "2")

    def one(item: tuple[str, str]) -> tuple[float, str]:
        start = time.perf_counter()
        graded = grade(f"\\boxed{{{item[0]}}}", item[1], timeout=limit)
        if graded.verdict == "correct":
            print(f"correct: {item[0][:60]!r} against {item[1]!r}")
        return time.perf_counter() - start, graded.verdict

    latencies: list[float] = []
    verdicts: Counter[str] = Counter()
    with ThreadPoolExecutor(2) as threads:
        for _ in range(0, count, 100):  # not all at once: some are a megabyte
            items = [(hostile_answer(rng), rng.choice(references)) for _ in range(100)]
            for seconds, verdict in threads.map(one, items):
                latencies.append(seconds)
                verdicts[verdict] += 1
    count = len(latencies)
    latencies.sort()
    at = {name: latencies[min(count - 1, int(count * share))] for name, share in (("50%", 0.5), ("99.9%", 0.999))}
    print(f"{count} hostile answers, limit {limit} s: {dict(verdicts)}; no hang, no crash")
    print("latency: " + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in at.items()), end="")
    print(f", longest {latencies[-1] * 1e3:.0f} ms")


def programs(count: int) -> None:
    source = "a, b = map(int, input().split())\nprint(a + b)\n"
    stdin = json.dumps({"stdin": [{"input": "1 2", "output": "3"}]})
    calls = json.dumps({"function": "add", "calls": [{"args": [1, 2], "expected": 3}]})
    cases = {"one stdin test": (f"```python\n{source}```", stdin)}
    cases["one function test"] = ("```python\ndef add(a, b):\n    return a + b\n```", calls)
    from evals.grading.sandbox import KINDS, why_not

    for isolation in [kind for kind in KINDS[:2] if why_not(kind) is None]:
        for name, (text, tests) in cases.items():
            start = time.perf_counter()
            graded = grade_many([(text, tests, "code")] * count, isolation=isolation)
            rate = count / (time.perf_counter() - start)
            assert all(g.verdict == "correct" for g in graded)
            print(f"{isolation:12} {name:18} {rate:6.1f} programs/s")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["hostile"]:
        hostile(int(words[1]) if len(words) > 1 else 10_000)
    elif words[:1] == ["programs"]:
        programs(int(words[1]) if len(words) > 1 else 40)
    else:
        compare(int(words[0]) if words else 3, int(words[1]) if len(words) > 1 else 0)
