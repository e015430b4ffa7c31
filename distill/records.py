"""What the stages hand to each other.

Lines of the run folder's files are plain typed dictionaries, because other tools read those lines; what
passes between the trace stage and a teacher is not on disk in that form, hence dataclasses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

from distill.recipe import Kind


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

    id: str  # content hash of everything that determines the sample; see distill.generation.plan.trace_id
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
    attempts: NotRequired[int]  # requests that it took
    endpoint: NotRequired[str]  # where it came from, if there are several
    teacher: str  # "<name>@<12 hex>", the hash of the weights, configuration and tokenizer; "+think=leave" and such
    sampling: dict[str, Any]
    text: str  # the generated text as it came, after the prompt
    meta: NotRequired[dict[str, Any]]  # of an imported trace: its place in the source, and what that said of it


class Verdict(NamedTuple):
    """What one filter says about one trace."""

    passed: bool
    reason: str  # what was found, for a person to read
    measured: dict[str, float] | None = None  # numbers that the verdict rests on, or that are worth keeping beside it
    settled: bool = True  # False where judging again may find more: a model did not answer


# The words "pass" and "in" are Python keywords, hence the functional form: these are the names on disk.
FilterVerdict = TypedDict(
    "FilterVerdict", {"pass": bool, "reason": str, "key": str, "measured": NotRequired[dict[str, float]]}
)
FunnelRow = TypedDict(
    "FunnelRow",
    {
        "filter": str,
        "in": int,
        "out": int,
        "problems_in": int,
        "problems_out": int,
        "tokens_in": int,
        "tokens_out": int,
    },
)


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


@dataclass(frozen=True, slots=True)
class Ask:
    """One sample wanted from a teacher."""

    id: str  # the trace's id
    messages: list[Message]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    logprobs: int = 0  # likeliest tokens to keep at each position


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The teacher's likeliest tokens at each of T generated positions, likeliest first, K of them."""

    tokens: Sequence[Sequence[int | str]]  # (T, K): ids where the teacher gives them, else the tokens' text
    logprobs: Sequence[Sequence[float]]  # (T, K)
    chosen: Sequence[int | str] = ()  # (T,) the tokens that were generated, where the teacher tells them


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of an Ask; every Ask gets exactly one, in any order. Token counts are 0 where nothing was sent.

    finish_reason: "stop"; "length"; "prompt_too_long" (the context overflows); "content_filter"; "refusal"; "empty";
    "invalid_utf8"; these are outcomes, recorded and not asked again. "failed": nothing came in all attempts, `error`
    says what happened last; that is not recorded as a trace, and the next start asks again.
    """

    id: str
    text: str  # what was generated after the prompt, without the end-of-sequence token
    finish_reason: str
    prompt_tokens: int
    reasoning_tokens: int  # up to and with the closing </think>
    answer_tokens: int
    seconds: float  # of the attempt that brought it
    cost: float = 0.0  # of all attempts
    attempts: int = 1
    endpoint: str | None = None  # where it came from, if there are several
    error: str | None = None  # of "failed": the kind ("timeout", "http_500", "bad_json", ...) and what was said
    logprobs: TopLogprobs | None = None


class EndpointState(NamedTuple):
    """How one endpoint stands, for the live display and the manifest."""

    in_flight: int
    limit: int  # requests in flight that it is given at present
    up: bool
    errors: Mapping[str, int]  # failed attempts by kind, since the start


class Asks(Protocol):
    """Where a teacher gets its work from. What comes may depend on what was answered, so it is not a plain list."""

    def take(self, most: int) -> list[Ask]:
        """Up to `most` asks, at once; fewer: there are no more for now."""
        ...

    @property
    def closed(self) -> bool:
        """Whether take() will never bring anything again: finish what is in flight, and end."""
        ...


class TeacherBackend(Protocol):
    """One kind of teacher (recipe field teacher.kind), ready to be asked."""

    id: str  # "<name>@<12 hex>": equal ids mean the same weights, configuration, tokenizer and way of asking

    def generate(self, asks: Asks) -> Iterator[list[Reply]]:
        """Yield replies as they finish, in batches; an empty batch at least every 0.2 s, for the stage to do its work.

        Ends when `asks` is closed and nothing is in flight. Closing the generator gives up what is in flight at once.
        """
        ...

    def states(self) -> Mapping[str, EndpointState]:
        """By endpoint; of a teacher in this process one entry."""
        ...
