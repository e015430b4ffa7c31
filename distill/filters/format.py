r"""format: one <think>…</think>, then an answer that states its result, and nothing that leaked.

A trace whose thinking opens twice, or in which a template token shows, teaches the student to write these
too; one whose answer has no box cannot be graded later, nor can the student's. A reply that boxes two different
answers is rejected only on request (`single_answer`): parts of one answer are often boxed one by one, and the
grader takes the last.
"""

import re

from distill.reasoning import CLOSE, OPEN
from distill.recipe import FormatFilter
from distill.records import Problem, Trace, Verdict

VERSION = 2

# Tokens of chat templates, written out: DeepSeek's <｜…｜>, <|…|> of Qwen, Llama 3, Phi and others, Llama 2's and
# Mistral's [INST], sentencepiece's <s>, Gemma's turns.
_LEAK = re.compile(
    r"<(?:｜[^｜<>\n]{1,40}｜>|\|[A-Za-z0-9_]{1,40}\|>|</?SYS>>|/?s>|(?:bos|eos|pad|unk)>|(?:start|end)_of_turn>"
    r"|/?(?:answer|tool_call|tool_response)>)"
    r"|\[/?INST\]"
)
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_BOXED_KINDS = ("math", "exact", "choice", "regex", "reasoning-gym")


def check(traces: list[Trace], problems: dict[str, Problem], settings: FormatFilter | None) -> list[Verdict]:
    """The kinds with a rule for the answer need a final answer as evals.grading finds it, after the reasoning."""
    single = settings is not None and settings.single_answer
    return [_check(trace, problems[trace["problem_id"]]["kind"], single) for trace in traces]


def _check(trace: Trace, kind: str, single: bool) -> Verdict:
    from evals.grading import extract_answer

    text, response = trace["text"], trace["response"]
    opened, closed = text.count(OPEN), text.count(CLOSE)
    if not closed:
        return Verdict(False, "the thinking never closes")
    if closed > 1:
        return Verdict(False, f"{closed} closing </think> tags, expected one")
    if opened > 1 or (opened == 1 and not text.lstrip().startswith(OPEN)):
        return Verdict(False, f"the thinking opens again at character {text.rindex(OPEN)}")
    leak = _LEAK.search(text)
    if leak:
        return Verdict(False, f"template token {leak.group()} at character {leak.start()}")
    if not trace["reasoning"].strip():
        return Verdict(False, "the reasoning is empty")
    if not response.strip():
        return Verdict(False, "nothing after </think>")
    if kind in _BOXED_KINDS:
        answer = extract_answer(response, kind)
        if answer is None:
            boxed = "; there is one in the reasoning" if "\\boxed" in trace["reasoning"] else ""
            return Verdict(False, f"no \\boxed{{}} after </think>{boxed}")
        if not answer.strip():
            return Verdict(False, "the \\boxed{} after </think> is empty")
        if single and len(boxes := _boxes(response)) > 1:
            return Verdict(False, f"{len(boxes)} different answers are boxed: {boxes[0]}, then {boxes[1]}")
    return Verdict(True, "one think block, then an answer")


def _boxes(response: str) -> list[str]:
    """The different contents of boxes, blanks apart, shortened for a message."""
    return [text[:60] for text in dict.fromkeys("".join(box.split()) for box in _BOX.findall(response)) if text]
