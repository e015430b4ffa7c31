"""Side by side: lm-eval's HFLM and our distill-teacher on the same requests, with tiny-r1 in float32.

    OMP_NUM_THREADS=1 python -m tests.bench.lm_eval_models [rounds]

`choice`: 64 questions with 4 answers of several tokens; `letter`: with 4 answers of one token, which HFLM computes
once, too; `rolling`: 64 documents; `generate`: 64 greedy answers of at most 64 tokens with a stop string. HFLM runs
batches of 16 and of 64, the faster of which counts; one torch thread. Printed: seconds of wall and of the process's CPU
time, medians over the rounds, the ratio, and how many results differ: one, by a tie between groups of experts to the
last bit (see teacher/scoring.py).
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

QUESTIONS = 64


def workloads() -> dict[str, tuple[str, list[Any]]]:
    """Name -> method, and its requests; questions of about 150 tokens."""
    from lm_eval.api.instance import Instance

    def questions(number: int) -> str:
        return "".join(f"Question: what is {n} times {number}?\nAnswer: {n * number}\n\n" for n in range(2, 8))

    def instances(kind: str, arguments: list[Any]) -> list[Any]:
        return [Instance(kind, {}, args, 0, metadata=("task", n, 1)) for n, args in enumerate(arguments)]

    asked = [questions(number) + "Question: which one?\nAnswer:" for number in range(100, 100 + QUESTIONS)]
    long = [f" {n} because of {n}, as was said" for n in (12, 345, 6789, 10)]
    return {
        "choice": ("loglikelihood", instances("loglikelihood", [(text, answer) for text in asked for answer in long])),
        "letter": ("loglikelihood", instances("loglikelihood", [(text, x) for text in asked for x in "ABCD"])),
        "rolling": ("loglikelihood_rolling", instances("loglikelihood_rolling", [(text,) for text in asked])),
        "generate": (
            "generate_until",
            instances("generate_until", [(text, {"until": ["\n\n"], "max_gen_toks": 64}) for text in asked]),
        ),
    }


def timed(model: Any, method: str, requests: list[Any]) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = getattr(model, method)(requests, disable_tqdm=True)
    return time.perf_counter() - wall, time.process_time() - cpu, result


def differing(found: list[Any], wanted: list[Any]) -> int:
    """How many results differ: texts at all, log-probabilities by more than 1e-3."""

    def differ(a: Any, b: Any) -> bool:
        if isinstance(a, str):
            return a != b
        return abs((a[0] if isinstance(a, tuple) else a) - (b[0] if isinstance(b, tuple) else b)) > 1e-3

    return sum(differ(a, b) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    import torch
    from lm_eval.models.huggingface import HFLM

    from distill.lm_eval_teacher import TeacherLM
    from distill.shipped import resolve_model

    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    folder = str(resolve_model("tiny-r1"))
    models = {
        "HFLM 16": HFLM(folder, dtype="float32", device="cpu", batch_size=16),
        "HFLM 64": HFLM(folder, dtype="float32", device="cpu", batch_size=64),
        "ours": TeacherLM(folder, dtype="float32", device="cpu"),
    }
    for name, (method, requests) in workloads().items():
        seconds: dict[str, list[tuple[float, float]]] = {model: [] for model in models}
        results = {}
        for _ in range(rounds):
            for model, lm in models.items():
                wall, cpu, results[model] = timed(lm, method, requests)
                seconds[model].append((wall, cpu))
        parts = []
        for unit, index in (("wall", 0), ("CPU", 1)):
            median = {model: statistics.median(pair[index] for pair in pairs) for model, pairs in seconds.items()}
            theirs = min(median["HFLM 16"], median["HFLM 64"])
            parts.append(f"{unit} s  HFLM {theirs:6.2f}  ours {median['ours']:6.2f}  x{theirs / median['ours']:5.1f}")
        different = differing(results["ours"], results["HFLM 64"])
        print(f"{name:9} {len(requests):4} requests  {'   '.join(parts)}   {different} differ", flush=True)


if __name__ == "__main__":
    main()
