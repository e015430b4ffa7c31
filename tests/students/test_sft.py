"""Fine-tuning from end to end: what is written, what is seen, and that layouts and adapters do not change the maths."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from students.data import build_examples
from students.lora import Lora
from students.sft import plan, sft
from tests import tiny
from tests.students.rows import rows, settings


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "student"
    sft(settings(qwen), rows(60), rows(8, first=60), out, card_notes="Notes of the dataset.")
    return out


def test_student_loads_as_an_ordinary_folder_and_has_learnt(trained: Path, qwen: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.dtype == torch.float32  # as its base
    log = log_of(trained)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(trained)
    example = build_examples(rows(1), tokenizer, 200).examples[0]
    ids = torch.tensor([example.input_ids])
    labels = ids.clone()
    labels[0, : example.prompt_length] = -100
    before = AutoModelForCausalLM.from_pretrained(qwen)(input_ids=ids, labels=labels).loss
    assert model(input_ids=ids, labels=labels).loss < 0.8 * before
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3
    assert not list(trained.parent.glob("*.partial")) and not list(trained.glob("*.bin"))


def test_folder_has_sampling_defaults_template_and_card(trained: Path, qwen: Path) -> None:
    generation = GenerationConfig.from_pretrained(trained)
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.95)
    assert generation.eos_token_id == [257]
    tokenizer, base = AutoTokenizer.from_pretrained(trained), AutoTokenizer.from_pretrained(qwen)
    assert tokenizer.chat_template == base.chat_template == tiny.CHAT_TEMPLATE
    assert tokenizer.get_vocab() == base.get_vocab()
    card = (trained / "README.md").read_text()
    for part in ("base_model: qwen", "60 examples", "0.003, multi_step", "Notes of the dataset.", "library_name"):
        assert part in card
    assert str(qwen.parent) not in card


def test_log_has_a_line_a_step_and_counts_every_token(trained: Path, qwen: Path) -> None:
    examples = build_examples(rows(60), AutoTokenizer.from_pretrained(qwen), 128).examples
    tokens = 2 * sum(len(example.input_ids) for example in examples)
    log = log_of(trained)
    assert [line["step"] for line in log] == list(range(1, round(tokens / 512) + 1))
    assert log[-1]["tokens"] == tokens == plan(settings(qwen), rows(60)).tokens
    assert all(line["tokens_per_second"] > 0 and line["padding_fraction"] == 0 for line in log)
    rates = [line["lr"] for line in log]
    assert rates[0] == 3e-3 and rates[-1] == pytest.approx(3e-4)
    assert 1 < sum("validation_loss" in line for line in log) <= 5 and "validation_loss" in log[-1]


def test_validation_loss_is_the_mean_over_the_held_out_response_tokens(trained: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    total, count = 0.0, 0
    for example in build_examples(rows(8, first=60), tokenizer, 128).examples:
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[0, : example.prompt_length] = -100
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * example.loss_tokens
        count += example.loss_tokens
    assert log_of(trained)[-1]["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_second_call_finds_the_work_done_and_another_setting_does_it_anew(trained: Path, qwen: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    again = sft(settings(qwen, checkpoint_every=5), rows(60), rows(8, first=60), trained)
    assert again.skipped and again.tokens == log_of(trained)[-1]["tokens"]
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    copy = trained.with_name("copy")
    shutil.copytree(trained, copy)
    other = sft(settings(qwen, seed=1), rows(60), rows(8, first=60), copy)
    assert not other.skipped
    assert log_of(copy)[0]["loss"] != log_of(trained)[0]["loss"]


OTHER_LAYOUTS = [{"packing": False}, {"micro_batch_tokens": 128}, {"packing": False, "micro_batch_tokens": 300}]


@pytest.mark.parametrize("changes", OTHER_LAYOUTS)
def test_layout_and_accumulation_do_not_change_the_training(
    trained: Path, qwen: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    sft(settings(qwen, **changes), rows(60), rows(8, first=60), tmp_path / "other")
    for ours, theirs in zip(log_of(trained), log_of(tmp_path / "other"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
        assert (theirs["lr"], theirs["tokens"]) == (ours["lr"], ours["tokens"])
        assert (theirs["padding_fraction"] > 0) == ("packing" in changes)


def test_baseline_sees_as_many_tokens_by_repeating_its_shorter_examples(qwen: Path, tmp_path: Path) -> None:
    answers = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "<think>\n\n</think>\n\n\\boxed{1}"}]}
        for row in rows(60)
    ]
    budget = plan(settings(qwen), rows(60))
    result = sft(settings(qwen, max_tokens=budget.tokens), answers, None, tmp_path / "answers")
    longest = max(len(e.input_ids) for e in build_examples(answers, AutoTokenizer.from_pretrained(qwen), 128).examples)
    assert abs(result.tokens - budget.tokens) <= longest / 2
    assert result.steps == budget.steps
    assert result.tokens > 3 * sum(
        len(e.input_ids) for e in build_examples(answers, AutoTokenizer.from_pretrained(qwen), 128).examples
    )


def test_weights_are_saved_in_the_type_of_the_base(qwen: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.bfloat16).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    sft(settings(base, epochs=0.5, dtype="bfloat16"), rows(20), None, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("base", ["qwen", "llama"])
def test_lora_trains_adapters_only_and_merges_them(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from peft import PeftModel

    folder = request.getfixturevalue(base)
    lora = Lora(r=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
    out = tmp_path / "student"
    sft(settings(folder, method="lora", lora=lora, learning_rate=2e-2), rows(60), None, out)
    log = log_of(out)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    merged, plain = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert set(merged) == set(plain)
    assert changed == {name for name in plain if "q_proj.weight" in name or "down_proj.weight" in name}
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(out / "adapter"))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
        torch.testing.assert_close(ours, adapted(input_ids=ids).logits, atol=1e-4, rtol=0)


def test_diverging_training_is_one_sentence(qwen: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    model = AutoModelForCausalLM.from_pretrained(qwen)
    model.model.norm.weight.data[3] = math.inf
    model.save_pretrained(bad)
    tiny.tokenizer().save_pretrained(bad)
    with pytest.raises(ValueError, match=r"training diverged at step 1 \(loss nan.*lower the learning rate"):
        sft(settings(bad), rows(20), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_max_length_beyond_the_models_positions_is_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length: 1024 is more than the 512 positions"):
        sft(settings(qwen, max_length=1024), rows(20), None, tmp_path / "out")
