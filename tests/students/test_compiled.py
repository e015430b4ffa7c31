"""Compiled layers and activations made anew: the same gradients, names that stay, and when a GPU gets them."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from students import loop
from students.attention import use_training_attention
from students.compiled import WORTH_COMPILING, compilation, compile_layers, recompute_layers
from students.data import build_examples
from students.loop import summed_loss
from students.lora import Lora, add_adapters
from students.packing import collate
from students.sft import sft
from tests.students.rows import rows, settings


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def opened(folder: Path, method: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    use_training_attention(model)
    if method == "lora":
        torch.manual_seed(0)
        model = add_adapters(model, Lora(r=4))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.train()


def gradients(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    examples = build_examples(rows(9), AutoTokenizer.from_pretrained(folder), 200).examples
    for packing, part in ((True, examples[:4]), (True, examples[4:]), (False, examples)):
        summed_loss(model, collate(part, packing), "float32").backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("base", "method", "how"),
    [
        ("qwen", "full", "recompute"), ("llama", "lora", "recompute"),
        ("qwen", "full", "compile"), ("llama", "lora", "both"),
    ],
)  # fmt: skip
def test_gradients_and_names_stay(base: str, method: str, how: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    expected = gradients(opened(folder, method), folder)
    model = opened(folder, method)
    names = list(model.state_dict())
    if how != "compile":
        recompute_layers(model)
    torch.compiler.reset()
    if how != "recompute":
        compile_layers(model, backend="aot_eager")  # needs no C++ compiler
    found = gradients(model, folder)
    assert list(model.state_dict()) == names and set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, atol=1e-6 * float(gradient.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_graph_serves_all_layers_and_lengths(qwen: Path, method: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = opened(qwen, method)
    compile_layers(model, backend="aot_eager")
    examples = build_examples(rows(30), AutoTokenizer.from_pretrained(qwen), 200).examples
    for count in (3, 5, 8, 12, 16):
        summed_loss(model, collate(examples[:count], True), "float32").backward()
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == 1 and not counted["graph_break"]


def test_recompute_keeps_less_for_the_backward_pass(qwen: Path) -> None:
    examples = build_examples(rows(9), AutoTokenizer.from_pretrained(qwen), 200).examples

    def kept(recompute: bool) -> int:
        model = opened(qwen, "full")
        if recompute:
            recompute_layers(model)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            summed_loss(model, collate(examples, True), "float32")
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_recompute_does_not_change_the_training(qwen: Path, tmp_path: Path) -> None:
    sft(settings(qwen), rows(60), rows(8, first=60), tmp_path / "plain")
    sft(settings(qwen, recompute=True), rows(60), rows(8, first=60), tmp_path / "anew")
    plain, anew = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "anew"))
    assert all(torch.equal(weight, anew[name]) for name, weight in plain.items())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_with_compiled_layers_evaluates_and_exports(
    qwen: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    sft(settings(qwen, method=method, epochs=1), rows(60), rows(8, first=60), tmp_path / "plain")
    monkeypatch.setattr(loop, "compile_layers", partial(compile_layers, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    sft(settings(qwen, method=method, epochs=1, compile="layers"), rows(60), rows(8, first=60), tmp_path / "fast")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # none for evaluation
    plain, fast = (log_of(tmp_path / name) for name in ("plain", "fast"))
    for ours, theirs in zip(fast, plain, strict=True):
        for key in ("loss", "grad_norm", "validation_loss"):
            assert (key in ours) == (key in theirs)
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-4)
    names = [list(load_file(tmp_path / name / "model.safetensors")) for name in ("plain", "fast")]
    assert names[0] == names[1]


def test_layers_are_compiled_on_a_gpu_for_long_runs_only() -> None:
    def choice(device: str, kind: str, steps: int, asked: str | None = None) -> str:
        where: Any = SimpleNamespace(device=torch.device(device), distributed_type=SimpleNamespace(value=kind))
        return compilation(asked, where, steps)

    assert choice("cuda", "NO", WORTH_COMPILING) == choice("cuda", "MULTI_GPU", 1000) == "layers"
    assert (
        choice("cuda", "NO", WORTH_COMPILING - 1) == choice("cpu", "NO", 1000) == choice("cuda", "FSDP", 1000) == "off"
    )
    assert choice("cpu", "NO", 1, "model") == "model" and choice("cuda", "FSDP", 1, "layers") == "layers"
    with pytest.raises(ValueError, match="compile: 'all' is not known; expected layers, model or off"):
        choice("cpu", "NO", 1, "all")


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="compile: Linear has no decoder layers"):
        compile_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="recompute: Linear does not support it"):
        recompute_layers(nn.Linear(2, 2))
