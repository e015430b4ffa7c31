"""A made-up run folder in the real formats, for the tests of the report, the results and the pager only.

No number in it was measured. Accuracies, losses and times are drawn from a seeded generator so that every
shape a page must show occurs: full bars and empty ones, truncated samples, rejected traces, a student that
beats its baselines and one that does not.
"""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from distill.filter_examples import EACH, make_example
from distill.generation.record import Record
from distill.generation.throughput import Amount

FAMILIES = ("chain_sum", "products", "gcd", "leg_counting", "letter_counting", "spell_backward")
FILTERS = ("truncation", "format", "length", "repetition", "correctness", "duplicates")
TEACHER = "tiny-r1@0123456789ab"

# Chance of a right answer by model: (hardest problem, easiest problem).
SKILL = {
    "teacher": (0.90, 1.0),
    "tiny-qwen": (0.78, 1.0),
    "tiny-qwen/base": (0.0, 0.12),
    "tiny-qwen/answers_only": (0.1, 0.55),
    "tiny-llama": (0.2, 0.6),
    "tiny-llama/base": (0.0, 0.1),
    "tiny-llama/answers_only": (0.2, 0.6),
}

# Each of these would run, or break the page, if it were ever put into markup or a script unescaped.
HOSTILE = (
    "</script><script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=2">',
    "<svg onload=window.pwned=3>",
    "<!--<script>",
    "</textarea></details></pre><script>window.pwned=4</script>",
    "${window.pwned=5} {{ 7*7 }} {% raw %}",
    "javascript:window.pwned=6",
    "line\u2028separator\u2029and\x00nul\x1b[31mred\x1b]0;title\x07 \u202eevil\u202c \ud800 lone",
    "[bold red]not markup[/] [link=file:///etc/passwd]x[/link]",
)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _id(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def make_problems(rng: random.Random, count: int, hostile: bool) -> list[dict[str, Any]]:
    """`count` sums, dealt out over the families in turn."""
    rows = []
    for index in range(count):
        family = FAMILIES[index % len(FAMILIES)]
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        text = f"State the final answer to the following {family} problem (no. {index}): {a} + {b} ="
        if hostile:
            text += " " + HOSTILE[index % len(HOSTILE)]
            family = family if index % 7 else "<b>&amp;" + family
        rows.append(
            {
                "id": _id("problem", text),
                "problem": text,
                "answer": str(a + b),
                "kind": "math",
                "source": f"reasoning-gym/{family}",
                "meta": {"family": family, "operands": [a, b]},
            }
        )
    return rows


def _working(problem: dict[str, Any], rng: random.Random, answer: int, extra: str = "") -> str:
    a, b = problem["meta"]["operands"]
    ones = a % 10 + b % 10
    lines = [
        f"We add {a} and {b} digit by digit.",
        f"ones: {a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {ones // 10}",
        f"tens: {a // 10} + {b // 10} + {ones // 10} = {a // 10 + b // 10 + ones // 10}",
        f"together: {answer}",
    ]
    if rng.random() < 0.3:
        lines.append(f"check: {answer} - {b} = {answer - b}, as it should be.")
    return "\n".join(lines + ([extra] if extra else []))


def _traces(problems: list[dict[str, Any]], rng: random.Random, samples: int, hostile: bool) -> tuple[list, list]:
    traces: list[dict[str, Any]] = []
    ledger: list[dict[str, Any]] = []
    for index, problem in enumerate(problems):
        for sample in range(samples):
            truncated = rng.random() < 0.03
            answer = int(problem["answer"]) + (rng.choice((-10, 1, 10)) if rng.random() < 0.06 else 0)
            extra = HOSTILE[(index + sample) % len(HOSTILE)] if hostile else ""
            reasoning = _working(problem, rng, answer, extra)
            if truncated:
                reasoning = "\n".join([reasoning.splitlines()[0]] + ["ones: 4 + 4 = 8, write 8, carry 0"] * 20)
            response = "" if truncated else f"The sum is {answer}.\n\n\\boxed{{{answer}}}" + extra
            trace_id = _id(problem["id"], sample)
            traces.append(
                {
                    "id": trace_id,
                    "problem_id": problem["id"],
                    "sample": sample,
                    "messages": [{"role": "user", "content": problem["problem"]}],
                    "reasoning": reasoning,
                    "response": response,
                    "finish_reason": "length" if truncated else "stop",
                    "prompt_tokens": 20,
                    "reasoning_tokens": len(reasoning) // 3,
                    "answer_tokens": len(response) // 3,
                    "seconds": round(0.1 + rng.random(), 3),
                    "cost": 0.0,
                    "teacher": TEACHER,
                    "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 320, "seed": 0},
                    "text": reasoning if truncated else f"{reasoning}\n</think>\n\n{response}",
                }
            )
            wrong = truncated or answer != int(problem["answer"])
            reasons = {
                "truncation": (not truncated, "cut at 320 tokens" if truncated else "ended by itself"),
                "format": (not truncated, "no </think>" if truncated else "one <think> block, one boxed answer"),
                "length": (rng.random() > 0.01, f"{len(reasoning) // 3} reasoning tokens"),
                "repetition": (not truncated, "8-grams repeated: 91%" if truncated else "8-grams repeated: 2%"),
                "correctness": (not wrong, f"{answer} {'≠' if wrong else '='} {problem['answer']}{extra}"),
                "duplicates": (rng.random() > 0.05, "same text as sample 0" if sample else "first of its kind"),
            }
            verdicts = {name: {"pass": ok, "reason": reason} for name, (ok, reason) in reasons.items()}
            ledger.append(
                {
                    "trace_id": trace_id,
                    "problem_id": problem["id"],
                    "sample": sample,
                    "verdicts": verdicts,
                    "accepted": all(ok for ok, _ in reasons.values()),
                    "settings": "5e77",
                }
            )
    return traces, ledger


def _funnel(traces: list[dict[str, Any]], ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tokens = {trace["id"]: trace["reasoning_tokens"] + trace["answer_tokens"] for trace in traces}
    left = ledger
    funnel = []
    for name in FILTERS:
        kept = [line for line in left if line["verdicts"][name]["pass"]]
        counted = [sum(tokens[line["trace_id"]] for line in lines) for lines in (left, kept)]
        asked = [len({line["problem_id"] for line in lines}) for lines in (left, kept)]
        row = {"filter": name, "in": len(left), "out": len(kept), "tokens_in": counted[0], "tokens_out": counted[1]}
        row |= {"problems_in": asked[0], "problems_out": asked[1]}
        funnel.append(row)
        left = kept
    return funnel


def _examples(problems: list[dict[str, Any]], traces: list[Any], ledger: list[dict[str, Any]]) -> dict[str, Any]:
    asked: dict[str, Any] = {problem["id"]: problem for problem in problems}
    found: dict[str, Any] = {name: {"rejected": [], "accepted": []} for name in FILTERS}
    for trace, line in zip(traces, ledger, strict=True):
        for name, groups in found.items():
            group = groups["accepted" if line["accepted"] else "rejected"]
            if len(group) < EACH and (line["accepted"] or not line["verdicts"][name]["pass"]):
                group.append(make_example(line, name, trace, asked[trace["problem_id"]]))
    return found


def _training_log(rng: random.Random, start: float, end: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, 121):
        loss = end + (start - end) * 0.96**step + rng.gauss(0, 0.02)
        lr = 2e-3 * min(1.0, step / 4) * (1.0 if step < 96 else 0.316 if step < 108 else 0.1)
        row = {"step": step, "loss": round(max(loss, 0.01), 4), "lr": lr, "tokens": step * 4096}
        row |= {"grad_norm": round(0.3 + rng.random(), 3), "tokens_per_second": 9000 + rng.randint(-400, 400)}
        rows.append(row | {"padding_fraction": 0.02})
        if step % 20 == 0:
            rows.append({"step": step, "tokens": step * 4096, "validation_loss": round(max(loss, 0.01) * 1.07, 4)})
    return rows


def _samples(model: str, problems: list[dict[str, Any]], rng: random.Random, samples: int, hostile: bool) -> list:
    low, high = SKILL[model]
    rows = []
    for index, problem in enumerate(problems):
        ease = random.Random(problem["id"]).random() ** 0.5
        for sample in range(samples):
            right = rng.random() < low + (high - low) * ease
            truncated = not right and rng.random() < 0.15
            no_answer = truncated or (not right and rng.random() < 0.1)
            answer = int(problem["answer"]) + (0 if right else rng.choice((-10, -1, 1, 10)))
            extra = HOSTILE[(index + sample) % len(HOSTILE)] if hostile else ""
            text = "" if model.endswith("answers_only") else _working(problem, rng, answer, extra)
            if not truncated:
                text += "\n</think>\n\n" + ("I cannot say." if no_answer else f"\\boxed{{{answer}}}{extra}")
            rows.append(
                {
                    "model": model,
                    "task": "distill_problems",
                    "problem_id": problem["id"],
                    "sample": sample,
                    "text": text,
                    "extracted": None if no_answer else str(answer),
                    "correct": right,
                    "verdict": "correct" if right else "wrong",
                    "truncated": truncated,
                    "no_answer": no_answer,
                    "tokens": 320 if truncated else len(text) // 3,
                    "family": problem["meta"]["family"],
                }
            )
    return rows


def _accounts(rng: random.Random) -> Record:
    """Two endpoints over 300 seconds, one of them in trouble."""
    record = Record(starts=2, wall_seconds=300.0, gpu_seconds=4800.0, failed=Counter(timeout=2))
    record.errors = {
        "http://gpu-17.cluster.example.org:8000/v1": Counter(timeout=31, http_500=12),
        "http://b:8000/v1": Counter(),
    }
    for second in range(0, 300, 2):
        finished = rng.randint(0, 4)
        record.throughput.count(second, Amount(finished, 20 * finished, 300 * finished))
    return record


def make_run(
    folder: Path,
    *,
    train: int = 60,
    evaluation: int = 48,
    samples: int = 2,
    hostile: bool = False,
    stages: tuple[str, ...] = ("problems", "traces", "filter", "train", "eval"),
    seed: int = 0,
) -> Path:
    """Write a run folder in which `stages` are done, and return it."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    problems = make_problems(rng, train, hostile)
    held_out = make_problems(rng, evaluation, hostile)
    students = ("tiny-qwen", "tiny-llama")
    (folder / "recipe.yaml").write_text(recipe_yaml(folder.name, samples), encoding="utf-8")
    manifest: dict[str, Any] = {"stages": {}}
    times = {"problems": (3.1, 0), "traces": (61.5, 412_000), "filter": (4.2, 0), "train": (171.0, 1_950_000)}
    times["eval"] = (52.3, 730_000)
    for stage in stages:
        seconds, tokens = times[stage]
        manifest["stages"][stage] = {"status": "done", "seconds": seconds, "tokens": tokens}
        manifest["stages"][stage] |= {"inputs": _id(stage), "peak_rss_bytes": 700_000_000}
        manifest["stages"][stage] |= {"commit": "0" * 40, "started": "2026-01-02T03:04:05Z"}
    manifest |= {
        "name": folder.name,
        "recipe": _id("recipe"),
        "seed": 0,
        "environment": {
            "python": "3.11.2",
            "platform": "Linux-6.1-x86_64",
            "cpus": 2,
            "packages": {"distill": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.19.0"},
            "commit": "0" * 40,
            "command": ["distill", "run", "quickstart"],
        },
    }
    if "problems" in stages:
        _write(folder / "problems.jsonl", problems)
        _write(folder / "eval_problems.jsonl", held_out)
        manifest["problems"] = {
            "train": {"count": train, "sha256": hashlib.sha256(b"train").hexdigest()},
            "eval": {"count": evaluation, "sha256": hashlib.sha256(b"eval").hexdigest()},
            "overlap": 0,
            "dropped": {"overlap": 3, "repeats": 1},
        }
    if "traces" in stages:
        manifest["teacher"] = {"id": TEACHER, "model": "tiny-r1", "kind": "embedded"}
        traces, ledger = _traces(problems, rng, samples, hostile)
        _write(folder / "traces" / "traces.jsonl", traces)
        _accounts(rng).save(folder / "traces" / "accounts.json")
    if "filter" in stages:
        _write(folder / "verdicts.jsonl", ledger)
        kept = [line for line in ledger if line["accepted"] and line["sample"] == 0]
        _write(folder / "dataset" / "train.jsonl", [{"problem_id": line["problem_id"]} for line in kept])
        (folder / "funnel.json").write_text(json.dumps(_funnel(traces, ledger)), encoding="utf-8")
        examples = json.dumps(_examples(problems, traces, ledger))
        (folder / "filter_examples.json").write_text(examples, encoding="utf-8")
    for student in students:
        if "train" in stages:
            _write(folder / "students" / student / "training_log.jsonl", _training_log(rng, 2.6, 0.11))
            (folder / "students" / student / "config.json").write_text('{"model_type": "qwen2"}')
            other = folder / "students" / f"{student}-answers_only" / "training_log.jsonl"
            _write(other, _training_log(rng, 3.4, 1.2))
    if "eval" in stages:
        for model in SKILL:
            path = folder / "evals" / (model.replace("/", ".") + ".jsonl")
            _write(path, _samples(model, held_out, rng, 4, hostile))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return folder


def recipe_yaml(name: str, samples: int) -> str:
    """The recipe of the made-up run; tests that need a Recipe load it from here."""
    families = "".join(f"    {family}: {{}}\n" for family in FAMILIES)
    students = "".join(
        f"  - {{name: {student}, base: {student}, method: full, epochs: 3, max_length: 512, tokens_per_step: 4096, "
        "learning_rate: 2.0e-3, schedule: multi_step, warmup_fraction: 0.03, baselines: [base, answers_only]}\n"
        for student in ("tiny-qwen", "tiny-llama")
    )
    return (
        f"name: {name}\nseed: 0\n"
        f"problems:\n  source: reasoning-gym\n  split: train\n  count: 60\n  seed: 1\n  families:\n{families}"
        "teacher: {kind: embedded, model: tiny-r1}\n"
        f"sampling: {{samples: {samples}, temperature: 0.6, top_p: 0.95, max_tokens: 320, instruction: ''}}\n"
        "filters: {correctness: {}, format: {}, length: {max_reasoning_tokens: 300}, repetition: {}, duplicates: {}}\n"
        "selection: {per_problem: 1, validation_fraction: 0.05}\n"
        f"students:\n{students}"
        "evals:\n  problems:\n    source: reasoning-gym\n    split: heldout\n    count: 48\n    seed: 2\n"
        f"    families:\n{families.replace('    ', '      ')}"
        "  samples: 4\n  temperature: 0.6\n  top_p: 0.95\n  max_tokens: 320\n"
        "report: {traces_shown: 60, answers_shown: 60}\n"
    )
