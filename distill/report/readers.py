"""What the page's two readers hold: some traces with their verdicts, some problems with every model's answer.

A run may have a million traces of 30,000 tokens; the page shows a stated number of them, chosen by hash (so
that nobody picked them) and evenly over families, each text cut in its middle when it is long.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from distill.jsonl import read_jsonl
from distill.records import Problem
from distill.reference import shown_reference
from distill.visible import visible

Row = dict[str, Any]
Item = TypeVar("Item")

# All texts of one reader together stay near this many characters; a single text is never cut below the second.
READER_CHARACTERS = 4_000_000
SHORTEST_CUT, LONGEST_CUT = 1_000, 20_000


def cut(text: str, most: int) -> str:
    """`text` made visible, or its beginning and end with a note between: the end holds the answer."""
    if len(text) <= most:
        return visible(text)
    head, tail = most * 3 // 5, most * 2 // 5
    note = f"\n[… {len(text) - head - tail:,} characters left out here …]\n"
    return visible(text[:head]) + note + visible(text[len(text) - tail :])


def limit(texts: int) -> int:
    """Characters each of `texts` texts may have."""
    return max(SHORTEST_CUT, min(LONGEST_CUT, READER_CHARACTERS // max(texts, 1)))


def spread(items: Iterable[Item], group: Callable[[Item], str], order: Callable[[Item], str], most: int) -> list[Item]:
    """`most` items, the groups taking turns, within a group in the order of `order` (a hash: no one's choice)."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[group(item)].append(item)
    queues = [sorted(groups[name], key=order) for name in sorted(groups)]
    chosen: list[Item] = []
    rank = 0
    while len(chosen) < most and any(rank < len(queue) for queue in queues):
        chosen += [queue[rank] for queue in queues if rank < len(queue)]
        rank += 1
    return chosen[:most]


def family(problem: Row | None) -> str:
    return str((problem or {}).get("meta", {}).get("family") or (problem or {}).get("source") or "unknown")


def _answer(problem: Row | None) -> str | None:
    answer = shown_reference(cast(Problem, problem)) if problem else None
    return None if answer is None else cut(answer, SHORTEST_CUT)


def _rows(path: Path) -> Iterable[Row]:
    return (row for _, row in read_jsonl(path, torn_ok=True)) if path.is_file() else ()


def choose_traces(folder: Path, most: int) -> tuple[list[Row], dict[str, int]]:
    """At most `most` traces for the reader, and how many there are: {"all", "accepted", "rejected"}.

    Rejected traces get up to half of the places, spread over the filters that rejected them, because they
    are what a person comes to look at.
    """
    problems = {row["id"]: row for row in _rows(folder / "problems.jsonl")}
    ledger = {row["trace_id"]: row for row in _rows(folder / "verdicts.jsonl")}
    trace_file = folder / "traces" / "traces.jsonl"
    # Once the filters have run, a trace without a line in the ledger is of an older recipe.
    current = (row for row in _rows(trace_file) if not ledger or row["id"] in ledger)
    known = list({row["id"]: row["problem_id"] for row in current}.items())
    rejected = [pair for pair in known if pair[0] in ledger and not ledger[pair[0]]["accepted"]]
    others = [pair for pair in known if pair[0] not in ledger or ledger[pair[0]]["accepted"]]

    def by_family(pair: tuple[str, str]) -> str:
        return family(problems.get(pair[1]))

    def by_reason(pair: tuple[str, str]) -> str:
        return next((name for name, said in ledger[pair[0]]["verdicts"].items() if not said["pass"]), "")

    places = min(len(rejected), max(most // 2, most - len(others)))
    shown = spread(rejected, by_reason, lambda pair: pair[0], places)
    shown += spread(others, by_family, lambda pair: pair[0], most - len(shown))
    wanted = {trace_id for trace_id, _ in shown}
    most_characters = limit(3 * len(wanted))
    # The file is read twice so that only ids, and not a million texts, are ever held in memory.
    found = {row["id"]: row for row in _rows(trace_file) if row["id"] in wanted}
    chosen = [
        _trace(row, problems.get(row["problem_id"]), ledger.get(row["id"]), most_characters) for row in found.values()
    ]
    chosen.sort(key=lambda item: (item["family"], item["id"]))
    accepted = sum(1 for pair in others if pair[0] in ledger)
    return chosen, {"all": len(known), "accepted": accepted, "rejected": len(rejected)}


def _trace(trace: Row, problem: Row | None, line: Row | None, most: int) -> Row:
    question = problem["problem"] if problem else trace["messages"][0]["content"]
    return {
        "id": trace["id"],
        "problem_id": trace["problem_id"],
        "family": family(problem),
        "sample": trace["sample"],
        "problem": cut(question, most),
        "reference": _answer(problem),
        "reasoning": cut(trace["reasoning"], most),
        "response": cut(trace["response"], most),
        "finish_reason": trace["finish_reason"],
        "tokens": [trace["prompt_tokens"], trace["reasoning_tokens"], trace["answer_tokens"]],
        "accepted": line["accepted"] if line else None,
        "verdicts": [[name, said["pass"], cut(said["reason"], 500)] for name, said in line["verdicts"].items()]
        if line
        else [],
    }


def split_thinking(text: str) -> tuple[str, str, bool]:
    """(reasoning, response, whether the thinking was closed) of a generated text, as the graders read it."""
    before, closed, after = text.rpartition("</think>")
    if not closed:
        return text.strip("\n"), "", False
    return before.removeprefix("<think>").strip("\n"), after.strip("\n"), True


def choose_answers(folder: Path, models: list[str], most: int) -> list[Row]:
    """At most `most` evaluation problems with the first sample of every model in `models`, and each model's score.

    The first sample is shown, never the best one; the score counts all samples of that problem.
    """
    problems = spread(_rows(folder / "eval_problems.jsonl"), family, lambda row: row["id"], most)
    items = {row["id"]: _question(row) for row in problems}
    most_characters = limit(2 * len(items) * max(len(models), 1))
    for model in models:
        for row in _rows(folder / "evals" / f"{model.replace('/', '.')}.jsonl"):
            if row["problem_id"] in items:
                _add_answer(items[row["problem_id"]]["answers"], model, row, most_characters)
    kept = [item for item in items.values() if item["answers"]]
    kept.sort(key=lambda item: (item["family"], item["id"]))
    return kept


def _question(problem: Row) -> Row:
    return {
        "id": problem["id"],
        "family": family(problem),
        "problem": cut(problem["problem"], LONGEST_CUT),
        "reference": _answer(problem),
        "answers": {},
    }


def _add_answer(answers: dict[str, Row], model: str, row: Row, most: int) -> None:
    answer = answers.setdefault(model, {"right": 0, "samples": 0, "sample": None})
    answer["right"] += bool(row["correct"])
    answer["samples"] += 1
    # Samples may finish in any order; the lowest index is "the first".
    if answer["sample"] is None or row["sample"] < answer["sample"]:
        reasoning, response, closed = split_thinking(row["text"])
        answer |= {
            "sample": row["sample"],
            "reasoning": cut(reasoning, most),
            "response": cut(response, most),
            "closed": closed,
            "extracted": None if row.get("extracted") is None else cut(str(row["extracted"]), SHORTEST_CUT),
            "correct": bool(row["correct"]),
            "verdict": row.get("verdict"),
            "truncated": bool(row.get("truncated")),
            "no_answer": bool(row.get("no_answer")),
            "tokens": row.get("tokens"),
        }
