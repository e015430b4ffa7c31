r"""The exact path against math-verify: never the opposite verdict, on made-up and on real answers."""

import gzip
import json
import os
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.grading import grade, grade_many
from evals.grading.exact import exactly_equal
from evals.grading.pool import Pool
from evals.grading.worker import compare

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))
SMALL = st.integers(-12, 12)
UNITS = ("", r"\text{ meters}", r" \text{ cm}", r"\,\text{hours}", r"^\circ", r"\text{ apples}")


@st.composite
def numbers(draw):
    """One value in one of the ways that people write it. Whole percentages are written elsewhere."""
    n = draw(SMALL)
    way = draw(st.sampled_from(["int", "commas", "decimal", "slash", "frac", "frac sign", "mixed", "power", "times"]))
    if way == "int":
        return draw(st.sampled_from([f"{n}", f" {n} ", f"+{abs(n)}", f"${n}$"]))
    if way == "commas":
        return draw(st.sampled_from([f"{n * 1000:,}", f"{n * 1000}", f"{n * 1000:,}".replace(",", "{,}")]))
    if way == "decimal":
        return f"{n / 4:.{draw(st.sampled_from([2, 3]))}f}"
    d = draw(st.sampled_from([1, 2, 3, 4, 8]))
    if way == "slash":
        return f"{n}/{d}"
    if way == "frac":
        return draw(st.sampled_from([r"\frac", r"\dfrac", r"\tfrac"])) + f"{{{n}}}{{{d}}}"
    if way == "frac sign":
        return f"{'-' if n < 0 else ''}\\frac{{{abs(n)}}}{{{d}}}"
    if way == "mixed":
        return f"{1 + abs(n)}\\frac{{1}}{{{d + 1}}}"
    if way == "power":
        return f"{draw(st.integers(2, 4))}^{{{draw(st.integers(0, 5))}}}"
    return f"{n} \\times 10^{{{draw(st.integers(1, 3))}}}"


@st.composite
def quantities(draw):
    shape = draw(st.sampled_from(["unit", "money", "percent", "variable"]))
    value = draw(numbers()).strip(" $")
    if shape == "unit":
        return value + draw(st.sampled_from(UNITS))
    if shape == "money":
        return f"\\${abs(draw(SMALL))}" + draw(st.sampled_from(["", ".00", ".50"]))
    if shape == "percent":
        return f"{abs(draw(SMALL))}" + draw(st.sampled_from([r"\%", "%", ""]))
    return f"x = {value}"


@st.composite
def sequences(draw):
    # Without separators of thousands, as in matrices: math-verify reads {0, 1,000} as {0, 1}.
    elements = [draw(numbers()).strip(" $+") for _ in range(draw(st.integers(2, 4)))]
    elements = [re.sub(r"(?<=\d)(?:\{,\}|,)(?=\d)", "", e) for e in elements]
    joined = draw(st.sampled_from([", ", ",  ", r",\ "])).join(elements)
    opening, closing = draw(
        st.sampled_from(["()", "[]", "[)", "(]", ("\\{", "\\}"), ("", ""), (r"\left(", r"\right)")])
    )
    if opening + closing in ("[)", "(]"):
        joined = ", ".join(elements[:2])
    return opening + joined + closing


@st.composite
def matrices(draw):
    kind = draw(st.sampled_from(["pmatrix", "bmatrix"]))
    rows, columns = draw(st.sampled_from([(1, 2), (2, 1), (2, 2)]))
    # Without separators of thousands: of a matrix with one, math-verify reads the last number alone.
    cells = [
        [re.sub(r"(?<=\d)(?:\{,\}|,)(?=\d)", "", draw(numbers()).strip(" $+")) for _ in range(columns)]
        for _ in range(rows)
    ]
    body = r" \\ ".join(" & ".join(row) for row in cells)
    return f"\\begin{{{kind}}} {body} \\end{{{kind}}}"


def opposite(answer: str, reference: str) -> bool:
    decided = exactly_equal(answer, reference)
    if decided is None:
        return False
    verdict = compare(answer, reference)[0]
    return verdict == ("wrong" if decided else "correct")


@settings(max_examples=250, deadline=None)
@given(numbers(), numbers())
def test_numbers_never_get_the_opposite_of_math_verify(answer, reference):
    assert not opposite(answer, reference)


@settings(max_examples=200, deadline=None)
@given(quantities(), quantities())
def test_quantities_never_get_the_opposite_of_math_verify(answer, reference):
    assert not opposite(answer, reference) or _deliberate(answer, reference)


@settings(max_examples=120, deadline=None)
@given(sequences(), sequences(), st.randoms(use_true_random=False))
def test_sequences_never_get_the_opposite_of_math_verify(answer, reference, rng):
    assert not opposite(answer, reference)
    assert not opposite(reference, reference)
    inner = reference.strip("()[]")
    if "\\" not in inner and not re.search(r"\d,\d", inner):  # the same elements in another order
        parts = inner.split(",")
        rng.shuffle(parts)
        assert not opposite(reference.replace(inner, ",".join(parts)), reference)


@settings(max_examples=80, deadline=None)
@given(matrices(), matrices())
def test_matrices_never_get_the_opposite_of_math_verify(answer, reference):
    assert not opposite(answer, reference)
    assert exactly_equal(reference, reference) is True


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("2 1", "21", None), (r"2\,1", "21", None), ("12 345", "12345", True), ("1 1/2", "3/2", True),
        ("5 m", "5 cm", False), ("5 cm", "50 mm", True), ("0.05 m", "5 cm", True), ("5m", "5", None),
        ("5 km", "5", True), ("(1,2, 3)", "(1, 2, 3)", True), ("(1,2, 1/3)", "(1, 2, 0.333333)", None),
        ("(1, 2,000)", "(1, 2000)", True),
        (r"\neq 5", "5", False), (r"x \ne 5", "5", False), ("≠5", "5", False), (r"x \neq 5", r"x \neq 5", True),
        (r"x=5 \lor x=6", "6", False), (r"5 \vee 6", "6", False), (r"\geq 5", "5", False), ("> 5", "5", False),
        (r"5 \text{ or more}", "5", False), (r"\text{at least } 5", "5", False), ("6 // 5", "5", False),
        ("|-5|", "5", None), (r"5 \text{ more}", "5", True), (r"\Rightarrow 5", "5", None),
        ("1e5", "100000", True), ("1E5", "100,000", True), ("1.5e-3", "0.0015", True), ("1e5", "10000", False),
        ("2e-1", "0.2", None), ("2e+1", "20", None),
        ("½", "0.5", True), ("1½", "3/2", True), ("5²", "25", True), ("5²", "52", False),
        (r"\varnothing", r"\emptyset", True), ("∅", r"\emptyset", True),
    ],
)  # fmt: skip
def test_what_one_may_write_to_be_taken_for_right(answer, reference, equal):
    assert exactly_equal(answer, reference) is equal
    assert equal is not None or grade(f"\\boxed{{{answer}}}", reference).verdict == VERDICTS.get(answer, "wrong")


VERDICTS = {
    "5m": "correct",
    "|-5|": "correct",
    r"5 \text{ more}": "correct",
    r"\Rightarrow 5": "correct",
    "(1,2, 1/3)": "correct",
}  # metres, where no unit was asked for; a rounded third


def test_separators_of_thousands_in_sequences_are_read_where_a_space_tells_them_apart():
    assert exactly_equal(r"\{0, 1\}", r"\{0, 1,000\}") is False
    assert exactly_equal(r"\{0, 1000\}", r"\{0, 1,000\}") is True
    assert exactly_equal("(1, 2)", "(1,002, 5)") is False
    assert exactly_equal("1,002", "(1,002)") is not True


def test_separators_of_thousands_in_matrices_are_read_where_math_verify_reads_the_last_number_alone():
    reference = r"\begin{pmatrix} 2{,}000 & \dfrac{0}{1} \end{pmatrix}"
    assert exactly_equal(r"\begin{pmatrix} 2,000 & 0 \end{pmatrix}", reference) is True
    assert exactly_equal(r"\begin{pmatrix} 1,000 & 2 \end{pmatrix}", reference) is False


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_compared_without_an_exception(answer, reference):
    assert exactly_equal(answer, reference) in (True, False, None)


def _deliberate(answer: str, reference: str) -> bool:
    """Where ours is another verdict on purpose; each has a case in the table below."""
    both = answer + reference
    whole = re.fullmatch(r"\d+\\?%", answer.strip()) and re.fullmatch(r"\d+\\?%", reference.strip())
    measured = sum(unit in both for unit in ("meters", "cm", "hours", "$"))
    return ("x" in both and "," in both) or ("%" in both and not whole) or measured > 1


# (answer, reference, ours): math-verify says the opposite.
DELIBERATE = [
    (r"12.5\%", "12.5", True),  # the sign is no difference for whole percentages, so neither here
    ("12.5", r"12.5\%", True),
    (r"5\text{ cm}", r"5\text{ m}", False),  # math-verify drops all units
    (r"2 cm", "2 m", False),
    (r"5\text{ cm}", r"5\text{ kg}", False),
    (r"2\text{ m}^3", r"2\text{ cm}^3", False),
    (r"5\text{ square meters}", r"5\text{ square feet}", False),
    (r"36\text{ km/h}", r"36\text{ m/s}", False),
    (r"36\text{ km per hour}", r"10\text{ m/s}", True),
    (r"3:30\text{ pm}", r"3:30\text{ am}", False),
    (r"2\text{ p.m.}", r"2\text{ a.m.}", False),
    ("2516_8", "2516_9", False),
    (r"2516_{\text{eight}}", "2516_8", True),
    (r"1,2,\ldots", "1,2", False),
    (r"0.1\overline{6}", r"\frac{1}{6}", True),
    (r"0.\overline{36}", r"\frac{4}{11}", True),
    (r"\textbf{(A)}\ 5", r"\text{(A)}", True),
    ("5 dollars", "5", True),
    ("1 1/2", "3/2", True),
    ("5.", "5", True),
    (r"1\,000", "1000", True),
    ("5 million", "5000000", True),
    (r"5\text{ dozen}", "60", True),
    (r"$ 9\text{ a.m.} $", r"9\text{ a.m.}", True),
    ("x = 1,000", "x = 1000", True),
]


@pytest.mark.parametrize(("answer", "reference", "ours"), DELIBERATE)
def test_where_ours_differs_from_math_verify_on_purpose(answer, reference, ours):
    assert exactly_equal(answer, reference) is ours
    assert (compare(answer, reference)[0] == "correct") is not ours  # else the case has no place here any more


@pytest.mark.parametrize(
    ("answer", "reference", "ours"),
    [
        (r"\$9,\!360", "9360", True),
        (r"5\text{ pounds}", r"\$5", None),  # of weight or of money
        (r"5\text{ ounces}", r"5\text{ ml}", None),  # of weight or of volume
        (r"2\text{ liters}", r"2000\text{ cm}^3", True),
        (r"2\text{ liters}", r"2000\text{ ml}", True),
        (r"0.\overline{3}", "0.3", False),
        ("10101_2", "10101", None),
        (r"\textbf{(A)}\ 5", r"\text{(B)}", False),
        (r"\text{(A), (B)}", r"\text{(A)}", None),
        (r"1, \ldots, 9", r"1, \ldots, 9", True),
        (r"5\text{ apples}", r"5\text{ fruits}", None),
        (r"\$18.00", "18", True),
        (r"280\ \text{feet}", "280", True),
        (r"1\text{ m}", r"100\text{ cm}", True),
        (r"2 \text{ hours}", r"120 \text{ minutes}", True),
        (r"72\, \text{Mb/h}", "72", True),
        (r"18\text{ hours and }48\text{ minutes}", "1128", None),
        (r"50\%", "50", True),
        (r"50\%", "0.5", True),
        (r"50\%", "51", False),
        ("B", r"\text{(B)}", True),
        ("C", r"\text{(B)}", False),
        ("1, 234", "1234", None),  # a list of two or a number
        ("1 1/2", "11/2", False),
        ("(1, 2)", "(2, 1)", False),
        ("1, 2", "2, 1", True),
        (r"\{1, 2, 2\}", "2, 1", True),
        ("(1, 2]", "(1, 2]", True),
        ("[1, 2)", "[1, 3)", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{bmatrix}0.5\\2\end{bmatrix}", True),
        ("x = 5", "5", True),
        ("x = 5", "y = 5", None),
        (r"6.02 \times 10^{3}", "6020", True),
        ("1000000", "1000001", False),
        ("0,111", "111", None),  # a decimal comma, or a list
        ("0.3333333", "1/3", None),
        ("5 million", "5", None),
    ],
)
def test_quantities_and_sequences(answer, reference, ours):
    assert exactly_equal(answer, reference) is ours


def _references() -> list[str]:
    files = ("math500.jsonl", "gsm8k_test.jsonl", "aime24.jsonl", "aime25.jsonl", "amc23.jsonl")
    if not (DATA / "benchmarks" / files[0]).is_file():
        pytest.skip(f"no benchmarks in {DATA}")
    found: list[str] = []
    for name in files:
        with (DATA / "benchmarks" / name).open(encoding="utf-8") as file:
            found += [json.loads(line)["answer"] for line in file]
    return found


def _perturbed(reference: str, rng: random.Random) -> str | None:
    """Another number in place of one digit, where a digit can be changed without leaving the value as it was."""
    digits = [m for m in re.finditer(r"\d", reference) if not re.search(r"(?:_|\\sqrt|\^)\{?$", reference[: m.start()])]
    if not digits:
        return None
    at = rng.choice(digits)
    return reference[: at.start()] + str((int(at.group()) + rng.randint(1, 8)) % 10) + reference[at.end() :]


def test_every_reference_is_correct_and_perturbed_wrong(monkeypatch):
    references = _references()
    with monkeypatch.context() as patch:  # without any help
        patch.setattr(Pool, "compare", lambda *_: pytest.fail("a reference against itself went to math-verify"))
        for reference in references:
            assert grade(f"\\boxed{{{reference}}}", reference).verdict == "correct", reference
    rng = random.Random(0)
    pairs = [(p, r) for r in references if (p := _perturbed(r, rng)) is not None]
    graded = grade_many([(f"\\boxed{{{p}}}", r, "math") for p, r in pairs])
    right = [pair for pair, g in zip(pairs, graded, strict=True) if g.verdict != "wrong"]
    # Only where the changed digit does not change the value, as 0.50 and 1/2 do not.
    assert [pair for pair in right if not _same_value(*pair)] == []
    assert len(pairs) > 1800


def _same_value(a: str, b: str) -> bool:
    def value(text: str) -> Fraction | None:
        plain = text.replace(",", "").replace("\\!", "")
        return Fraction(plain) if re.fullmatch(r"-?\d+(\.\d+)?", plain) else None

    return value(a) is not None and value(a) == value(b)


def test_real_answers_are_graded_as_math_verify_does_and_almost_none_needs_it():
    rows = []
    for name in ("r1_normal", "others_normal"):
        path = DATA / "traces" / f"{name}.jsonl.gz"
        if not path.is_file():
            pytest.skip(f"no real traces in {DATA}")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    graded = grade_many([(row["response"], row["answer"], "math") for row in rows])
    pairs = [(g, row["answer"]) for g, row in zip(graded, rows, strict=True) if g.extracted is not None]
    assert len(pairs) > 1200
    decided = [exactly_equal(g.extracted, reference) for g, reference in pairs]
    assert sum(d is not None for d in decided) / len(decided) > 0.99
    apart = [
        (g.extracted, ref)
        for g, ref in pairs
        if (g.verdict == "correct") != (compare(g.extracted, ref)[0] == "correct")
    ]
    assert apart == []


def test_a_list_on_the_way_to_an_answer_is_no_list_that_goes_on():
    prose = r"The sequence is $1, 1+d, 1+2d, \dots$, so that " + "each divisor of 90 gives one difference. " * 5
    assert exactly_equal(prose + "There are 12 sequences.", "12") is None  # left to who reads prose
    assert exactly_equal(r"1, 2, \dots", "1, 2") is False
