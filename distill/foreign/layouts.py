"""The layouts of well-known trace datasets: which field holds what.

Field names as published: open-r1/OpenR1-Math-220k, open-thoughts/OpenThoughts-114k (default and `metadata`),
bespokelabs/Bespoke-Stratos-17k, a-m-team/AM-DeepSeek-R1-Distilled-1.4M, simplescaling/s1K and s1K-1.1,
tianyi-lab/MiP-Overthinking. A recipe's `fields` replace or add single ones.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from distill.errors import UserError
from distill.recipe import ForeignTraces, Kind

Row = Mapping[str, object]


@dataclass(frozen=True)
class Layout:
    """`requires` are the fields by which a row is known to have this layout; `fields` is as in recipe.TraceFields."""

    name: str
    requires: tuple[str, ...]
    fields: Mapping[str, str]
    kind: Kind | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    teacher: str | None = None
    licence: str | None = None
    instruction: str | None = None  # stands around the problem in what was asked
    system: bool = True  # whether a system turn is part of what was asked, or explains marks that we replace


_BOXED = "Return your final response within \\boxed{}."  # OpenThoughts and Bespoke-Stratos put it before maths

# In the order in which 'auto' tries them: the more particular first.
LAYOUTS = (
    Layout(
        "open-r1",
        ("problem", "generations"),
        {
            "problem": "problem", "text": "generations", "answer": "answer", "solution": "solution",
            "source": "source", "finish_reason": "finish_reasons", "correct": "correctness_math_verify", "id": "uuid",
        },
        kind="math",
        teacher="DeepSeek-R1",
        licence="apache-2.0",
    ),
    Layout(
        "openthoughts-metadata",
        ("problem", "deepseek_reasoning", "deepseek_solution"),
        {
            "problem": "problem", "reasoning": "deepseek_reasoning", "response": "deepseek_solution",
            "solution": "ground_truth_solution", "tests": "test_cases", "kind": "domain", "source": "source",
        },
        kinds={"math": "math", "code": "code"},
        teacher="DeepSeek-R1",
    ),
    Layout(
        "am",
        ("messages.0.info",),
        {
            "messages": "messages", "answer": "messages.0.info.reference_answer",
            "tests": "messages.0.info.test_case", "source": "messages.0.info.source",
        },
    ),
    Layout(
        "s1.1",
        ("question", "deepseek_thinking_trajectory", "deepseek_attempt"),
        {
            "problem": "question", "reasoning": "deepseek_thinking_trajectory", "response": "deepseek_attempt",
            "solution": "solution", "kind": "cot_type", "source": "source_type", "correct": "deepseek_grade",
        },
        kinds={"math": "math"},
        teacher="DeepSeek-R1",
    ),
    Layout(
        "s1",
        ("question", "thinking_trajectories", "attempt"),
        {
            "problem": "question", "reasoning": "thinking_trajectories", "response": "attempt",
            "solution": "solution", "kind": "cot_type", "source": "source_type",
        },
        kinds={"math": "math"},
        teacher="Gemini Flash Thinking",
    ),
    Layout(
        "mip-overthinking",
        ("prompt", "response", "eval_result"),
        {
            "problem": "prompt", "text": "response", "answer": "answer", "solution": "solution", "teacher": "model",
            "source": "set", "id": "id",
        },
        kind="math",
        licence="mit",
    ),
    Layout(
        "distill",
        ("messages", "text", "problem_id", "finish_reason"),
        {
            "messages": "messages", "text": "text", "finish_reason": "finish_reason", "teacher": "teacher",
            "reasoning_tokens": "reasoning_tokens", "id": "id",
        },
    ),
    Layout(
        "openthoughts",
        ("conversations", "system"),
        {"messages": "conversations"},
        teacher="DeepSeek-R1",
        instruction=_BOXED,
        system=False,
    ),
    Layout(
        "bespoke-stratos",
        ("conversations", "system"),
        {"messages": "conversations"},
        teacher="DeepSeek-R1",
        instruction=_BOXED,
        system=False,
    ),
    Layout("messages", ("messages",), {"messages": "messages", "answer": "answer"}),
    Layout("sharegpt", ("conversations",), {"messages": "conversations", "answer": "answer"}),
    Layout("prompt-response", ("prompt", "response"), {"problem": "prompt", "text": "response", "answer": "answer"}),
)  # fmt: skip
_NONE = Layout("none", (), {})
_OPTIONAL = frozenset(
    ("answer", "solution", "tests", "kind", "source", "teacher", "licence", "finish_reason", "correct",
     "reasoning_tokens", "tokens", "id")
)  # fmt: skip


def choose_layout(settings: ForeignTraces, row: Row, place: str, field: str) -> Layout:
    """The layout that the recipe names, or for 'auto' the first that fits the row.

    `field` is the section's name in the recipe. Raises UserError if the row has not the fields it takes.
    """
    own = _own(settings)
    name: str = settings.layout
    if name == "auto" and _says_enough(own):
        name = "none"
    if name == "auto":
        found = next((layout for layout in LAYOUTS if all(has(row, path) for path in layout.requires)), None)
        if found is None:
            raise UserError(
                f"{place}: no known layout has the fields {_known(row)}; say in {field}.fields which holds the problem "
                "and which the text (or the reasoning and the response), or the messages"
            )
        name = found.name
    layout = named_layout(name, settings)
    if not _says_enough(layout.fields):
        raise UserError(f"{field}.fields: name the field with the messages, or those with the problem and the reply")
    for what, path in layout.fields.items():
        if (what in own or what not in _OPTIONAL) and not has(row, path):
            near = difflib.get_close_matches(path, [str(key) for key in row], n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {_known(row)}"
            raise UserError(
                f"{place}: the row has no field '{path}' ({field}.fields.{what}, layout '{layout.name}'); {hint}"
            )
    return layout


def named_layout(name: str, settings: ForeignTraces) -> Layout:
    """The layout of that name with the recipe's own settings in the place of the layout's."""
    own = _own(settings)
    layout = next((layout for layout in LAYOUTS if layout.name == name), _NONE)
    return replace(
        layout,
        fields={**layout.fields, **own},
        kind=settings.kind or (None if "kind" in own else layout.kind),
        kinds=settings.kinds or layout.kinds,
        teacher=settings.teacher or layout.teacher,
        licence=settings.licence or layout.licence,
        instruction=settings.instruction or layout.instruction,
    )


def _own(settings: ForeignTraces) -> dict[str, str]:
    return {name: path for name, path in settings.fields.model_dump().items() if path is not None}


def _known(row: Row) -> str:
    return ", ".join(str(key) for key in list(row)[:20])


def _says_enough(fields: Mapping[str, str]) -> bool:
    return "messages" in fields or ("problem" in fields and bool({"text", "reasoning", "response"} & fields.keys()))


def has(row: Row, path: str) -> bool:
    return look_up(row, path) is not ABSENT


ABSENT = object()


def look_up(row: Row, path: str) -> object:
    """The value at a dotted path, or ABSENT. A field whose own name has dots goes first."""
    if path in row:
        return row[path]
    value: object = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return ABSENT
    return value
