"""The solvers, the corpora and the tokenizers that the shipped models are made from."""

import re

import pytest
import yaml

from distill.errors import UserError
from distill.identity import held_out
from distill.shipped import configs_folder
from distill.worked import steps
from distill.worked.corpus import SOLVED_FAMILIES, BaseCorpus, WorkedProblems
from distill.worked.tokenizers import FORMS, build, statement_words

CONFIG = yaml.safe_load((configs_folder() / "students" / "tiny-qwen.yaml").read_text())
EQUALITY = re.compile(r"(?<![\d=+*-])(\d+(?:[-+*]\d+)+)=(\d+)")


@pytest.fixture(scope="module")
def problems():
    return WorkedProblems(CONFIG["families"], 3)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (7, 5), (47, 85), (99, 1), (5, 1995), (900, 100)])
def test_columns_end_in_the_right_number(a, b):
    assert steps.add(a, b).endswith(f" ={a + b}")
    assert steps.subtract(max(a, b), min(a, b)).endswith(f" ={max(a, b) - min(a, b)}")
    assert steps.multiply(a, b % 10).endswith(f" ={a * (b % 10)}")


def test_a_column_is_what_the_docstrings_say():
    assert steps.add(47, 85) == "47+85: 7+5+0=12 4+8+1=13 =132"
    assert steps.subtract(84, 56) == "84-56: 4-6-0=18 8-5-1=02 =28"
    assert steps.multiply(47, 6) == "47*6: 7*6=42+0=42 4*6=24+4=28 =282"


def test_running_totals_of_either_sign():
    for total in range(-30, 31, 3):
        for term in range(-30, 31, 4):
            line = steps.signed_add(total, term)
            assert re.search(r"[ =](-?\d+)$", line)[1] == str(total + term), line


def test_every_solver_reaches_reasoning_gyms_answer_and_writes_no_false_equation():
    from itertools import islice

    from distill.procedural import reasoning_gym_problems
    from distill.worked.corpus import solve

    assert set(CONFIG["families"]) == set(SOLVED_FAMILIES)
    for problem in islice(reasoning_gym_problems(CONFIG["families"], 5, None, unique=False), 1400):
        worked = solve(problem["meta"]["family"], problem["problem"])
        assert worked.answer == problem["answer"], problem
        if problem["meta"]["family"] in ("products", "count_bits", "leg_counting"):
            for line in worked.lines:
                for left, right in EQUALITY.findall(line.split(": ")[0] if ": " in line else line.split(" ")[0]):
                    assert eval(left) == int(right), line


def test_examples_are_a_pure_function_of_the_index_and_never_held_out(problems):
    again = WorkedProblems(CONFIG["families"], 3)
    for index in range(700):
        assert problems[index] == again[index]
        assert not held_out(problems[index].problem)
    assert problems[5] != WorkedProblems(CONFIG["families"], 4)[5]


def test_a_family_may_have_several_turns_a_round_each_another_problem():
    mixed = WorkedProblems(CONFIG["families"], 3, {"letter_counting": 3})
    families = [mixed[index].family for index in range(9)]
    assert families.count("letter_counting") == 3 and len(set(families)) == 7
    letters = [mixed[index].problem for index in range(90) if mixed[index].family == "letter_counting"]
    assert len(set(letters)) == len(letters) == 30
    with pytest.raises(UserError, match=r"turns\.gcd: no such family here"):
        WorkedProblems(CONFIG["families"], 3, {"gcd": 2})


def test_base_documents_never_hold_a_full_size_problem_with_its_whole_working(problems):
    small = WorkedProblems(CONFIG["small_families"], 4)
    for kind in ("lines", "unfinished", "ending"):
        corpus = BaseCorpus(problems, small, {kind: 1.0})
        for index in range(300):
            example, text = problems[index], corpus[index]
            whole = "\n".join([example.problem, *example.worked.lines])
            assert whole not in text
            assert "</think>" not in text and "boxed" not in text
            assert (example.problem in text) == (kind == "unfinished")
            assert ("The answer is" in text) == (kind == "ending")


def test_a_misspelt_kind_of_document_is_refused(problems):
    with pytest.raises(UserError, match=r"mixture\.line: no such kind of document; known: lines, unfinished"):
        BaseCorpus(problems, problems, {"line": 1.0})


def test_a_model_without_a_chat_form_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no chat form is written for 'tiny-r2'; known: tiny-r1"):
        build("tiny-r2", [], tmp_path)


def test_a_family_without_a_solver_is_refused():
    with pytest.raises(UserError, match=r"families\.gcd: no solver is written for it; known: chain_sum"):
        WorkedProblems({"gcd": {}}, 0)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_tokenizers_are_lossless_and_split_digits_and_unknown_words(name, problems, tmp_path):
    from transformers import AutoTokenizer

    build(name, statement_words(problems, 700), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [problems[index].problem for index in range(70)] + [problems[index].response for index in range(70)]
    for text in [*texts, "naïve “quotes” 日本\n\ttab  two spaces \x00"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    pieces = tokenizer.tokenize("State 1234 theater")
    assert pieces[0] == "State" and pieces[2:6] == list("1234")
    assert pieces[-7:] == list("theater") or (name == "tiny-qwen" and pieces[-5:] == [" the", *"ater"])
    if name == "tiny-qwen":
        # transformers swaps the pre-tokenizer of a folder that says qwen2: the ids must not change.
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        swapped = AutoTokenizer.from_pretrained(tmp_path)
        assert type(swapped) is not type(tokenizer) and len(swapped) == len(tokenizer)
        assert swapped(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<think>\n")
    assert "<think>" in tokenizer.decode(tokenizer("<think>")["input_ids"], skip_special_tokens=True)


def test_the_three_vocabularies_differ(problems, tmp_path):
    from transformers import AutoTokenizer

    words = statement_words(problems, 700)
    vocabularies = []
    for name in FORMS:
        build(name, words, tmp_path / name)
        vocabularies.append(AutoTokenizer.from_pretrained(tmp_path / name).get_vocab())
    assert vocabularies[0] != vocabularies[1] != vocabularies[2] != vocabularies[0]
