"""One row of somebody's dataset as a problem and its traces."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from distill.files import sha256_json
from distill.foreign.layouts import ABSENT, Layout, look_up
from distill.foreign.replies import Parts, join, split
from distill.identity import problem_hash
from distill.recipe import Kind
from distill.records import Message, Problem, Trace

_META_TEXT = 2000  # longest text of another field that is kept in `meta`: subjects and links, not whole solutions
_BYTES_A_TOKEN = 3.5  # of real R1 and QwQ traces under R1's tokenizer: 3.48 and 3.54 in the mean, 2.5 to 4.5
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_ENDS = {"eos": "stop", "stop_sequence": "stop", "end_turn": "stop", "max_tokens": "length"}

Count = Callable[[str], int]


class Unmapped(Exception):
    """A row, or one generation of it, that is no trace. `field` is its field, `reason` says what was found."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class Sample(NamedTuple):
    problem: Problem
    trace: Trace  # its number among the problem's samples is set later


class Reading(NamedTuple):
    """How a source is read."""

    layout: Layout
    name: str  # the source's, in mixtures and on the card
    unmarked: str
    count_tokens: Count | None  # exact tokens of a text, or None for the estimate


def estimate_tokens(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / _BYTES_A_TOKEN)


def samples(how: Reading, place: str, row: Mapping[str, Any]) -> Iterator[Sample | Unmapped]:
    """Every generation of the row, or what is wrong with it. Raises Unmapped if the row as a whole says nothing."""
    fields = how.layout.fields
    asked, last = _asked(how.layout, row)
    text = problem_text(asked, how.layout.instruction)
    if not text:
        raise Unmapped(fields.get("problem") or fields["messages"], "the problem is empty")
    problem = _problem(how, row, text)
    replies = _replies(how, row, last)
    for number, parts in enumerate(replies):
        if isinstance(parts, Unmapped):
            yield parts
        else:
            yield Sample(problem, _trace(how, place, row, problem, asked, parts, number, len(replies)))


def problem_text(asked: list[Message], instruction: str | None) -> str:
    """The problem alone: the user's turn without the instruction that stands around it."""
    text = next(turn["content"] for turn in asked if turn["role"] == "user").strip()
    if instruction:
        instruction = instruction.strip()
        text = text.removeprefix(instruction).removesuffix(instruction).strip()
    return text


def _asked(layout: Layout, row: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """The turns before the reply, and the reply if it is the last turn of the messages."""
    path = layout.fields.get("problem")
    if path is not None:
        return [{"role": "user", "content": _text(row, path)}], None
    path = layout.fields["messages"]
    turns = look_up(row, path)
    if isinstance(turns, str):  # some files hold the list as JSON text
        try:
            turns = json.loads(turns)
        except ValueError:
            raise Unmapped(path, "is text, expected a list of messages") from None
    if not isinstance(turns, list) or not turns:
        raise Unmapped(path, f"is {_found(turns)}, expected a list of messages")
    asked = [_message(turn, f"{path}.{number}") for number, turn in enumerate(turns)]
    last = asked.pop()["content"] if asked[-1]["role"] == "assistant" else None
    roles = [turn["role"] for turn in asked]
    if roles not in (["user"], ["system", "user"]):
        raise Unmapped(path, f"has the turns {', '.join(roles) or 'none'} before the reply, expected one of the user")
    return asked if layout.system else asked[-1:], last


def _message(turn: Any, path: str) -> Message:
    if not isinstance(turn, Mapping):
        raise Unmapped(path, f"is {_found(turn)}, expected a message")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise Unmapped(path, f"has the role {role!r}, expected one of {', '.join(_ROLES)}")
    if isinstance(content, list):  # OpenAI's form of parts
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if texts and len(texts) == len(parts) else content
    if not isinstance(content, str):
        raise Unmapped(path, f"has {_found(content)} for content, expected text")
    thinking = turn.get("reasoning_content") or turn.get("reasoning")  # as servers with a reasoning parser return it
    if isinstance(thinking, str) and thinking.strip() and _ROLES[role] == "assistant":
        content = join(thinking, content).text
    return {"role": _ROLES[role], "content": _whole(content, path)}


def _problem(how: Reading, row: Mapping[str, Any], text: str) -> Problem:
    layout = how.layout
    tests, answer = _tests(row, layout.fields.get("tests")), _answer(row, layout)
    kind = _kind(row, layout) or ("code" if tests else "math" if answer else "open")
    if kind in ("code", "choice", "reasoning-gym"):  # whose reference may be JSON, in our own form (docs/formats.md)
        written = _tests(row, layout.fields.get("answer"))
        tests, answer = tests or written, written if written and written.startswith("{") else answer
    source = _optional(row, layout.fields.get("source"))
    meta = {key: value for key, value in row.items() if key not in _used(layout) and _is_small(value)}
    meta |= {"family": how.name}
    for name, value in (
        ("source_id", _optional(row, layout.fields.get("id"))),
        ("licence", _optional(row, layout.fields.get("licence")) or layout.licence),
    ):
        if value is not None:
            meta[name] = value
    return {
        "id": problem_hash(text)[:16],
        "problem": text,
        "answer": tests if kind == "code" else answer,
        "kind": kind,
        "source": f"{how.name}/{source}" if source else how.name,
        "meta": meta,
    }


def _used(layout: Layout) -> set[str]:
    return {path.partition(".")[0] for path in layout.fields.values()}


def _kind(row: Mapping[str, Any], layout: Layout) -> Kind | None:
    said = _optional(row, layout.fields.get("kind"))
    if layout.kind is not None or said is None:
        return layout.kind
    if said in layout.kinds:
        return layout.kinds[said]
    return said if not layout.kinds and said in get_args(Kind) else "open"  # type: ignore[return-value]


def _answer(row: Mapping[str, Any], layout: Layout) -> str | None:
    """The reference: what is after '####' of GSM8K's solutions, else what is in the last box, else the field."""
    from evals.grading import extract_answer

    answer = _optional(row, layout.fields.get("answer"))
    if answer:
        if "####" in answer:
            return answer.rsplit("####", 1)[1].replace(",", "").strip() or None
        return (extract_answer(answer, "math") if "\\boxed" in answer else None) or answer
    solution = _optional(row, layout.fields.get("solution"))
    if solution and "####" in solution:
        return solution.rsplit("####", 1)[1].replace(",", "").strip() or None
    if solution and "\\boxed" in solution:
        return extract_answer(solution, "math") or None
    # s1K's solutions of answer-only sets are the answer itself; a longer text without a box is no reference.
    return solution if solution and len(solution) <= 40 and "\n" not in solution else None


def _tests(row: Mapping[str, Any], path: str | None) -> str | None:
    value = look_up(row, path) if path else None
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False) if value else None
    return value.strip() or None if isinstance(value, str) else None


def _replies(how: Reading, row: Mapping[str, Any], last: str | None) -> list[Parts | Unmapped]:
    fields = how.layout.fields
    if "reasoning" in fields or "response" in fields:
        reasonings, responses = (_several(row, fields.get(name)) for name in ("reasoning", "response"))
        if not reasonings or not responses:  # one of the two alone holds the whole reply
            return [_reply(how, path, value) for path, value in reasonings or responses]
        if len(responses) != len(reasonings):
            expected = f"as many as {fields['reasoning']}: {len(reasonings)}"
            raise Unmapped(fields["response"], f"has {len(responses)} texts, expected {expected}")
        pairs = zip(reasonings, responses, strict=True)
        return [_joined(first, second) for first, second in pairs]
    if "text" in fields:
        found = _several(row, fields["text"])
    elif last is not None:
        found = [(fields["messages"], last)]
    else:
        raise Unmapped(fields["messages"], "the last turn is not the model's")
    return [_reply(how, path, value) for path, value in found]


def _reply(how: Reading, path: str, value: Any) -> Parts | Unmapped:
    try:
        return split(_filled(value, path), how.unmarked)
    except Unmapped as wrong:
        return wrong


def _joined(reasoning: tuple[str, Any], response: tuple[str, Any]) -> Parts | Unmapped:
    """A reply of two fields; one that was cut off while thinking has no response."""
    try:
        before = _filled(reasoning[1], reasoning[0])
        if response[1] is None or response[1] == "":
            return Parts(before, before.strip(), "")
        return join(before, _filled(response[1], response[0]))
    except Unmapped as wrong:
        return wrong


def _several(row: Mapping[str, Any], path: str | None) -> list[tuple[str, Any]]:
    if path is None:
        return []
    value = look_up(row, path)
    if isinstance(value, list):
        if not value:
            raise Unmapped(path, "is an empty list, expected generations")
        return [(f"{path}.{number}", item) for number, item in enumerate(value)]
    return [(path, value)]


def _filled(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise Unmapped(path, f"is {_found(value)}, expected text")
    if not value.strip():
        raise Unmapped(path, "is empty")
    return _whole(value, path)


def _trace(
    how: Reading, place: str, row: Mapping[str, Any], problem: Problem, asked: list[Message], parts: Parts, number: int,
    of: int,
) -> Trace:  # fmt: skip
    fields = how.layout.fields
    teacher = _optional(row, fields.get("teacher")) or how.layout.teacher or "unknown"
    count = how.count_tokens or estimate_tokens
    reasoning_tokens = _number(row, fields.get("reasoning_tokens"), number, of)
    tokens = _number(row, fields.get("tokens"), number, of)
    if reasoning_tokens is None:
        reasoning_tokens = count(parts.reasoning)
    answer_tokens = count(parts.response) if tokens is None else max(0, tokens - reasoning_tokens)
    end = _of_this(row, fields.get("finish_reason"), number, of)
    others = row.keys() - _used(how.layout)
    said = {
        path: value
        for path in row
        if path in others and (value := _of_this(row, path, number, of, alone=False)) is not None
    }
    if (verdict := _of_this(row, fields.get("correct"), number, of)) is not None:
        said["correct"] = verdict
    return {
        "id": sha256_json([problem["id"], asked, parts.text, teacher])[:16],
        "problem_id": problem["id"],
        "sample": number,
        "messages": asked,
        "reasoning": parts.reasoning,
        "response": parts.response,
        "finish_reason": _ENDS.get(end, end) if isinstance(end, str) and end else "unknown",
        "prompt_tokens": sum(count(turn["content"]) for turn in asked),
        "reasoning_tokens": reasoning_tokens,
        "answer_tokens": answer_tokens,
        "seconds": 0.0,
        "cost": 0.0,
        "teacher": teacher,
        "sampling": {},
        "text": parts.text,
        "meta": {"place": place, **({"said": said} if said else {})},
    }


def _of_this(row: Mapping[str, Any], path: str | None, number: int, of: int, *, alone: bool = True) -> Any:
    """The small value of a field for one generation: an element where the field is a list of as many."""
    value = look_up(row, path) if path else None
    if isinstance(value, list) and len(value) == of:
        value = value[number]
    elif not alone:
        return None
    return value if _is_small(value) and value != "" and len(str(value)) <= 200 else None


def _number(row: Mapping[str, Any], path: str | None, number: int, of: int) -> int | None:
    value = _of_this(row, path, number, of)
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None


def _text(row: Mapping[str, Any], path: str) -> str:
    value = look_up(row, path)
    if not isinstance(value, str):
        raise Unmapped(path, f"is {_found(value)}, expected text")
    return _whole(value, path)


def _whole(text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise Unmapped(path, f"holds half a surrogate pair ({half}), which no tokenizer reads") from None
    return text


def _optional(row: Mapping[str, Any], path: str | None) -> str | None:
    """A field that may be missing or empty, as text."""
    value = look_up(row, path) if path else None
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return _whole(str(value), path or "").strip() or None


def _found(value: Any) -> str:
    if value is ABSENT:
        return "missing"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a value of type {type(value).__name__}")


def _is_small(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= _META_TEXT and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, int | bool)


def source_name(source: str) -> str:
    """What a source is called if the recipe does not say: its file's or folder's name, or the dataset's."""
    path = Path(source)
    return path.name.split(".")[0] or "traces" if path.exists() else source.partition(":")[0]
