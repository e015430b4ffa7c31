"""A small recipe, and a teacher that is a function, for the tests of the data stages."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import traces
from distill.recipe import Recipe
from distill.records import Ask, Asks, EndpointState, Problem, Reply, Trace
from distill.runfolder import RunFolder

FAMILIES: dict[str, dict[str, Any]] = {"gcd": {"max_value": 60}, "spell_backward": {"max_word_len": 7}}


def make_recipe(**sections: Any) -> Recipe:
    """A valid recipe; each keyword is merged into the section of that name (or replaces a plain value)."""
    tree: dict[str, Any] = {
        "name": "small",
        "problems": {"source": "reasoning-gym", "count": 12, "seed": 1, "families": FAMILIES},
        "teacher": {"kind": "embedded", "model": "fake"},
        "sampling": {"samples": 2, "max_tokens": 64, "instruction": ""},
        "filters": {"correctness": {}, "format": {}, "length": {}, "repetition": {}, "duplicates": {}},
        "selection": {"per_problem": 1, "validation_fraction": 0.25},
        "students": [{"name": "student", "base": "tiny-qwen"}],
        "evals": {"problems": {"source": "reasoning-gym", "count": 6, "seed": 2, "families": FAMILIES}},
    }
    for name, value in sections.items():
        tree[name] = {**tree[name], **value} if isinstance(value, dict) and isinstance(tree.get(name), dict) else value
    return Recipe.model_validate(tree)


def open_run(folder: Path, recipe: Recipe) -> RunFolder:
    return RunFolder.open(folder, recipe)


class FakeTeacher:
    """Answers each ask with `reply(ask)`, the raw text and the reason for ending, in an order of its own."""

    def __init__(
        self, reply: Callable[[Ask], tuple[str, str]], identity: str = "fake@000000000000", at_once: int = 1000
    ) -> None:
        self.reply, self.id, self.at_once = reply, identity, at_once
        self.asked: list[Ask] = []

    def generate(self, asks: Asks) -> Iterator[list[Reply]]:
        while not asks.closed:
            # Not in the order asked: an engine yields what finishes first.
            for ask in sorted(asks.take(self.at_once), key=lambda a: hashlib.sha256(a.id.encode()).hexdigest()):
                self.asked.append(ask)
                text, end = self.reply(ask)
                words = text.split()
                inside = text.split("</think>")[0].split()
                error = text if end == "failed" else None
                yield [Reply(ask.id, text, end, 7, len(inside), len(words) - len(inside), 0.01, error=error)]
            yield []

    def states(self) -> dict[str, EndpointState]:
        return {self.id: EndpointState(0, self.at_once, True, {})}


def install(monkeypatch: pytest.MonkeyPatch, teacher: FakeTeacher) -> FakeTeacher:
    """Make the trace stage ask `teacher`."""
    monkeypatch.setattr(traces, "identify_teacher", lambda settings: {"id": teacher.id, "licence": "apache-2.0"})
    monkeypatch.setattr(traces, "open_teacher", lambda *_: teacher)
    return teacher


def right_reply(problems: Iterable[Problem]) -> Callable[[Ask], tuple[str, str]]:
    """A teacher's reply that is right, differs from sample to sample, and has R1's form."""
    answers = {p["problem"]: p["answer"] for p in problems}

    def reply(ask: Ask) -> tuple[str, str]:
        answer = answers[ask.messages[0]["content"]]
        return f"Thinking of {ask.seed}.\n</think>\n\nThe answer is \\boxed{{{answer}}}.", "stop"

    return reply


def problem(text: str = "What is 2 + 2?", answer: str | None = "4", kind: Any = "math") -> Problem:
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"id": identity, "problem": text, "answer": answer, "kind": kind, "source": "test", "meta": {}}


def trace(
    of: Problem, text: str = "2 and 2 is 4.\n</think>\n\n\\boxed{4}", sample: int = 0, end: str = "stop"
) -> Trace:
    from distill.reasoning import split_reasoning

    reasoning, response = split_reasoning(text)
    return {
        "id": hashlib.sha256(f"{of['id']}/{sample}/{text}".encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "problem_id": of["id"],
        "sample": sample,
        "messages": [{"role": "user", "content": of["problem"]}],
        "reasoning": reasoning,
        "response": response,
        "finish_reason": end,
        "prompt_tokens": 5,
        "reasoning_tokens": len(reasoning.split()),
        "answer_tokens": len(response.split()),
        "seconds": 0.1,
        "cost": 0.0,
        "teacher": "fake@000000000000",
        "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 64, "instruction": "", "seed": sample},
        "text": text,
    }
