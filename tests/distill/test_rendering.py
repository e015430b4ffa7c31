"""Prompts rendered here and replies counted here."""

import json
import shutil

import pytest

from distill.errors import UserError
from distill.rendering import ChatTokenizer, stop_ids
from distill.shipped import resolve_model

ASK = [{"role": "user", "content": "12 + 30 ="}]
R1 = "<｜begin▁of▁sentence｜><｜User｜>12 + 30 =<｜Assistant｜>"


@pytest.fixture
def without_opening(tmp_path):
    """tiny-r1's tokenizer with R1's first template, which left the opening tag to the model."""
    folder = tmp_path / "first"
    shutil.copytree(resolve_model("tiny-r1"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    assert "<think>\\n" in text
    template.write_text(text.replace("<think>\\n", ""), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("think", ["auto", "force", "leave"])
def test_the_opening_tag_is_there_once(without_opening, think):
    assert ChatTokenizer("tiny-r1", think=think).text(ASK) == R1 + "<think>\n"
    left = ChatTokenizer(without_opening, think=think).text(ASK)
    assert left == (R1 if think == "leave" else R1 + "<think>\n")


def test_special_tokens_stand_once_in_the_ids_and_are_seen_in_the_text():
    chat = ChatTokenizer("tiny-r1")
    ids = chat.ids(ASK)
    assert ids.count(chat.tokenizer.bos_token_id) == 1
    assert chat.decode(ids) == R1 + "<think>\n"


def test_reasoning_ends_with_its_closing_tag_however_it_is_spelt():
    chat = ChatTokenizer("tiny-r1")
    tag = chat.tokenizer.convert_tokens_to_ids("</think>")
    before, after = (chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("12 + 30 = 42", "\n42"))
    spelt = [id for part in ("</", "thi", "nk>") for id in chat.tokenizer(part, add_special_tokens=False)["input_ids"]]
    for closing in ([tag], spelt):
        ids = [*before, *closing, *after]
        assert chat.reasoning_tokens(chat.decode(ids), ids) == len(before) + len(closing)
    assert chat.reasoning_tokens(chat.decode(before), before) == len(before)


def test_what_ends_a_reply(without_opening, tmp_path):
    chat = ChatTokenizer("tiny-r1")
    assert stop_ids("tiny-r1", chat.tokenizer) == (399,)
    (tmp_path / "first" / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, 7]}))
    assert stop_ids(without_opening, chat.tokenizer) == (399, 7)
    (tmp_path / "first" / "generation_config.json").unlink()
    assert stop_ids(without_opening, chat.tokenizer) == (chat.tokenizer.eos_token_id,)


def test_a_model_that_cannot_be_asked_is_named(without_opening, tmp_path):
    (tmp_path / "first" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"teacher\.model: the tokenizer of '.*first' has no chat template"):
        ChatTokenizer(without_opening)
    (tmp_path / "first" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"does not load"):
        ChatTokenizer(without_opening)
