"""Selection and dataset: the split, what is kept, the card, and that the tools of the field read it."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.dataset import write_dataset
from distill.files import sha256_file
from distill.recipe import Selection
from distill.selection import select, validation_problems
from tests.distill.small_run import make_recipe, open_run, problem, trace

TAIL = "{}\n</think>\n\n\\boxed{{4}}"
FUNNEL = [{"filter": "truncation", "in": 9, "out": 8, "tokens_in": 1900, "tokens_out": 1200}]


def samples(count=12, k=3, answer="4"):
    asked = [problem(f"What is {n} + {n}?", answer) for n in range(count)]
    return asked, [trace(p, "word " * (5 + (7 * i) % 4) + TAIL.format(i), i) for p in asked for i in range(k)]


def write(folder, asked, chosen, **sections):
    recipe = make_recipe(**sections)
    with open_run(folder, recipe) as run:
        run.manifest.update(
            teacher={"id": "tiny@0123", "licence": "apache-2.0"},
            problems={
                "train": {"count": 12, "sha256": "a" * 64},
                "eval": {"count": 6, "sha256": "b" * 64},
                "overlap": 0,
            },
        )
        return write_dataset(run, recipe, chosen, {p["id"]: p for p in asked}, FUNNEL)


def rows(folder, name):
    path = folder / "dataset" / name
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line] if path.exists() else []


def load(folder, tmp_path, *config):
    import datasets

    return datasets.load_dataset(str(folder / "dataset"), *config, cache_dir=str(tmp_path / "cache"))


def test_shortest_is_kept_and_ties_go_to_the_first_sample():
    asked, found = samples(k=4)
    chosen = select(found, Selection(per_problem=2), seed=0)
    assert len(chosen) == 24
    for p in asked:
        own = sorted(
            (t for t in found if t["problem_id"] == p["id"]), key=lambda t: (t["reasoning_tokens"], t["sample"])
        )
        assert [t["id"] for t in chosen if t["problem_id"] == p["id"]] == [t["id"] for t in own[:2]]


def test_random_choice_depends_on_the_seed_and_on_nothing_else():
    _, found = samples(count=40, k=4)
    settings = Selection(choose="random")
    chosen = {t["id"] for t in select(found, settings, seed=0)}
    assert chosen == {t["id"] for t in select(found[::-1], settings, seed=0)}
    assert chosen != {t["id"] for t in select(found, settings, seed=1)}
    assert len({t["sample"] for t in found if t["id"] in chosen}) == 4
    without = [t for t in found if t["problem_id"] != found[0]["problem_id"]]
    assert {t["id"] for t in select(without, settings, seed=0)} < chosen


@given(st.lists(st.text(min_size=1, max_size=8), max_size=40), st.floats(0, 0.999), st.integers(0, 9))
def test_validation_never_takes_all_and_about_its_share(identities, fraction, seed):
    held = validation_problems(identities, fraction, seed)
    count = len(set(identities))
    assert held <= set(identities)
    assert held == validation_problems(identities[::-1] + identities, fraction, seed)
    if count >= 2:
        assert len(held) < count
        assert (fraction == 0) == (not held)
        assert abs(len(held) - fraction * count) <= 1
    else:
        assert not held


def test_the_split_is_by_problem(tmp_path):
    asked, found = samples()
    facts = write(tmp_path, asked, found)
    train, held = rows(tmp_path, "train.jsonl"), rows(tmp_path, "validation.jsonl")
    assert (facts["train"], facts["validation"]) == (len(train), len(held)) == (27, 9)
    assert not {r["problem_id"] for r in train} & {r["problem_id"] for r in held}
    assert {r["trace_id"] for r in train + held} == {t["id"] for t in found}


def test_rows_have_r1s_form_and_can_be_split_again(tmp_path):
    from distill.reasoning import split_reasoning

    asked, found = samples()
    write(tmp_path, asked, found)
    by_id = {t["id"]: t for t in found}
    for row in rows(tmp_path, "train.jsonl"):
        source = by_id[row["trace_id"]]
        user, assistant = row["messages"]
        assert user == source["messages"][0] and assistant["role"] == "assistant"
        assert assistant["content"] == f"<think>\n{source['reasoning']}\n</think>\n\n{source['response']}"
        assert split_reasoning(assistant["content"]) == (source["reasoning"], source["response"])
        assert (row["answer"], row["source"]) == ("4", "test")


def test_answers_only_has_the_same_problems_once_each(tmp_path):
    asked, found = samples()
    write(tmp_path, asked, found)
    for split in ("train", "validation"):
        answers = rows(tmp_path, f"answers_only/{split}.jsonl")
        expected = dict.fromkeys(r["problem_id"] for r in rows(tmp_path, f"{split}.jsonl"))
        assert [r["problem_id"] for r in answers] == list(expected)
        assert {r["messages"][1]["content"] for r in answers} == {"<think>\n\n</think>\n\n\\boxed{4}"}


def test_problems_without_answer_are_not_in_answers_only(tmp_path):
    asked, found = samples(answer=None)
    write(tmp_path, asked, found)
    assert (
        len(rows(tmp_path, "train.jsonl")) == 27
        and not (tmp_path / "dataset" / "answers_only" / "train.jsonl").exists()
    )
    assert load(tmp_path, tmp_path)["train"][0]["answer"] is None


def test_load_dataset_reads_both_configurations(tmp_path):
    import datasets

    asked, found = samples()
    asked[0]["answer"] = None
    write(tmp_path / "run", asked, found)
    default = load(tmp_path / "run", tmp_path)
    assert {name: len(split) for name, split in default.items()} == {"train": 27, "validation": 9}
    assert [dict(row) for row in default["train"]] == rows(tmp_path / "run", "train.jsonl")
    assert isinstance(default["train"].features["messages"], datasets.List)
    answers = load(tmp_path / "run", tmp_path, "answers_only")
    assert [dict(row) for row in answers["validation"]] == rows(tmp_path / "run", "answers_only/validation.jsonl")
    assert datasets.get_dataset_config_names(str(tmp_path / "run" / "dataset")) == ["default", "answers_only"]


def test_one_problem_has_no_validation_and_still_loads(tmp_path):
    asked, found = samples(count=1, k=1)
    facts = write(tmp_path / "run", asked, found)
    assert facts["validation"] == 0 and not (tmp_path / "run" / "dataset" / "validation.jsonl").exists()
    assert list(load(tmp_path / "run", tmp_path)) == ["train"]


def test_files_of_an_earlier_and_larger_dataset_do_not_stay(tmp_path):
    asked, found = samples()
    write(tmp_path / "run", asked, found)
    write(tmp_path / "run", asked, found, selection={"validation_fraction": 0.0})
    assert not list((tmp_path / "run" / "dataset").rglob("validation.jsonl"))
    assert list(load(tmp_path / "run", tmp_path)) == ["train"]


def test_trl_takes_the_rows_for_conversations(tmp_path):
    data_utils = pytest.importorskip("trl.data_utils", reason="trl is a test extra")
    asked, found = samples()
    write(tmp_path / "run", asked, found)
    row = load(tmp_path / "run", tmp_path)["train"][0]
    assert data_utils.is_conversational(row)


def test_the_card_states_provenance_funnel_proof_and_hashes(tmp_path):
    import yaml

    asked, found = samples()
    write(tmp_path, asked, found)
    _, front, body = (tmp_path / "dataset" / "README.md").read_text().split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["license"] == "apache-2.0"
    assert Counter(entry["config_name"] for entry in header["configs"]) == {"default": 1, "answers_only": 1}
    assert "reasoning-gym (seed 1): gcd, spell_backward" in body and "`tiny@0123`" in body
    assert "| truncation | 9 | 8 | 1,900 | 1,200 |" in body
    assert "a" * 64 in body and "b" * 64 in body and "None of the 12 training problems" in body
    for name in ("train.jsonl", "validation.jsonl", "answers_only/train.jsonl", "answers_only/validation.jsonl"):
        assert f"| {name} |" in body and sha256_file(tmp_path / "dataset" / name) in body


def test_a_licence_that_nobody_stated_is_not_claimed(tmp_path):
    asked, found = samples()
    source = {"source": str(tmp_path / "mine.jsonl"), "count": None, "families": {}}
    write(tmp_path / "run", asked, found, problems=source)
    text = (tmp_path / "run" / "dataset" / "README.md").read_text()
    assert "license: other" in text and "not stated; it is that of the source" in text
    assert str(tmp_path) not in text
