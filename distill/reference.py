"""A problem's reference answer as people read it."""

import json

from distill.records import Problem


def final_answer(problem: Problem) -> str | None:
    """The reference as a reply would state it; None where the reference says how to judge instead."""
    if problem["kind"] in ("code", "regex") or problem["answer"] is None:
        return None
    if problem["kind"] != "reasoning-gym":
        return problem["answer"]
    try:
        answer = json.loads(problem["answer"])["answer"]
        return None if answer is None else str(answer)
    except (ValueError, KeyError, TypeError):
        return None


def shown_reference(problem: Problem) -> str | None:
    """The reference for a page or a reason: of a scorer's entry the answer in it, all else as it is."""
    answer = problem["answer"]
    return final_answer(problem) or answer if problem["kind"] == "reasoning-gym" else answer
