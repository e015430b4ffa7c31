"""`distill teacher train` and `distill base train`, on configurations small enough for a test."""

import json

import pytest
import yaml

from distill import base_training, teacher_training
from distill.errors import UserError
from distill.shipped import configs_folder
from distill.training_config import BaseTraining, TeacherTraining, load_training_config

TEACHER = configs_folder() / "teacher" / "tiny-r1.yaml"
BASE = configs_folder() / "students" / "tiny-llama.yaml"


def _families(path):
    return yaml.safe_load(path.read_text())["families"]


def test_the_shipped_models_know_the_demos_problems_and_no_others():
    demo = yaml.safe_load((configs_folder() / "quickstart.yaml").read_text())
    assert demo["problems"]["families"] == demo["evals"]["problems"]["families"]
    for path in (TEACHER, BASE, BASE.with_name("tiny-qwen.yaml")):
        assert _families(path) == demo["problems"]["families"], path


def test_teacher_train_makes_a_folder_that_answers(tmp_path):
    out = tmp_path / "r1"
    small = ["num_hidden_layers=2", "hidden_size=32", "intermediate_size=32", "moe_intermediate_size=16"]
    overrides = [f"model.{setting}" for setting in small] + [
        f"out={out}", "training.total_tokens=6000", "training.tokens_per_step=2048", "training.seq_len=1024",
        "training.micro_tokens=1024", "training.warmup_tokens=0", "exam_problems=7", "threads=1",
    ]  # fmt: skip
    assert teacher_training.run(TEACHER, overrides) == out
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and set(log[-1]["eval"]["families"]) == set(_families(TEACHER))
    assert "was never trained on" in (out / "README.md").read_text()

    from distill.embedded import EmbeddedTeacher
    from distill.generation.asks import ListedAsks
    from distill.recipe import Teacher
    from distill.records import Ask

    teacher = EmbeddedTeacher(Teacher(kind="embedded", model=str(out)))
    asks = ListedAsks([Ask("a", [{"role": "user", "content": "1 + 1 ="}], 0.6, 0.95, 5, 0)])
    (reply,) = (reply for batch in teacher.generate(asks) for reply in batch)
    assert reply.finish_reason in ("stop", "length")


def test_base_train_makes_a_folder_that_loads_with_the_ids_it_was_trained_on(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "base"
    small = ["hidden_size=32", "num_hidden_layers=1", "intermediate_size=32"]
    overrides = [f"model.{setting}" for setting in small] + [
        f"out={out}", "training.max_tokens=4096", "training.rows_per_step=4", "training.rows_per_batch=4",
        "training.eval_every=2", "drill_lines=5",
    ]  # fmt: skip
    for path in (BASE, BASE.with_name("tiny-qwen.yaml")):
        folder = tmp_path / path.stem
        base_training.run(path, [*overrides, f"out={folder}"])
        trained = AutoTokenizer.from_pretrained(folder.with_name(folder.name + ".tokenizer"))
        loaded, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        assert len(loaded) == len(trained) == model.get_input_embeddings().num_embeddings
        text = "State the final answer to the following arithmetic problem: 12 - 7 =\n12-7: 2-7-0=15 ='theater'"
        assert loaded(text)["input_ids"] == trained(text)["input_ids"]
        last = json.loads((folder / "training_log.jsonl").read_text().splitlines()[-1])
        assert 0 <= last["steps_right"] <= 1
        assert "has seen no problem solved from statement" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("modle={}", "unknown key 'modle'; did you mean 'model'?"),
        ("training.learning_rat=1", "training: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("model.hidden_size=-3", r"model\.hidden_size"),
        ("families.gcd={}", r"families\.gcd: no solver is written for it"),
        ("families.chain_sum.min_digits=0", r"chain_sum.*min_digits"),
        ("seed=x", "seed"),
    ],
)
def test_a_mistake_in_the_teachers_configuration_is_one_sentence(override, said, tmp_path):
    with pytest.raises(UserError, match=said):
        teacher_training.run(TEACHER, [f"out={tmp_path}", override])


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(UserError, match="no such training configuration"):
        load_training_config(tmp_path / "none.yaml", [], TeacherTraining)
    with pytest.raises(UserError, match="unknown key 'exam_problems'"):
        load_training_config(BASE, ["exam_problems=3"], BaseTraining)
