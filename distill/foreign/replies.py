"""Where the reasoning ends in other people's replies, and the same reply in R1's form.

Marks seen in published traces: <think>…</think> (with or without the opening one), the answer then plain or in
<answer>…</answer> (AM); <|begin_of_thought|>…<|begin_of_solution|>… (OpenThoughts, Bespoke-Stratos, Sky-T1); s1's
"think\n…\nanswer\n" and its chat form. A reply whose marks are R1's is left as it came, so that the filters see what
is wrong with it.
"""

import re
from typing import NamedTuple

from distill.reasoning import CLOSE, OPEN, split_reasoning

_PAIRS = (
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("◁think▷", "◁/think▷"),
)
_ANSWERS = (("<|begin_of_solution|>", "<|end_of_solution|>"), ("<answer>", "</answer>"))
_S1_BEGIN = re.compile(r"\s*(?:<\|im_start\|>)?think\n")
_S1_END = re.compile(r"\n(?:<\|im_start\|>)?answer\n")


class Parts(NamedTuple):
    text: str
    reasoning: str
    response: str


def join(reasoning: str, response: str) -> Parts:
    """A reply of two fields."""
    reasoning, response = _without_tags(reasoning), response.strip()
    return Parts(f"{reasoning}\n{CLOSE}\n\n{response}", reasoning, response)


def split(text: str, unmarked: str = "cut") -> Parts:
    """A reply of one field. Without any mark it is all reasoning if `unmarked` is 'cut', all response if 'answer'."""
    if CLOSE in text or text.lstrip().startswith(OPEN):
        reasoning, response = split_reasoning(text)
        inside = _unwrapped(response)
        if inside != response and text.count(CLOSE) == 1:
            return join(reasoning, inside)
        return Parts(text, reasoning, response)
    for begin, end in _PAIRS:
        if text.lstrip().startswith(begin):
            before, close, after = text.lstrip()[len(begin) :].partition(end)
            if not close:
                return Parts(before.strip(), before.strip(), "")
            return join(before, _unwrapped(after.strip()))
    if begins := _S1_BEGIN.match(text):
        ends = list(_S1_END.finditer(text, begins.end() - 1))
        if not ends:
            return Parts(text[begins.end() :], text[begins.end() :].strip(), "")
        return join(text[begins.end() : max(begins.end(), ends[-1].start())], text[ends[-1].end() :])
    if unmarked == "answer":
        return join("", _unwrapped(text.strip()))
    return Parts(text, text.strip(), "")


def _without_tags(reasoning: str) -> str:
    return reasoning.strip().removeprefix(OPEN).removesuffix(CLOSE).strip()


def _unwrapped(response: str) -> str:
    """The response out of its tags, if those enclose all of it; a closing one may be missing."""
    for begin, end in _ANSWERS:
        if response.startswith(begin):
            return response.removeprefix(begin).removesuffix(end).strip()
    return response
