import os
from pathlib import Path
from typing import Any

import pytest

from students.data import build_examples, render
from students.packing import IGNORED, collate
from tests import tiny
from tests.students.rows import rows

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))
REPLY = "<think>\nAdd: 2+2=4.\n</think>\n\nThe answer is \\boxed{4}."


def published(name: str) -> Any:
    path = DATA / "templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"no {path.name} in DISTILL_DATA")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = path.read_text()
    return tokenizer


def row(reply: str = REPLY, question: str = "2+2?") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def test_only_the_response_and_its_end_are_trained_on() -> None:
    tokenizer = tiny.tokenizer()
    example = build_examples([row()], tokenizer, 200).examples[0]
    prompt, learnt = example.input_ids[: example.prompt_length], example.input_ids[example.prompt_length :]
    assert tokenizer.decode(prompt) == f"{tiny.BOS}{tiny.USER}2+2?{tiny.ASSISTANT}<think>\n"
    assert tokenizer.decode(learnt) == REPLY.removeprefix("<think>\n") + tiny.EOS
    assert learnt[-1] == tokenizer.eos_token_id and learnt.count(tokenizer.eos_token_id) == 1
    assert example.loss_tokens == len(learnt)


@pytest.mark.parametrize("packing", [True, False])
def test_labels_are_exactly_the_response_ids_each_predicted_from_the_token_before(packing: bool) -> None:
    examples = build_examples(rows(7), tiny.tokenizer(), 200).examples
    batch = collate(examples, packing)
    if packing:
        (ids,) = batch.inputs["input_ids"].tolist()
        keep = batch.inputs["logits_to_keep"].tolist()
        learnt = list(zip(keep, batch.targets.tolist(), strict=True))
        expected, start = [], 0
        for example in examples:
            for place in range(example.prompt_length, len(example.input_ids)):
                expected.append((start + place - 1, example.input_ids[place]))
            start += len(example.input_ids)
        assert learnt == expected
        assert ids == [token for example in examples for token in example.input_ids]
        assert batch.inputs["position_ids"][0].tolist() == [p for e in examples for p in range(len(e.input_ids))]
        return
    width = batch.inputs["input_ids"].shape[1]
    skipped = width - batch.inputs["logits_to_keep"]
    for example, ids, targets in zip(examples, batch.inputs["input_ids"], batch.targets, strict=True):
        length, head = len(example.input_ids), example.prompt_length
        assert ids[:length].tolist() == example.input_ids
        full = [IGNORED] * skipped + targets.tolist()
        assert full[head - 1 : length - 1] == example.input_ids[head:]
        assert set(full[: head - 1] + full[length - 1 :]) <= {IGNORED}


def test_opening_tag_is_kept_where_the_template_does_not_write_it() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("<think>\n", "")
    prompt, completion = render(row(), tokenizer, "here")
    assert prompt.endswith(tiny.ASSISTANT) and completion == REPLY


def test_opening_tag_is_taken_off_whatever_space_follows_it_in_the_template() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("<think>\n", "<think>")
    prompt, completion = render(row(), tokenizer, "here")
    assert prompt + completion == f"{tiny.BOS}{tiny.USER}2+2?{tiny.ASSISTANT}{REPLY}"


@pytest.mark.parametrize(
    ("name", "opens"),
    [
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", True),
        ("Qwen-Qwen2.5-7B-Instruct", False),
        ("Qwen-Qwen3-0.6B", False),
    ],
)
def test_published_templates_keep_the_whole_reasoning(name: str, opens: bool) -> None:
    prompt, completion = render(row(), published(name), "here")
    assert (prompt + completion).endswith(REPLY)
    assert prompt.endswith("<think>\n") == opens


@pytest.mark.parametrize("name", ["deepseek-ai-DeepSeek-V3.1", "Qwen-QwQ-32B"])
def test_template_that_closes_the_reasoning_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"here: the chat template's prompt ends with .*</think>', which closes"):
        render(row(), published(name), "here")


def test_empty_reasoning_of_the_answers_only_baseline_has_the_same_form() -> None:
    prompt, completion = render(row("<think>\n\n</think>\n\n\\boxed{4}"), tiny.tokenizer(), "here")
    assert prompt.endswith("<think>\n") and completion == "\n</think>\n\n\\boxed{4}"


def test_control_tokens_quoted_in_an_answer_stay_text() -> None:
    tokenizer = tiny.tokenizer()
    quoted = REPLY.replace("Add", f"Not the end: {tiny.EOS}{tiny.USER} but text")
    example = build_examples([row(quoted)], tokenizer, 200).examples[0]
    learnt = example.input_ids[example.prompt_length :]
    assert tokenizer.decode(learnt[:-1]) == quoted.removeprefix("<think>\n")
    assert learnt.index(tokenizer.eos_token_id) == len(learnt) - 1
    assert tokenizer.convert_tokens_to_ids(tiny.USER) not in learnt
    assert tokenizer.convert_tokens_to_ids("</think>") in learnt


def test_too_long_examples_are_left_out_whole_and_counted() -> None:
    tokenizer = tiny.tokenizer()
    all_of_them = build_examples(rows(30), tokenizer, 1000).examples
    limit = sorted(len(example.input_ids) for example in all_of_them)[14]
    some = build_examples(rows(30), tokenizer, limit)
    assert some.examples == [example for example in all_of_them if len(example.input_ids) <= limit]
    assert some.too_long == 30 - len(some.examples) > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "d.jsonl, row 3: expected 'messages', a list of at least a user and an assistant turn"),
        ({"messages": "hello"}, "d.jsonl, row 3: expected 'messages'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "d.jsonl, row 3: expected 'messages'"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "row 3: the last message is by 'user', expected"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "row 3: every message needs"),
        ({"messages": ["a", "b"]}, "row 3: every message needs"),
        (row("4"), "row 3: the chat template opens the reasoning with '<think>.n', but the assistant's text starts"),
        (row(REPLY + "\ud800"), "row 3: a message holds half a character"),
    ],
)
def test_bad_row_is_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_examples([row(), row(), bad], tiny.tokenizer(), 200, "d.jsonl")


def test_nothing_left_says_why() -> None:
    with pytest.raises(ValueError, match=r"d\.jsonl: nothing to train on, all 2 rows are longer than max_length=10"):
        build_examples([row(), row()], tiny.tokenizer(), 10, "d.jsonl")
    with pytest.raises(ValueError, match=r"d\.jsonl: nothing to train on, no rows"):
        build_examples([], tiny.tokenizer(), 10, "d.jsonl")


def test_tokenizer_without_template_or_end_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        build_examples([row()], tokenizer, 200)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        build_examples([row()], tokenizer, 200)
