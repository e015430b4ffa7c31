"""Steps that can be recorded: nothing in them asks the device for a number; on a GPU a replay is the step itself."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from teacher import load_model, shapes
from teacher.balance import LoadBalance
from teacher.batches import Cursor, StepBatch, step_batches
from teacher.experts import expert_layout
from teacher.fp8_training import experts as fp8_experts
from teacher.fp8_training import linear
from teacher.objective import Objective
from teacher.routing import Routing
from teacher.train import _Run, train
from teacher.train_graph import StepInputs, obstacle
from tests.teacher import train_toy

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
ASKING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select", "is_nonzero", "equal"}


class NoQuestions(TorchDispatchMode):
    """Raises where a GPU's host would have to wait for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ASKING, func
        if func.overloadpacket.__name__ in ("index", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes as a GPU does."""
    monkeypatch.setattr(shapes, "fixed", lambda x: True)


def batch(rows: int = 2, micro_rows: int = 1) -> StepBatch:
    fields = {"rows": rows, "micro_rows": micro_rows, "seq_len": 64, "longest": 40, "depths": 2}
    return next(step_batches(train_toy.example, Cursor(), **fields))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_step_asks_the_device_for_nothing(fixed, optimizer: str, moments: str, tmp_path: Path) -> None:
    settings = train_toy.settings(
        optimizer=optimizer, moments=moments, bf16=True, balance_loss=0.1, mtp_recursion=1, tokens_per_step=128,
        micro_tokens=64, seq_len=64,
    )  # fmt: skip
    run = _Run(train_toy.model(), settings, tmp_path, None)
    step = batch()
    inputs = StepInputs(step, torch.device("cpu"))
    inputs.take(step, 1e-2)
    before = {name: weight.clone() for name, weight in run.live.items()}
    with NoQuestions():
        figures = run._update(run._objective(), inputs.micro, inputs.counts, inputs.rate)
    assert figures["loss"] > 1 and all(figure.isfinite().all() for figure in figures.values())
    assert all(not torch.equal(weight, before[name]) for name, weight in run.live.items())


def test_fixed_shapes_give_the_part_that_free_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    step, model = batch(micro_rows=2), train_toy.model()
    inputs = StepInputs(step, torch.device("cpu"))
    inputs.take(step, 1e-2)
    objective, balance = Objective(0.3, 0.1, False, mtp_recursion=1), LoadBalance(model)
    free = objective.part(model, balance, step.micro[0], step)
    monkeypatch.setattr(shapes, "fixed", lambda x: True)
    part = objective.part(model, balance, inputs.micro[0], inputs.counts)
    assert torch.equal(part.loads_LE, free.loads_LE) and part.figures.keys() == free.figures.keys()
    for name, figure in free.figures.items():
        torch.testing.assert_close(part.figures[name], figure)
    for ours, theirs in zip(part.gradients, free.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_rows_that_fill_up_to_16_have_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    leaves, direction = (torch.randn(3, 7, 64), torch.randn(48, 64) / 8), torch.randn(3, 7, 48)
    results = []
    for is_fixed in (False, True):
        monkeypatch.setattr(shapes, "fixed", lambda x, is_fixed=is_fixed: is_fixed)
        x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        y = linear(x, weight)
        y.backward(direction)
        results.append((y.detach(), x.grad, weight.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("tokens", [1, 70, 300])
def test_rows_beyond_the_experts_are_nobodys(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """In FP8, with room for the worst balance: whatever stands in the rows that no expert has, nothing reads it."""
    torch.manual_seed(tokens)
    indices = torch.stack((torch.zeros(tokens, dtype=torch.long), torch.randint(1, 5, (tokens,))), dim=1)
    leaves = torch.randn(tokens, 64), torch.randn(5, 64, 64) / 8, torch.randn(5, 64, 32) / 6, torch.rand(tokens, 2)
    results, dout = [], torch.randn(tokens, 64)
    for is_fixed in (False, True):
        monkeypatch.setattr(shapes, "fixed", lambda x, is_fixed=is_fixed: is_fixed)
        x, gate_up, down, weights = mine = [leaf.clone().requires_grad_() for leaf in leaves]
        out = fp8_experts(x, Routing(indices, weights, torch.empty(0)), gate_up, down)
        out.backward(dout)
        results.append([out.detach(), *(leaf.grad for leaf in mine)])
    torch.testing.assert_close(results[1], results[0])
    layout = expert_layout(indices, 5, 128)
    rows = len(layout.token_R)
    assert rows % 128 == 0 and layout.ends_E[-1] <= rows <= 2 * tokens + 5 * 127


def test_what_keeps_a_step_from_being_recorded_is_named() -> None:
    model, settings = train_toy.model(), train_toy.settings(bf16=True)
    assert obstacle(model, settings) is None
    for change, reason in (
        ({"bf16": False}, "in float32 the grouped product of the experts asks for its sizes"),
        ({"fp8": True}, "FP8 is emulated"),
        ({"seq_len": 1024}, "rows are longer than the model's context, which is checked for each batch"),
        ({"recompute": True}, "recompute is set"),
    ):
        assert obstacle(model, replace(settings, tokens_per_step=1024, micro_tokens=1024, **change)) == reason
    odd = train_toy.model(moe_intermediate_size=12)
    assert obstacle(odd, settings) == "experts whose sizes are not multiples of 8 are computed one by one"


def curve(folder: Path, name: str = "loss") -> torch.Tensor:
    return torch.tensor([json.loads(line)[name] for line in (folder / "training_log.jsonl").read_text().splitlines()])


def gpu_settings(**changes):
    """20 steps of two micro-batches."""
    fields = {"total_tokens": 2_300, "tokens_per_step": 128, "seq_len": 64, "micro_tokens": 64, "bf16": True}
    return train_toy.settings(**(fields | changes))


def gpu_model():
    return train_toy.model(q_lora_rank=32, qk_rope_head_dim=16).to("cuda")  # FP8 products take multiples of 16


@on_gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"optimizer": "adamw", "ema": 0.9, "balance_loss": 0.01},
        {"optimizer": "muon", "mtp_weight_late": 0.1, "mtp_late_from": 0.5, "mtp_recursion": 1},
        {"optimizer": "adamw", "mtp_weight": 0.0, "mtp_weight_late": 0.3, "mtp_late_from": 0.5, "moments": "bfloat16"},
        {"optimizer": "muon", "trainable": "mtp"},
        {"optimizer": "muon", "fp8": True, "moments": "bfloat16"},
    ],
)
def test_recorded_steps_are_the_steps(changes: dict, tmp_path: Path, capsys) -> None:
    models = []
    for graphs in (True, False):
        models.append(gpu_model())
        train(models[-1], train_toy.example, gpu_settings(graphs=graphs, **changes), tmp_path / str(graphs))
    assert "not recorded" not in capsys.readouterr().out
    for name in ("loss", "grad_norm"):
        recorded, eager = (curve(tmp_path / str(graphs), name) for graphs in (True, False))
        assert len(recorded) == len(eager) >= 18
        assert torch.equal(recorded, eager), (name, (recorded / eager).log())


@on_gpu
def test_runs_side_by_side_on_streams_of_their_own_do_not_touch_each_other(tmp_path: Path) -> None:
    """Products over many positions into small matrices: cuBLAS splits them, and adds the parts in its workspace."""
    models = {name: gpu_model() for name in ("alone", *"abcd")}  # seeded: one after the other
    torch.cuda.synchronize()

    def run(name: str) -> torch.Tensor:
        changes = {"tokens_per_step": 4096, "micro_tokens": 4096, "seq_len": 512, "total_tokens": 400_000}
        with torch.cuda.stream(torch.cuda.Stream()):
            train(models[name], train_toy.example, gpu_settings(optimizer="muon", **changes), tmp_path / name)
        return curve(tmp_path / name, "grad_norm")

    alone = run("alone")
    with ThreadPoolExecutor(4) as pool:
        for norms in pool.map(run, "abcd"):
            # Later steps differ by rounding (embedding's sums have no fixed order). With a workspace in common norms
            # were a hundred times too large within twenty steps.
            torch.testing.assert_close(norms[:5], alone[:5], rtol=0.01, atol=0)
            assert norms.isfinite().all() and norms.max() < 2 * alone.max()


@on_gpu
def test_a_recorded_run_is_evaluated_and_resumed(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def example(index):
        if index > 60:
            raise Stop
        return train_toy.example(index)

    def evaluate(model, step):
        return {"loss": model(torch.arange(30, device="cuda")[None] % 10).logits.float().mean().item()}

    chosen = gpu_settings(optimizer="muon", ema=0.5, eval_every=3)
    train(gpu_model(), train_toy.example, chosen, tmp_path / "whole", eval_hook=evaluate)
    with pytest.raises(Stop):
        train(gpu_model(), example, chosen, tmp_path / "part", eval_hook=evaluate)
    assert any((tmp_path / "part" / "checkpoints").iterdir())
    train(gpu_model(), train_toy.example, chosen, tmp_path / "part", eval_hook=evaluate)
    whole, part = (curve(tmp_path / name) for name in ("whole", "part"))
    assert len(whole) == len(part) and float((whole / part).log().abs().max()) < 0.1
    assert load_model(tmp_path / "part").lm_head.weight.isfinite().all()
