r"""Write labelled_problems.jsonl.gz and labelled_samples.jsonl.gz: for the filters that look beyond one trace.

    python -m tests.data.make_labelled_problems      needs DISTILL_DATA, default ../shared/data

Problems, for `decontamination`: some of GSM8K's test split and MATH-500 as the evaluation set; training problems at
random and those nearest to it, read by hand; copies of evaluation problems with one known change each. Samples, for
`agreement` and `outliers`: four models' final answers and lengths on 323 problems, and lengths of circles. Same data,
same files: every choice is drawn from one seed.
"""

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evals.grading import extract_answer, grade
from tests.data.make_labelled_traces import DATA, HERE, SOURCE, real_rows

Row = dict[str, Any]
Change = Callable[[str, random.Random], str]

PROBLEMS, SAMPLES = HERE / "labelled_problems.jsonl.gz", HERE / "labelled_samples.jsonl.gz"
ORIGIN = {
    "gsm8k_test": ("openai/grade-school-math@3101c7d50724, test", "MIT"),
    "math500": ("openai/prm800k (MATH-500)", "MIT"),
    "gsm8k_train": ("openai/grade-school-math@3101c7d50724, train", "MIT"),
    "math_train_problems": ("hendrycks/math, train", "MIT"),
}
NAMES = ("Ioana", "Kwame", "Sigrid", "Tomasz", "Anjali")
_NOT_NAMES = {"If", "The", "How", "What", "In", "A", "An", "He", "She", "It", "They", "There", "Find", "Each",
              "On", "For", "When", "After", "Let", "His", "Her", "One", "Two", "Then", "At", "To", "Of"}  # fmt: skip


def _typeset(text: str, _: random.Random) -> str:
    return "  ".join(re.sub(r"\$([^$]+)\$", r"\\(\1\\)", text).split()).upper()


def _asked(text: str, _: random.Random) -> str:
    return (
        f"You are a careful tutor. Solve the problem below step by step.\n\nProblem: {text}\n\nBefore you answer, "
        "check each step. Put your final answer within \\boxed{}."
    )


def _numbers(text: str, pick: random.Random) -> str:
    return re.sub(r"\d+", lambda m: str(int(m.group()) + pick.randint(1, 9)), text)


def _names(text: str, pick: random.Random) -> str:
    found = {w for w in re.findall(r"\b[A-Z][a-z]{2,}\b", text) if w not in _NOT_NAMES}
    new = dict(zip(sorted(found), pick.sample(NAMES, len(NAMES)), strict=False))
    return re.sub(r"\b[A-Z][a-z]{2,}\b", lambda m: new.get(m.group(), m.group()), text)


def _dropped(text: str, pick: random.Random) -> str:
    """Every twentieth word or so is missing."""
    return " ".join(word for word in text.split() if pick.random() > 0.05)


def _two(text: str, pick: random.Random) -> str:
    """As the second part of a longer exercise."""
    return (
        "Part (a). A farmer keeps 12 hens and each hen lays 5 eggs a week. He sells the eggs by the dozen on Saturdays "
        f"and keeps the rest for his family. How many full dozens can he sell each week?\n\nPart (b). {text}"
    )


def _half(text: str, _: random.Random) -> str:
    words = text.split()
    return " ".join(words[: len(words) // 2 + 1])


CHANGES: dict[str, Change] = {
    "the same": lambda text, _: text,
    "capitals, blanks, typesetting": _typeset,
    "an instruction around it": _asked,
    "other numbers": _numbers,
    "other names": _names,
    "a twentieth of the words dropped": _dropped,
    "the second part of a longer exercise": _two,
    "its first half": _half,
}
EACH = 12


def problems_of(name: str) -> list[str]:
    path = next(DATA.glob(f"benchmarks/{name}.jsonl*"))
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        found = [json.loads(line)["problem"] for line in file]
    return [text for text in found if "[asy]" not in text and len(text.split()) >= 8]


def triples(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def nearest(training: list[tuple[str, str]], evaluation: list[str], count: int) -> list[tuple[str, str]]:
    """The training problems with the most word triples in common with one of the evaluation set."""
    there = [triples(text) for text in evaluation]

    def likeness(item: tuple[str, str]) -> float:
        own = triples(item[1])
        return max(len(own & other) / max(1, len(own | other)) for other in there)

    return sorted(training, key=lambda item: (-likeness(item), item[1]))[:count]


def labelled_problems() -> Iterator[Row]:
    pick = random.Random(20261124)
    evaluation = [(name, text) for name in ("gsm8k_test", "math500") for text in pick.sample(problems_of(name), 75)]
    training = [(name, text) for name in ("gsm8k_train", "math_train_problems") for text in problems_of(name)]

    def row(part: str, name: str, text: str, contaminated: bool, base: str | None = None, change: str = "") -> Row:
        source, licence = ORIGIN[name]
        return {"part": part, "problem": text, "contaminated": contaminated, "base": base, "change": change,
                "source": source, "licence": licence}  # fmt: skip

    for name, text in evaluation:
        yield row("evaluation", name, text, True)
    for change, made in CHANGES.items():
        for name, text in pick.sample(evaluation, EACH):
            new = made(text, pick)
            if new != text or change == "the same":  # a problem without names keeps its own
                yield row("copy", name, new, True, text, change)
    for begins, reworded in REWORDED.items():
        [(name, text)] = [item for item in evaluation if item[1].startswith(begins)]
        yield row("copy", name, reworded, True, text, "other words, by hand")
    close = nearest(training, [text for _, text in evaluation], 40)
    for name, text in close:
        yield row("nearest", name, text, text.startswith(SAME_WITH_OTHER_NUMBERS), None)
    for name, text in pick.sample([item for item in training if item not in close], 100):
        yield row("random", name, text, False)


# Of the nearest training problems, those that are an evaluation problem with other numbers. Read by hand; another
# function in the equation, another question about it, two numbers in place of three make another problem.
SAME_WITH_OTHER_NUMBERS = (
    "The set of vectors $\\mathbf{v}$ such that\n\\[\\operatorname{proj}_{\\begin{pmatrix} 5",
    "A reflection takes $\\begin{pmatrix} -1",
    "The quadratic $x^2-20x+36$",
    "How many $y$-intercepts does the graph of the parabola $x = 2y^2",
    "Find the quotient when $x^5 + 7$",
    "The asymptotes of a hyperbola are $y = x + 1$",
    "Find the greatest common divisor of 9118",
)
# Evaluation problems, by their beginning, as another author would ask them.
REWORDED = {
    "Annabelle is saving for a phone": (
        "A girl wants a $400 telephone and owns $80 so far. She works 20 hours at $10 each in one place and 15 hours "
        "at $5 each in another. How many dollars are missing?"
    ),
    "Andrew bakes 200 mini cinnamon rolls": (
        "Small pastries have a third of the calories of large ones. Large rolls with cinnamon come to 600 calories, "
        "large muffins with blueberries to 450. What do 200 small rolls and 300 small muffins come to together?"
    ),
    "Mark decides to buy packs of old magic cards": (
        "A collector pays $1800 for each of three packs. In them are one card that sells for $4000, one for $1000, and "
        "thirty others that bring $50 apiece on average. What does he earn in the end?"
    ),
    "Howie wants to buy cupcakes": (
        "In a class of 25 pupils and a teacher a boy hands out sweets: everybody, himself included, gets a vanilla and "
        "a chocolate one. What is the number of sweets he needs?"
    ),
    "In how many ways can 6 girls and 2 boys sit": (
        "Eight children, two of them boys, take eight chairs in a line. Count the arrangements where the boys "
        "are neighbours."
    ),
    "Let $ABCD$ be a regular tetrahedron with side length 2": (
        "All edges of a triangular pyramid have length 2. It is cut in two by the plane that is parallel to a pair of "
        "opposite edges and equally far from both. Determine the total area of the faces of either part."
    ),
    "The volume of a cone is given by the formula": (
        "A cone 6.5 units high stands on a base of 30 square units. How large is its volume, in cubic units?"
    ),
    "Find the greatest common divisor of $3339$": "Which is the largest integer that divides 3339, 2961 and 1491?",
}


def labelled_samples() -> Iterator[Row]:
    """`right`: the box holds the reference, None without a box. `circles`: how often the reasoning is gone round."""
    by_problem: dict[str, list[Row]] = {}
    for identity, row in real_rows().items():
        model, _, key = identity.partition("/")
        reasoning, _, response = row["text"].partition("</think>")
        boxed = extract_answer(response)
        right = None if boxed is None else grade(f"\\boxed{{{boxed}}}", row["answer"]).verdict == "correct"
        sample = {
            "problem": key, "model": model, "reference": row["answer"], "boxed": boxed, "right": right,
            "reasoning_tokens": len(reasoning) // 4, "circles": 1, "source": SOURCE, "licence": "MIT",
        }  # fmt: skip
        by_problem.setdefault(row["problem"], []).append(sample)
    pick = random.Random(20261125)
    for samples in by_problem.values():
        yield from samples
    for circles in (3, 5, 8, 16):
        for samples in pick.sample(list(by_problem.values()), 25):
            place = pick.randrange(len(samples))
            for number, sample in enumerate(samples):
                times = circles if number == place else 1
                tokens = times * sample["reasoning_tokens"]
                changed = {"problem": f"{sample['problem']} x{circles}", "circles": times, "reasoning_tokens": tokens}
                yield sample | changed


def write(path: Path, rows: Iterator[Row]) -> None:
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    write(PROBLEMS, labelled_problems())
    write(SAMPLES, labelled_samples())
