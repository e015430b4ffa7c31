"""The filter stage on real R1 traces, near-duplicates of up to a million problems, and what one could use instead.

    OMP_NUM_THREADS=1 python -m tests.bench.filters [stage] [grading] [problems] [--traces 20000] [--problems 100000]

`stage`: every filter but code and judge, on 2 processes, from a run folder to ledger and dataset; a trace longer than
those at hand is made of several (`--chars`). `grading`: our correctness filter and open-r1's way (math-verify a trace
in datasets.map, its default settings), the same traces. `problems`: near-duplicates among problems, ours, datasketch's
MinHashLSH and rensa's deduplicator, each in a process of its own for its memory.

Real traces (DISTILL_DATA, default ../shared/data) are repeated with their paragraphs in another order and a number in
problem and response, so that no two are the same text. Printed: traces or problems a second of wall time and of CPU
time (all processes; the fairer one on a busy machine), and the peak memory of parent and workers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
THRESHOLD, NGRAM = 0.9, 3


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def varied(count: int, chars: int) -> Iterator[tuple[str, str, str, str]]:
    """(problem, answer, reasoning, response) of `count` traces of at least `chars` characters, none like another."""
    real = [row for row in rows("traces/r1_normal.jsonl.gz") if "</think>" in row["response"]]
    pick = random.Random(0)
    for number in range(count):
        row = real[number % len(real)]
        reasoning, _, response = row["response"].partition("</think>")
        paragraphs = reasoning.split("\n\n")
        while len(reasoning) < chars:
            more = real[pick.randrange(len(real))]["response"].partition("</think>")[0]
            paragraphs += more.split("\n\n")
            reasoning += more
        if number >= len(real):
            pick.shuffle(paragraphs)
        case = f"(Case {number}.)"
        yield f"{row['prompt']} {case}", row["answer"], "\n\n".join(paragraphs), f"{case} {response.strip()}"


def write_run(folder: Path, count: int, chars: int) -> int:
    """problems.jsonl and traces.jsonl; returns the bytes of reasoning."""
    size = 0
    (folder / "traces").mkdir(parents=True)
    with open(folder / "problems.jsonl", "w") as problems, open(folder / "traces" / "traces.jsonl", "w") as traces:
        for number, (problem, answer, reasoning, response) in enumerate(varied(count, chars)):
            identity = f"p{number}"
            asked = {"id": identity, "problem": problem, "answer": answer, "kind": "math", "source": "", "meta": {}}
            tokens = len(reasoning) // 4
            trace = {
                "id": f"t{number}", "problem_id": identity, "sample": 0,
                "messages": [{"role": "user", "content": problem}], "reasoning": reasoning, "response": response,
                "finish_reason": "stop", "prompt_tokens": 1, "reasoning_tokens": tokens, "answer_tokens": 10,
                "seconds": 0.0, "cost": 0.0, "teacher": "r1", "sampling": {},
                "text": f"{reasoning}\n</think>\n\n{response}",
            }  # fmt: skip
            problems.write(json.dumps(asked) + "\n")
            traces.write(json.dumps(trace, ensure_ascii=False) + "\n")
            size += len(reasoning)
    return size


def recipe(**filters: Any) -> Any:
    from distill.recipe import Recipe

    return Recipe.model_validate(
        {
            "name": "bench",
            "problems": {"source": "none.jsonl"},
            "teacher": {"model": "none"},
            "sampling": {"samples": 1},
            "filters": filters,
            "students": [{"name": "s", "base": "tiny-qwen"}],
            "evals": {"tasks": ["other"]},
        }
    )


class Clock:
    """Wall and CPU seconds of the block, children that ended in it included."""

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), self._used()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, self._used() - self._cpu

    @staticmethod
    def _used() -> float:
        found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in found)

    def says(self, count: int, unit: str) -> str:
        return f"{count / self.wall:,.0f} {unit}/s of wall time, {count / self.cpu:,.0f} per CPU second"


def peaks() -> str:
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return f"peak memory {own:,.0f} MiB, largest worker {children:,.0f} MiB"


def stage(count: int, chars: int, only: list[str]) -> None:
    from distill import filtering
    from distill.runfolder import RunFolder

    against = [{"source": str(DATA / "benchmarks" / name)} for name in ("math500.jsonl", "aime24.jsonl", "amc23.jsonl")]
    filters: dict[str, Any] = {name: {} for name in ALL} | {"decontamination": {"against": against}}
    if only:
        filters = {name: settings for name, settings in filters.items() if name in only}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        size = write_run(path, count, chars)
        chosen = recipe(**filters)
        for title in ("judged", "replayed, nothing changed", "replayed, one threshold changed"):
            if title.endswith("changed") and "nothing" not in title and "repetition" in filters:
                chosen = recipe(**{**filters, "repetition": {"max_share": 0.25}})
            with RunFolder.open(path, chosen) as run, Clock() as clock:
                facts = filtering.run(chosen, run, workers=2)
            mean = size / count / 1000
            what = f"{count} traces of {mean:.1f} kB, {len(filters) + 1} filters, {title}"
            done = f"{facts['judged']} verdicts, {facts['accepted']} accepted"
            print(f"stage, {what}: {clock.says(count, 'traces')}; {done}", flush=True)
        print(f"stage: {peaks()}")
        print(
            "\n".join(
                f"  {row['filter']:<24} {row['in']:>7} -> {row['out']:>7}"
                for row in json.loads((path / "funnel.json").read_text())
            )
        )


ALL = (
    "format", "correctness", "length", "repetition", "language", "readability", "reflection", "agreement", "outliers",
    "near_duplicate_problems", "duplicates", "near_duplicates",
)  # fmt: skip


def grading(count: int) -> None:
    """Ours and math-verify in datasets.map, on traces with answers as models wrote them."""
    import datasets

    from distill.filters import correctness
    from distill.recipe import CorrectnessFilter

    datasets.disable_progress_bars()
    given = list(varied(count, 0))
    problems: dict[str, Any] = {
        str(n): {"id": str(n), "problem": p, "answer": a, "kind": "math"} for n, (p, a, _, _) in enumerate(given)
    }
    traces: list[Any] = [
        {"id": str(n), "problem_id": str(n), "response": r, "finish_reason": "stop"} for n, (*_, r) in enumerate(given)
    ]
    correctness.check(traces[:8], problems, CorrectnessFilter())  # workers start
    with Clock() as ours:
        passed = sum(v.passed for v in correctness.check(traces, problems, CorrectnessFilter()))
    print(f"grading, ours: {count / ours.wall:,.0f} traces/s of wall time; {passed} correct", flush=True)
    data = datasets.Dataset.from_dict(
        {"r": [t["response"] for t in traces], "a": [problems[t["id"]]["answer"] for t in traces]}
    )
    with Clock() as theirs:
        done = data.map(_math_verify, num_proc=2, load_from_cache_file=False)
    print(f"grading, math-verify in map: {count / theirs.wall:,.0f} traces/s of wall time; {sum(done['ok'])} correct")
    print(f"grading: {theirs.wall / ours.wall:.1f} times as fast by wall time")


def _math_verify(row: dict[str, Any]) -> dict[str, Any]:
    from math_verify import parse, verify

    return {"ok": bool(verify(parse(f"${row['a']}$"), parse(row["r"])))}


def near_problems(count: int) -> None:
    """Each side in a fresh process."""
    for side in ("ours", "rensa", "datasketch"):
        command = [sys.executable, "-m", "tests.bench.filters", "--side", side, "--problems", str(count)]
        subprocess.run(command, check=True)


def problem_texts(count: int) -> Iterator[str]:
    """Real problems, then the same with words exchanged: a tenth of them nearly the same, the others not."""
    real = [
        r["problem"] for name in ("gsm8k_train", "math_train_problems") for r in rows(f"benchmarks/{name}.jsonl.gz")
    ]
    words = sorted({word for text in real for word in text.split()})
    pick = random.Random(1)
    for number in range(count):
        text = real[number % len(real)]
        if number >= len(real):
            parts = text.split()
            changes = 1 if pick.random() < 0.1 else max(3, len(parts) // 2)
            for place in pick.choices(range(len(parts)), k=changes):
                parts[place] = pick.choice(words)
            text = " ".join(parts)
        yield text


def one_side(side: str, count: int) -> None:
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with Clock() as clock:
        kept = {"ours": _ours, "rensa": _rensa, "datasketch": _datasketch}[side](problem_texts(count), count)
    with Clock() as reading:
        for _ in problem_texts(count):
            pass
    clock.wall, clock.cpu = clock.wall - reading.wall, clock.cpu - reading.cpu
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base
    print(f"problems, {side}: {count} in {clock.wall:.1f} s ({clock.says(count, 'problems')}); {kept} kept; "
          f"{grown:,.0f} MiB", flush=True)  # fmt: skip


def _ours(texts: Iterator[str], count: int) -> int:
    from itertools import islice

    import numpy as np

    from distill.filters import minhash
    from distill.filters.words import cut_words

    with tempfile.TemporaryFile() as file:
        payload = np.memmap(file, dtype=np.uint8, mode="w+", shape=(count, minhash.WIDTH))
    row = 0
    while part := list(islice(texts, 512)):
        payload[row : row + len(part)] = minhash.sketches(cut_words(part), NGRAM)
        row += len(part)
    kept = minhash.first_of_each(payload, np.arange(count), THRESHOLD)
    return int((kept == np.arange(count)).sum())


def _shingles(text: str) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))]


def _rensa(texts: Iterator[str], count: int) -> int:
    from rensa import RMinHashDeduplicator

    dedup = RMinHashDeduplicator(threshold=THRESHOLD, num_perm=128, use_lsh=True)
    return sum(dedup.add_pairs((str(number), _shingles(text)) for number, text in enumerate(texts)))


def _datasketch(texts: Iterator[str], count: int) -> int:
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        print("problems, datasketch: not installed")
        return 0
    index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    kept = 0
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in _shingles(text)])
        if not index.query(sketch):
            index.insert(number, sketch)
            kept += 1
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Side by side; see the module's text.")
    parser.add_argument("parts", nargs="*", help="stage, grading, problems; all if none is named")
    parser.add_argument("--traces", type=int, default=20000)
    parser.add_argument("--chars", type=int, default=0, help="least length of a reasoning in `stage`")
    parser.add_argument("--only", nargs="*", default=[], help="filters of `stage`; all if none is named")
    parser.add_argument("--problems", type=int, default=100000)
    parser.add_argument("--graded", type=int, default=4000)
    parser.add_argument("--side")
    chosen = parser.parse_args()
    if chosen.side:
        return one_side(chosen.side, chosen.problems)
    parts = chosen.parts or ["stage", "grading", "problems"]
    if "stage" in parts:
        stage(chosen.traces, chosen.chars, chosen.only)
    if "grading" in parts:
        grading(chosen.graded)
    if "problems" in parts:
        near_problems(chosen.problems)


if __name__ == "__main__":
    main()
