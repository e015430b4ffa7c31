import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from students.documents import START, read_rows, read_rows_ahead
from students.loop import Optimisation
from students.pretrain import PretrainSettings, pretrain
from tests import tiny
from tests.students.documents import broken, killed, sums

CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 263, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
BACKEND, END = tiny.tokenizer().backend_tokenizer, 257
SETTINGS = PretrainSettings(
    Optimisation(learning_rate=5e-3, checkpoint_every=5, ema_decay=0.9), max_tokens=24 * 512, row_length=64,
    rows_per_step=8, rows_per_batch=4, eval_every=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "base"
    pretrain(SETTINGS, sums, CONFIG, tokenizer_dir, out, card="# A base")
    return out


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_rows_are_the_documents_end_to_end_and_every_token_is_predicted_once() -> None:
    tokenizer = tiny.tokenizer()
    stream = [token for i in range(600) for token in [*tokenizer(sums(i))["input_ids"], tokenizer.eos_token_id]]
    reader = read_rows(sums, BACKEND, END, 64, 8, START)
    blocks = [next(reader)[0] for _ in range(4)]
    inputs = np.concatenate([block[:, :-1].ravel() for block in blocks])
    targets = np.concatenate([block[:, 1:].ravel() for block in blocks])
    assert blocks[0].shape == (8, 65)
    assert inputs.tolist() == stream[: len(inputs)]
    assert targets.tolist() == stream[1 : len(targets) + 1]


def test_reading_goes_on_from_any_position() -> None:
    reader = read_rows(sums, BACKEND, END, 64, 8, START)
    blocks = [next(reader) for _ in range(12)]
    for step in (0, 4, 10):
        position = json.loads(json.dumps(blocks[step][1]))  # as a checkpoint keeps it
        again, _ = next(read_rows(sums, BACKEND, END, 64, 8, position))
        assert (again == blocks[step + 1][0]).all()


def test_base_has_learnt_and_is_an_ordinary_folder_in_bfloat16(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "qwen2"
    assert AutoTokenizer.from_pretrained(base).chat_template == tiny.CHAT_TEMPLATE
    assert (base / "README.md").read_text() == "# A base"
    log = log_of(base)
    assert [line["step"] for line in log] == list(range(1, 25)) and log[-1]["tokens"] == 24 * 512
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]


def test_first_loss_is_transformers_loss_of_the_first_rows(base: Path) -> None:
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG), dtype=torch.float32)
    block, _ = next(read_rows(sums, BACKEND, END, 64, 8, START))
    ids = torch.from_numpy(block).long()
    logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert log_of(base)[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_average_is_what_is_evaluated_and_saved(tokenizer_dir: Path, tmp_path: Path) -> None:
    seen: dict[int, torch.Tensor] = {}

    def hook(model: torch.nn.Module, step: int) -> dict[str, float]:
        assert not model.training
        seen[step] = model.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
        return {"accuracy": step / 100}

    settings = replace(SETTINGS, save_dtype="float32", max_tokens=12 * 512)
    pretrain(settings, sums, CONFIG, tokenizer_dir, tmp_path / "out", hook)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight
    assert sorted(seen) == [10, 12] and torch.equal(saved, seen[12])
    logged = {line["step"]: line["accuracy"] for line in log_of(tmp_path / "out") if "accuracy" in line}
    assert logged == {10: 0.1, 12: 0.12}
    plain = replace(settings, optimisation=replace(settings.optimisation, ema_decay=None))
    pretrain(plain, sums, CONFIG, tokenizer_dir, tmp_path / "plain", hook)
    assert not torch.allclose(saved, seen[12])  # the hook has overwritten it with the plain weights


def test_goes_on_from_a_checkpoint_folder(base: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_tokens=4 * 512)
    pretrain(settings, sums, base, tokenizer_dir, tmp_path / "out")
    assert log_of(tmp_path / "out")[0]["loss"] == pytest.approx(log_of(base)[-1]["loss"], rel=0.2)


def _die_at_step(step: int, tokenizer_dir: Path, out: Path) -> None:
    torch.set_num_threads(1)

    def log(record: dict[str, Any]) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    pretrain(SETTINGS, sums, CONFIG, tokenizer_dir, out, log=log)


def test_killed_and_resumed_is_as_undisturbed(base: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers", "accelerate", "peft", "students.loop", "tests.students.kill"]
    )
    child = context.Process(target=_die_at_step, args=(13, tokenizer_dir, tmp_path / "base"))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    seen: list[int] = []
    pretrain(
        SETTINGS, sums, CONFIG, tokenizer_dir, tmp_path / "base", card="# A base", log=lambda r: seen.append(r["step"])
    )
    assert seen == list(range(11, 25))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert [line["loss"] for line in log_of(tmp_path / "base")] == [line["loss"] for line in log_of(base)]
    assert pretrain(SETTINGS, sums, CONFIG, tokenizer_dir, tmp_path / "base").skipped
    assert not pretrain(replace(SETTINGS, max_tokens=512), sums, CONFIG, tokenizer_dir, tmp_path / "base").skipped


def test_what_goes_wrong_in_the_worker_is_told_here() -> None:
    with pytest.raises(ValueError, match="document 301 cannot be written"):
        list(read_rows_ahead(broken, BACKEND, END, 64, 8, START))
    with pytest.raises(RuntimeError, match="the process that makes documents was killed"):
        list(read_rows_ahead(killed, BACKEND, END, 64, 8, START))


def _read_a_row(pid: Any) -> None:
    reader = read_rows_ahead(sums, BACKEND, END, 64, 8, START)
    next(reader)
    pid.value = multiprocessing.active_children()[0].pid
    time.sleep(60)


def test_worker_does_not_outlive_a_killed_trainer() -> None:
    context = multiprocessing.get_context("spawn")
    pid = context.Value("i", 0)
    trainer = context.Process(target=_read_a_row, args=(pid,))
    trainer.start()
    deadline = time.monotonic() + 60
    while not pid.value and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pid.value and _alive(pid.value)
    trainer.kill()
    trainer.join()
    while _alive(pid.value) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(pid.value)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_config_and_tokenizer_that_do_not_fit(tokenizer_dir: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"vocab_size": 200}, "the tokenizer has 263 tokens, but the model embeds only 200"),
        ({"max_position_embeddings": 32}, "row_length: 64 is more than the model's 32 positions"),
        ({"model_type": "qwen0"}, "model_type 'qwen0' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(SETTINGS, sums, {**CONFIG, **changes}, tokenizer_dir, tmp_path / "out")
    with pytest.raises(ValueError, match="model_type None is not known"):
        pretrain(SETTINGS, sums, {"vocab_size": 263}, tokenizer_dir, tmp_path / "out")
