"""Decontamination: what is found in evaluation sets and how, what is left alone, and the proof of it."""

import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from distill import filtering
from distill.filters import decontamination
from distill.filters.benchmarks import Index, clean_words
from distill.identity import problem_hash
from distill.recipe import DecontaminationFilter, ProblemSource
from tests.distill.small_run import make_recipe, open_run, problem, trace

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="no benchmarks (DISTILL_DATA)")

ITEMS = [
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends "
    "every day with four. She sells the remainder for $2 per egg. How much does she make every day?",
    "What is the value of $\\dfrac{1}{2} + \\left(3\\right)^2$?",
    "Compute 17 times 23 exactly.",
    "Solve x + 1 = 2.",
    "Let $ABC$ be a triangle with $AB = 13$, $BC = 14$, and $CA = 15$. Find the area of triangle $ABC$.",
]


def index(tmp_path, items=ITEMS, **chosen):
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in items))
    return DecontaminationFilter(against=[ProblemSource(source=str(path))], **chosen)


def find(settings, text):
    [words] = clean_words([text])
    match = Index(settings).find(words)
    return match and (match.how, match.item)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ITEMS[0], ("same text", 1)),
        (ITEMS[0].upper().replace(" ", "\n  "), ("same text", 1)),
        ("What is the value of $\\frac{1}{2} + (3)^2$", None),  # \frac for \dfrac is another word: nearly the same
        ("what is the value of \\dfrac{1}{2}+(3)^2", ("same text", 2)),
        ("Here is a puzzle that I found. " + ITEMS[0] + " Show all of your work.", ("part of the text", 1)),
        (ITEMS[0].split(". ", 1)[1], ("part of the text", 1)),
        ("First do this: compute 17 times 23 exactly. Then tell me a joke.", ("part of the text", 3)),
        (ITEMS[0].replace("eats", "has").replace("muffins", "cakes"), ("part of the text", 1)),
        (ITEMS[0].replace("16", "21").replace("three", "five").replace("$2", "$3.50"), ("other numbers", 1)),
        (ITEMS[4].replace("13", "5").replace("14", "12").replace("15", "13"), ("other numbers", 5)),
        ("Solve x + 1 = 2.", ("same text", 4)),
        ("Solve x + 1 = 3.", None),  # a drill with other numbers is another drill
        ("Compute 18 times 24 exactly.", None),
        ("A farmer has ducks that lay eggs. How much does she make every day if she sells them?", None),
        ("", None),
        ("$$ + = $$", None),
    ],
)
def test_how_an_item_is_found(tmp_path, text, expected):
    found = find(index(tmp_path), text)
    assert found == expected or (text.startswith("What is the value of $\\frac") and found == ("nearly the same", 2))


def test_settings(tmp_path):
    variant = ITEMS[4].replace("13", "5").replace("14", "12").replace("15", "13")
    assert find(index(tmp_path, numbers=False), variant) is None
    part = "I know this much: " + " ".join(ITEMS[0].split()[:14]) + ". What could one ask about it, and why?"
    assert find(index(tmp_path), part) is None
    assert find(index(tmp_path, max_overlap=0.1), part) == ("part of the text", 1)


def run_folder(tmp_path, texts):
    folder = tmp_path / "run"
    (folder / "traces").mkdir(parents=True)
    asked = [problem(text) for text in texts]
    rows = [trace(of, f"Thought {k}.\n</think>\n\n\\boxed{{4}}", k) for of in asked for k in range(2)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(of) + "\n" for of in asked))
    (folder / "traces" / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_hit_is_listed_with_both_texts_and_the_card_has_the_proof(tmp_path):
    settings = index(tmp_path)
    variant = ITEMS[4].replace("13", "5")
    texts = [ITEMS[0], variant, "How many legs do three dogs have?"]
    folder = run_folder(tmp_path, texts)
    recipe = make_recipe(filters={"decontamination": settings.model_dump()})
    with open_run(folder, recipe) as run:
        assert filtering.run(recipe, run)["accepted"] == 2
        manifest = run.manifest.data["decontamination"]
    hits = [json.loads(line) for line in (folder / "contamination.jsonl").read_text().splitlines()]
    assert [(h["problem"], h["evaluation_problem"], h["how"], h["row"]) for h in hits] == [
        (ITEMS[0], ITEMS[0], "same text", 1),
        (variant, ITEMS[4], "other numbers", 5),
    ] or hits[1]["how"] in ("part of the text", "nearly the same")
    assert manifest["dropped"] == 2 and manifest["problems"] == 3 and sum(manifest["hits"].values()) == 2
    import hashlib

    expected = hashlib.sha256("\n".join(sorted(map(problem_hash, ITEMS))).encode()).hexdigest()
    card = (folder / "dataset" / "README.md").read_text()
    assert f"| bench.jsonl | 5 | `{expected}` |" in card and "2 problems were dropped" in card
    funnel = json.loads((folder / "funnel.json").read_text())
    [row] = [row for row in funnel if row["filter"] == "decontamination"]
    assert (row["in"], row["out"], row["problems_in"], row["problems_out"]) == (6, 2, 3, 1)


def test_an_edited_evaluation_set_is_compared_anew(tmp_path):
    settings = index(tmp_path)
    folder = run_folder(tmp_path, ["How many legs do three dogs have altogether?", "Name a prime."])
    recipe = make_recipe(filters={"decontamination": settings.model_dump()})
    with open_run(folder, recipe) as run:
        assert filtering.run(recipe, run)["accepted"] == 4
    index(tmp_path, [*ITEMS, "How many legs do three dogs have altogether?"])
    with open_run(folder, recipe) as run:
        assert filtering.run(recipe, run)["accepted"] == 2


def test_verdicts_shorten_long_texts(tmp_path):
    settings = index(tmp_path)
    of = problem(ITEMS[0])
    [said] = decontamination.check([trace(of)], {of["id"]: of}, settings)
    assert not said.passed and said.reason.startswith("same text (1.00) as bench.jsonl, row 1: 'Janet's ducks")
    assert len(said.reason) < 200


def texts(name):
    path = DATA / "benchmarks" / name
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return [json.loads(line)["problem"] for line in file]


@needs_data
def test_real_sets():
    names = ("gsm8k_test.jsonl", "math500.jsonl", "aime24.jsonl")
    settings = DecontaminationFilter(against=[ProblemSource(source=str(DATA / "benchmarks" / name)) for name in names])
    found = Index(settings)

    def hits(problems):
        return [found.find(words) for words in clean_words(problems)]

    own = hits([text for name in names for text in texts(name)])
    assert all(match is not None and match.how == "same text" for match in own)
    # GSM8K's training set is clean but for a problem in the same words; MATH's has variants of test problems.
    train = Counter(match.how for match in hits(texts("gsm8k_train.jsonl.gz")[:2000]) if match)
    assert sum(train.values()) <= 2
    pick = random.Random(0)
    numbered = [text for text in texts("gsm8k_test.jsonl") if len(text.split()) > 15][:200]
    other = ["".join(str(pick.randrange(2, 90)) if c.isdigit() else c for c in text) for text in numbered]
    assert sum(match is not None for match in hits(other)) >= 0.98 * len(other)
    spliced = [" ".join(["Read this and answer at the end.", *text.split()]) for text in numbered]
    assert all(match is not None for match in hits(spliced))
