"""The three models in the repository: ordinary Hugging Face folders that others' code loads too."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.shipped import SHIPPED_MODELS, resolve_model
from distill.worked.corpus import WorkedProblems
from distill.worked.tokenizers import FORMS

FAMILIES = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}}


def test_together_they_stay_under_25_megabytes():
    size = sum(file.stat().st_size for name in SHIPPED_MODELS for file in resolve_model(name).rglob("*"))
    assert 1e6 < size < 25e6


@pytest.mark.parametrize("name", sorted(SHIPPED_MODELS))
def test_transformers_loads_it_and_its_tokenizer_is_the_one_it_was_trained_with(name):
    folder = resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.chat_template == FORMS[name][1]
    text = WorkedProblems(FAMILIES, 0)[0].response
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def test_the_teacher_computes_in_transformers_what_it_computes_here():
    from teacher import load_model

    folder = resolve_model("tiny-r1")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    example = WorkedProblems(FAMILIES, 0)[1]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.problem}], tokenize=False, add_generation_prompt=True
    )
    ids_1T = tokenizer(text + example.response, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        ours = load_model(folder, dtype=torch.float32)(ids_1T).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids_1T).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert ours.abs().max() > 1


def test_the_teacher_solves_an_easy_problem_and_a_base_does_not():
    from distill.embedded import EmbeddedTeacher
    from distill.generation.asks import ListedAsks
    from distill.recipe import Teacher
    from distill.records import Ask

    problem = "Solve the following multiplication: 17 * 42. Give only the result as your final answer."
    messages = [{"role": "user", "content": problem}]
    teacher = EmbeddedTeacher(Teacher(kind="embedded", model="tiny-r1"))
    asks = ListedAsks([Ask(str(n), messages, 0.6, 0.95, 200, n) for n in range(8)])
    replies = [reply for batch in teacher.generate(asks) for reply in batch]
    assert sum(reply.text.count(r"\boxed{714}") for reply in replies) >= 6

    folder = resolve_model("tiny-qwen")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids_1T = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out_1T = model.generate(ids_1T, max_new_tokens=150, do_sample=False)
    assert r"\boxed{714}" not in tokenizer.decode(out_1T[0, ids_1T.shape[1] :])
