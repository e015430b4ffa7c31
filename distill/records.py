"""What the stages hand to each other: the shapes of the lines in a run folder's files.

Plain typed dictionaries, because each of them is one JSON line on disk and other tools read those lines.
"""

from typing import Any, Literal, NotRequired, TypedDict

Kind = Literal["math", "code", "choice", "exact", "open"]


class Message(TypedDict):
    role: str
    content: str


class Problem(TypedDict):
    """A line of problems.jsonl and eval_problems.jsonl."""

    id: str  # first 16 hex of problem_hash(problem), or the source's own id where the recipe names its field
    problem: str  # the text the teacher is asked, without the sampling instruction
    answer: str | None  # the reference; None where the source has none
    kind: Kind  # how an answer is graded
    source: str  # "reasoning-gym/<family>", or the name of the file or dataset
    meta: dict[str, Any]  # "family" for per-family tables; everything else is the source's own


class Trace(TypedDict):
    """A line of traces/traces.jsonl: one finished sample, whatever its end was."""

    id: str  # content hash of everything that determines the sample; see distill.traces.trace_id
    problem_id: str
    sample: int
    messages: list[Message]  # what was asked; the reply is in `text`
    reasoning: str  # before the </think> that closes the thinking, tags and surrounding blank space removed
    response: str  # after it; empty when the thinking never closed
    finish_reason: str  # "stop", "length" (truncated), "prompt_too_long" (never sent), ...
    prompt_tokens: int
    reasoning_tokens: int
    answer_tokens: int
    seconds: float
    cost: float
    teacher: str  # "<name>@<12 hex>", the hash of the weights, configuration and tokenizer
    sampling: dict[str, Any]
    text: str  # the generated text as it came, after the prompt


class Verdict(TypedDict):
    """What one filter says about one trace."""

    trace_id: str
    filter: str
    passed: bool
    reason: str  # what was found, for a person to read


# The words "pass" and "in" are Python keywords, hence the functional form: these are the names on disk.
FilterVerdict = TypedDict("FilterVerdict", {"pass": bool, "reason": str})
FunnelRow = TypedDict("FunnelRow", {"filter": str, "in": int, "out": int, "tokens_in": int, "tokens_out": int})


class LedgerLine(TypedDict):
    """A line of verdicts.jsonl: every filter's verdict on one trace."""

    trace_id: str
    problem_id: str
    sample: int
    verdicts: dict[str, FilterVerdict]
    accepted: bool
    settings: str  # hash of all filter settings together


class DatasetRow(TypedDict):
    """A row of the dataset that students are trained on."""

    messages: list[Message]
    problem_id: str
    trace_id: NotRequired[str]
    source: str
    answer: str | None
