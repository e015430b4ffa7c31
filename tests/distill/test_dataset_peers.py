"""The field's trainers read the dataset: TRL's SFTTrainer, and LLaMA-Factory's own loader where it is installed."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest

from distill.shipped import resolve_model
from tests.distill.test_dataset import load, rows, samples, write

# What LLaMA-Factory's data/README.md documents for a file in the sharegpt format.
DOCUMENTED = {"file_name", "formatting", "columns", "tags"}
TAGS = {"role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"}


def dataset(folder):
    asked, found = samples()
    write(folder, asked, found)
    return folder / "dataset"


def test_trls_trainer_prepares_every_turn_whole(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is a test extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base = str(resolve_model("tiny-qwen"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    dataset(tmp_path / "run")
    train = load(tmp_path / "run", tmp_path)["train"].select(range(4))
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, max_length=None, logging_steps=1,
        max_steps=1, per_device_train_batch_size=4, learning_rate=1e-4, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base), args=settings, train_dataset=train, processing_class=tokenizer
    )
    for row, prepared in zip(rows(tmp_path / "run", "train.jsonl"), trainer.train_dataset, strict=False):
        text = tokenizer.decode(prepared["input_ids"])
        user, assistant = row["messages"]
        assert assistant["content"] in text and user["content"] in text
    assert trainer.train().training_loss > 0


def test_a_template_like_r1s_loses_the_reasoning_as_the_card_warns(tmp_path):
    """The reason for the card's warning, and for training on raw assistant text in this toolkit."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(resolve_model("tiny-qwen")))
    messages = rows(dataset(tmp_path).parent, "train.jsonl")[0]["messages"]
    drops = (
        "{% for m in messages %}{% set c = m['content'] %}{% if '</think>' in c %}"
        "{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}{% endfor %}"
    )
    assert "<think>" in tokenizer.apply_chat_template(messages, tokenize=False)
    assert "word" not in tokenizer.apply_chat_template(messages, tokenize=False, chat_template=drops)
    assert "use one that keeps what\nstands before `</think>`" in (tmp_path / "dataset" / "README.md").read_text()


def test_llama_factorys_description_names_the_files_and_fields_it_documents(tmp_path):
    folder = dataset(tmp_path) / "llamafactory"
    entries = json.loads((folder / "dataset_info.json").read_text())
    assert list(entries) == ["small", "small_validation", "small_answers_only"]
    for entry in entries.values():
        assert entry.keys() <= DOCUMENTED and entry["tags"].keys() <= TAGS and entry["formatting"] == "sharegpt"
        lines = (folder / entry["file_name"]).read_text().splitlines()
        for turns in (json.loads(line)[entry["columns"]["messages"]] for line in lines):
            roles = [turn[entry["tags"]["role_tag"]] for turn in turns]
            assert roles == [entry["tags"]["user_tag"], entry["tags"]["assistant_tag"]]
            assert all(turn[entry["tags"]["content_tag"]] for turn in turns)


def test_llama_factory_itself_converts_every_row(tmp_path, monkeypatch):
    found = importlib.util.find_spec("llamafactory")
    if found is None:
        pytest.skip("llamafactory is not installed (unpacking its wheel on PYTHONPATH is enough)")
    root = os.path.dirname(found.origin)
    for name in ("llamafactory", "llamafactory.data", "llamafactory.extras"):
        # The packages' own __init__ import every trainer; these two modules are all that is wanted.
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split(".")[1:])]
        monkeypatch.setitem(sys.modules, name, package)
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import get_dataset_list

    folder = dataset(tmp_path) / "llamafactory"
    for described in get_dataset_list(["small", "small_validation", "small_answers_only"], str(folder)):
        convert = get_dataset_converter(described.formatting, described, None)
        lines = (folder / Path(described.dataset_name)).read_text().splitlines()
        assert lines
        for row in map(json.loads, lines):
            user, assistant = row["messages"]
            converted = convert(row)
            assert [turn["content"] for turn in converted["_prompt"]] == [user["content"]]
            assert [turn["content"] for turn in converted["_response"]] == [assistant["content"]]
