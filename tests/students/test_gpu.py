"""What a CPU cannot show: the variable-length kernel, and a whole fine-tuning on the GPU. Skipped without one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from students import loss
from students.attention import use_training_attention
from students.compiled import compile_layers
from students.data import build_examples
from students.loop import summed_loss
from students.lora import Lora, add_adapters
from students.packing import collate
from students.sft import sft
from tests.students.rows import rows, settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("base", ["qwen", "llama"])
def test_packed_kernel_has_the_loss_and_gradients_of_single_examples(base: str, request: pytest.FixtureRequest) -> None:
    """Against float64 on the CPU; the bound is padded bfloat16's own distance from it, times two."""
    folder = request.getfixturevalue(base)
    examples = build_examples(rows(40), AutoTokenizer.from_pretrained(folder), 200).examples
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    expected = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[0, : example.prompt_length] = -100
        expected = expected + truth(input_ids=ids, labels=labels).loss * example.loss_tokens
    expected.backward()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    use_training_attention(model)
    errors = {}
    for packing in (True, False):
        model.zero_grad()
        found = summed_loss(model, collate(examples, packing).to(torch.device("cuda")), "bfloat16")
        found.backward()
        assert float(found) == pytest.approx(float(expected), rel=2e-3)
        for (name, p), (_, q) in zip(model.named_parameters(), truth.named_parameters(), strict=True):
            assert q.grad.norm() > 0
            errors[name, packing] = float((p.grad.cpu() - q.grad).norm() / q.grad.norm())
    for name, _ in truth.named_parameters():
        assert errors[name, True] < 2 * errors[name, False] + 1e-3, name


@pytest.mark.parametrize(("dtype", "how"), [("float32", "off"), ("bfloat16", "off"), ("bfloat16", "layers")])
def test_fine_tuning_on_the_gpu(qwen: Path, tmp_path: Path, dtype: str, how: str) -> None:
    sft(settings(qwen, dtype=dtype, compile=how), rows(60), rows(8, first=60), tmp_path / "gpu")
    log = [json.loads(line) for line in (tmp_path / "gpu" / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"] and log[-1]["validation_loss"] < log[0]["loss"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gpu").dtype == torch.float32


@pytest.mark.parametrize("method", ["full", "lora"])
def test_compiled_layers_and_chunked_loss_have_the_plain_loss_and_gradients(
    qwen: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two rows, so that lengths change under the compiled layers; the bound is eager bfloat16's error times two."""
    examples = build_examples(rows(40), AutoTokenizer.from_pretrained(qwen), 200).examples
    parts = [collate(part, packing=True).to(torch.device("cuda")) for part in (examples[:25], examples[25:])]

    def gradients(how: str) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32).cuda()
        use_training_attention(model)
        if method == "lora":
            torch.manual_seed(0)
            model = add_adapters(model, Lora(r=4))
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.1)
        names = list(model.state_dict())
        if how == "fast":
            compile_layers(model)
        assert list(model.state_dict()) == names
        monkeypatch.setattr(loss, "PLAIN_LOGITS", 0 if how == "fast" else 10**18)
        monkeypatch.setattr(loss, "CHUNK_LOGITS", 300 * 300)
        for part in parts:
            summed_loss(model, part, "float32" if how == "exact" else "bfloat16").backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact, eager, fast = gradients("exact"), gradients("eager"), gradients("fast")
    assert set(exact) == set(eager) == set(fast)
    for name, truth in exact.items():
        ours, theirs = (float((g[name] - truth).norm() / truth.norm()) for g in (fast, eager))
        assert ours < 2 * theirs + 1e-3, name
