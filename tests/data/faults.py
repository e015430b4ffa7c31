"""The faults put into copies of real traces, each with the filters that should reject it for that.

Some are there to be passed: a quotation in another language, a passage said once more, an answer in another form.
Some are known to be hard: they are labelled by what a reader would say, not by what the filters can see.
"""

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

Change = Callable[[str, str, random.Random], str]  # (text, reference answer, randomness) -> the faulty text
CLOSE = "</think>"
_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True)
class Fault:
    name: str
    change: Change
    fails: tuple[str, ...]  # filters
    near_copy: bool = False  # whether the copy is nearly its base: less than a tenth of the words changed
    long: bool = False  # wants a base of more than 600 words
    note: str = ""


def _halves(text: str) -> tuple[str, str]:
    before, _, after = text.partition(CLOSE)
    return before, after


def _sentence_ends(text: str) -> list[int]:
    """Where sentences of prose end, away from both ends of the text."""
    return [m.end() for m in re.finditer(r"[a-z]\. (?=[A-Z])", text) if 0.1 < m.end() / len(text) < 0.9]


def _insert(piece: str) -> Change:
    """After some sentence of the reasoning."""

    def change(text: str, _: str, pick: random.Random) -> str:
        before, after = _halves(text)
        at = pick.choice(_sentence_ends(before) or [before.index("\n\n") + 2])
        return f"{before[:at]}{piece} {before[at:]}{CLOSE}{after}"

    return change


def _mixed_word(word: str) -> Change:
    """In place of a word of the reasoning, without blanks, as s1.1 does."""

    def change(text: str, _: str, pick: random.Random) -> str:
        before, after = _halves(text)
        places = [m.span() for m in re.finditer(r" (?:then|that|and|total|number|need) ", before)]
        begin, end = pick.choice(places)
        return f"{before[:begin]} {word}{before[end:]}{CLOSE}{after}"

    return change


def _last_paragraphs(piece: str) -> Change:
    def change(text: str, _: str, pick: random.Random) -> str:
        before, after = _halves(text)
        return f"{before.rstrip()}\n\n{piece}\n{CLOSE}{after}"

    return change


def _response(piece: str) -> Change:
    """The whole response replaced; ANSWER stands for the reference answer."""
    return lambda text, answer, pick: f"{_halves(text)[0]}{CLOSE}\n\n{piece.replace('ANSWER', answer)}"


def _loop_sentence(times: int) -> Change:
    def change(text: str, _: str, pick: random.Random) -> str:
        before, after = _halves(text)
        ends = _sentence_ends(before)
        spans = [(a, b) for a, b in itertools.pairwise(ends) if 50 < b - a < 250]
        begin, end = pick.choice(spans)
        return f"{before[:end]}{before[begin:end] * (times - 1)}{before[end:]}{CLOSE}{after}"

    return change


def _loop_paragraph(times: int) -> Change:
    def change(text: str, _: str, pick: random.Random) -> str:
        before, after = _halves(text)
        parts = before.split("\n\n")
        at = pick.choice(sorted(range(len(parts)), key=lambda n: -len(parts[n]))[:3])
        return "\n\n".join([*parts[:at], *[parts[at]] * times, *parts[at + 1 :]]) + f"{CLOSE}{after}"

    return change


def _loop_to_the_end(words: int, times: int) -> Change:
    """From some place on only the last words again and again, until the tokens were used up."""

    def change(text: str, _: str, pick: random.Random) -> str:
        said = _halves(text)[0].split(" ")
        at = pick.randrange(len(said) // 2, len(said) - 5)
        return " ".join(said[:at] + said[at - words : at] * times)

    return change


def _loop_pair(text: str, _: str, pick: random.Random) -> str:
    pair = "Wait, maybe I read the question wrong. No, I read it right, so the first result stands. "
    return _insert((pair * 7).rstrip())(text, _, pick)


def _counting(text: str, _: str, pick: random.Random) -> str:
    lines = [f"Let me check case {n}: with {n} of them it does not work either, so we go on." for n in range(1, 31)]
    return _insert("\n".join(lines))(text, _, pick)


def _response_again(text: str, _: str, pick: random.Random) -> str:
    before, after = _halves(text)
    return f"{before}{CLOSE}{f'{after.rstrip()}{chr(10) * 2}' * 3}".rstrip()


def _cut_reasoning(text: str, _: str, pick: random.Random) -> str:
    before = _halves(text)[0]
    return before[: pick.randrange(len(before) // 3, len(before) - 50)]


def _cut_response(keeps: Callable[[str, re.Match[str]], bool], pattern: str) -> Change:
    """At a match of `pattern` before the first box."""

    def change(text: str, _: str, pick: random.Random) -> str:
        before, after = _halves(text)
        body = after[: after.index("\\boxed")]
        places = [m for m in re.finditer(pattern, body) if m.start() > 20 and keeps(body, m)]
        return f"{before}{CLOSE}{after[: pick.choice(places).end()]}"

    return change


def _in_prose(body: str, found: re.Match[str]) -> bool:
    begin = body[: found.end()]
    return begin.count("\\[") == begin.count("\\]") and begin.count("\\(") == begin.count("\\)")


def _in_formula(body: str, found: re.Match[str]) -> bool:
    return not _in_prose(body, found)


def _no_response(text: str, _: str, pick: random.Random) -> str:
    return f"{_halves(text)[0]}{CLOSE}"


def _at_end(piece: str) -> Change:
    return lambda text, _, pick: text.rstrip() + piece


def _before_response(piece: str) -> Change:
    return lambda text, _, pick: f"{_halves(text)[0]}{CLOSE}{piece}{_halves(text)[1]}"


def _around_response(begin: str, end: str) -> Change:
    return lambda text, _, pick: f"{_halves(text)[0]}{CLOSE}\n\n{begin}{_halves(text)[1].strip()}{end}"


def _box(made: Callable[[str], str]) -> Change:
    """Every box of the response."""

    def change(text: str, answer: str, pick: random.Random) -> str:
        before, after = _halves(text)
        return f"{before}{CLOSE}{_BOX.sub(lambda found: made(found.group(1)), after)}"

    return change


def _merged(low: int, high: int) -> Change:
    """The paragraphs of the reasoning run into one, from its `low` tenth to its `high` tenth."""

    def change(text: str, _: str, pick: random.Random) -> str:
        before, after = _halves(text)
        begin, end = len(before) * low // 10, len(before) * high // 10
        return before[:begin] + re.sub(r"\s*\n\s*", " ", before[begin:end]) + before[end:] + CLOSE + after

    return change


def _number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text) or 0)


_PYTHON = "```python\ntotal = 0\nfor n in range(1, 11):\n    total += n\nprint(total)\n```"
_LOST = ("correctness", "format", "truncation")
_SENTENCES = {
    "Chinese": "等一下，我需要再检查一遍这个计算，看看有没有算错。",
    "Russian": "Подождите, нужно ещё раз проверить вычисления, чтобы не ошибиться.",
    "French": "Attendez, je dois encore vérifier le calcul parce que je ne suis pas sûr du résultat.",
    "Spanish": "Espera, tengo que comprobar otra vez la cuenta porque no estoy seguro de que sea correcta.",
    "German": "Warte, ich muss die Rechnung noch einmal prüfen, weil ich mir nicht sicher bin, ob sie stimmt.",
    "Japanese": "ちょっと待って、計算が正しいかどうかもう一度確認しましょう。",
    "Korean": "잠깐만요, 계산이 맞는지 다시 한번 확인해 보겠습니다.",
    "Arabic": "انتظر، يجب أن أتحقق من الحساب مرة أخرى قبل أن أكتب الجواب.",
}
_FRENCH = (
    "Donc, pour résumer, nous avons trouvé le résultat en suivant les étapes dans l'ordre. Il faut encore vérifier que "
    "chaque étape est correcte, mais je pense que c'est le cas. La réponse est donc celle que nous avons calculée."
)
_CHINESE = "根据题意，我们一步一步计算，把每一部分加起来，就得到最后的结果。所以答案是 \\boxed{ANSWER}。"

FAULTS: tuple[Fault, ...] = (
    *(Fault(f"a sentence of {n}", _insert(s), ("language",), near_copy=True) for n, s in _SENTENCES.items()),
    *(
        Fault("one foreign word", _mixed_word(word), ("language",), near_copy=True, note=f"'{word}'")
        for word in ("然后", "所以", "分配", "因此", "следовательно ")
    ),
    Fault("the last paragraph in French", _last_paragraphs(_FRENCH), ("language",)),
    Fault("the response in Chinese", _response(_CHINESE), ("language",)),
    Fault("a quotation", _insert("In Spanish one would ask '¿cuántos quedan?', how many are left."), (), True),
    Fault("a quotation", _insert("A German would call this a Zwischenergebnis, an intermediate result."), (), True),
    *(Fault("a sentence again and again", _loop_sentence(times), ("repetition",)) for times in (5, 8, 20)),
    *(Fault("a paragraph again and again", _loop_paragraph(times), ("repetition",)) for times in (3, 4, 6)),
    *(
        Fault("a loop to the end", _loop_to_the_end(words, 40), ("repetition", *_LOST, *also))
        for words, also in ((1, ()), (5, ()), (12, ("readability",)))  # the last is a paragraph of 500 words too
    ),
    Fault("two sentences in turn", _loop_pair, ("repetition",)),
    *(Fault("a loop with a number that counts", _counting, ("repetition",)) for _ in range(2)),
    Fault("the response three times", _response_again, ("repetition",)),
    *(Fault("a paragraph said twice", _loop_paragraph(2), (), note="a check") for _ in range(2)),
    *(Fault("cut in the reasoning", _cut_reasoning, _LOST) for _ in range(3)),
    *(Fault("cut within a sentence", _cut_response(_in_prose, r"[a-z] "), _LOST) for _ in range(5)),
    *(Fault("cut in a formula", _cut_response(_in_formula, r"[\d}] "), _LOST) for _ in range(2)),
    *(Fault("cut after a sentence", _cut_response(_in_prose, r"\.\s"), _LOST) for _ in range(2)),
    Fault("cut after the thinking", _no_response, _LOST),
    *(
        Fault("a template token at the end", _at_end(token), ("format",), near_copy=True, note=token)
        for token in ("<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>")
    ),
    Fault("a template token in the reasoning", _insert("<|im_start|>assistant"), ("format",), near_copy=True),
    Fault("a template token in the reasoning", _insert("[/INST]"), ("format",), near_copy=True),
    Fault("thinking opened again", _insert("<think>"), ("format",), near_copy=True),
    Fault("thinking closed twice", _before_response(f"\n\n{CLOSE}"), ("format",), near_copy=True),
    Fault("tags round the answer", _around_response("<answer>", "</answer>"), ("format",), near_copy=True),
    Fault(
        "a turn of the user made up",
        _at_end("\n\nHuman: And what is half of that?"),
        ("format",),
        near_copy=True,
        note="no token, only words",
    ),
    Fault("a role's name", _before_response("\n\nassistant\n\n"), ("format",), near_copy=True, note="no token"),
    *(
        Fault("another answer", _box(lambda said, by=by: f"\\boxed{{{_number(said) + by:g}}}"), ("correctness",), True)
        for by in (1, 10, -2, 0.5)
    ),
    Fault("the box emptied", _box(lambda said: "\\boxed{}"), ("correctness", "format"), near_copy=True),
    *(
        Fault("the box taken off", _box(lambda said: f"**{said}**"), ("format",), True, note="the answer still stands")
        for _ in range(2)
    ),
    Fault("no answer", _response("This follows from the steps above."), ("correctness", "format")),
    Fault("another answer after it", _at_end("\n\nOr rather \\boxed{12345}."), ("correctness",), near_copy=True),
    *(
        Fault("the answer in another form", _box(made), (), near_copy=True)
        for made in (
            lambda said: f"\\boxed{{{_number(said):.2f}}}",
            lambda said: f"\\boxed{{\\dfrac{{{_number(said) * 3:g}}}{{3}}}}",
            lambda said: f"\\boxed{{x = {said}}}",
            lambda said: f"\\boxed{{{said}\\text{{ pieces}}}}",
        )
    ),
    *(Fault("paragraphs run together", _merged(0, 10), ("readability",), near_copy=True, long=True) for _ in range(4)),
    Fault("a block of code", _insert(f"\n\n{_PYTHON}\n\n"), ("readability",), near_copy=True, long=True),
    Fault("a block of code", _before_response(f"\n\n{_PYTHON}\n\n"), ("readability",), near_copy=True, long=True),
    Fault(
        "code without a fence",
        _insert("\n\nimport math\nx = [n ** 2 for n in range(10)]\nprint(sum(x))\n\n"),
        ("readability",),
        near_copy=True,
        long=True,
        note="no fence",
    ),
    *(Fault("two paragraphs run together", _merged(4, 6), (), True, note="still short") for _ in range(2)),
    Fault("an inline formula in code type", _insert("So `x = 3 * 4` here."), (), near_copy=True),
    Fault("a table", _before_response("\n\n| step | value |\n|---|---|\n| first | 3 |\n\n"), (), near_copy=True),
)
