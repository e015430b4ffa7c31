"""The training loop: that it learns, that the cut into micro-batches and rows does not show, and what it writes."""

import json
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from teacher import load_model
from teacher.balance import LoadBalance
from teacher.batches import Cursor, Example, StepBatch, step_batches
from teacher.objective import Objective
from teacher.train import train
from tests.teacher import train_toy


@pytest.fixture(autouse=True)
def two_threads():
    """So that micro-batches run side by side, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def step_batch(rows: int, micro_rows: int, seq_len: int = 128) -> StepBatch:
    fields = {"rows": rows, "micro_rows": micro_rows, "seq_len": seq_len, "longest": 40, "depths": 1}
    return next(step_batches(train_toy.example, Cursor(), **fields))


def test_loss_falls_and_everything_is_logged(tmp_path: Path) -> None:
    calls = []

    def evaluate(model, step):
        assert not model.training
        calls.append(step)
        return {"score": step / 10}

    settings = train_toy.settings(total_tokens=16_000, warmup_tokens=1_000, eval_every=20)
    result = train(train_toy.model(), train_toy.example, settings, tmp_path, eval_hook=evaluate)
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, result.steps + 1))
    assert rows[0]["loss"] > 3 and rows[-1]["loss"] < 0.1
    assert rows[-1]["mtp_loss"] < 0.3 and rows[-1]["mtp_acceptance"] > 0.9 and rows[-1]["accuracy"] > 0.97
    assert rows[0]["lr"] < rows[10]["lr"] and rows[-1]["lr"] == pytest.approx(0.1 * settings.learning_rate)
    for row in rows:
        assert len(row["max_vio"]) == 3 and row["max_vio_mean"] == pytest.approx(sum(row["max_vio"]) / 3, rel=1e-4)
        assert row["tokens_per_second"] > 0 and 0 <= row["padding_fraction"] < 0.3 and row["grad_norm"] > 0
    assert all(a["tokens"] < b["tokens"] and a["seconds"] <= b["seconds"] for a, b in pairwise(rows))
    assert calls == [*range(20, result.steps, 20), result.steps]
    assert [row["step"] for row in rows if "eval" in row] == calls
    assert result.last == rows[-1] and result.tokens == rows[-1]["tokens"] >= settings.total_tokens
    assert rows[-2]["tokens"] < settings.total_tokens

    saved = load_model(tmp_path)
    assert saved.lm_head.weight.dtype == torch.bfloat16
    ids = torch.tensor([[7, 8, 9, 0, 1, 2]])
    assert saved(ids).logits[0, -1].argmax() == 3


def test_accumulated_micro_batches_are_the_whole_batch(tmp_path: Path) -> None:
    folders = [tmp_path / "whole", tmp_path / "accumulated"]
    models = [train_toy.model() for _ in folders]
    settings = train_toy.settings(total_tokens=600, tokens_per_step=512, balance_loss=0.1)
    for folder, model, micro_tokens in zip(folders, models, (512, 128), strict=True):
        train(model, train_toy.example, replace(settings, micro_tokens=micro_tokens), folder)
    first, second = (log(folder) for folder in folders)
    assert len(first) == len(second) == 2
    assert first[0]["max_vio"] == second[0]["max_vio"]  # the same loads
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm", "accuracy"):
        assert first[0][name] == pytest.approx(second[0][name], rel=1e-5)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_packed_rows_have_the_losses_of_their_examples_alone() -> None:
    model = train_toy.model()
    step = step_batch(rows=3, micro_rows=3)
    _, part = Objective(1.0, 0.0, False).loss(model, LoadBalance(model), step.micro[0], step)
    main, mtp = [], []
    for index in step.indices:
        example = train_toy.example(index)
        ids = torch.tensor([example["input_ids"]])
        out = model(ids, mtp=True)
        start = example["loss_start"]
        main.append(F.cross_entropy(out.logits[0, start - 1 : -1], ids[0, start:], reduction="sum"))
        mtp.append(F.cross_entropy(out.mtp_logits[0][0, :-1], ids[0, 2:], reduction="sum"))
    assert part.figures["loss"].item() == pytest.approx((sum(main) / step.losses[0]).item(), rel=1e-5)
    assert part.figures["mtp_loss"].item() == pytest.approx((sum(mtp) / step.losses[1]).item(), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_a_gpu_computes_the_same_part() -> None:
    step = step_batch(rows=2, micro_rows=2)
    parts = []
    for device in ("cpu", "cuda"):
        model = train_toy.model().to(device)
        micro = step.micro[0].to(torch.device(device))
        parts.append(Objective(0.3, 0.1, False).part(model, LoadBalance(model), micro, step))
    assert torch.equal(parts[0].loads_LE, parts[1].loads_LE.cpu())
    assert parts[0].figures["loss"].item() == pytest.approx(parts[1].figures["loss"].item(), rel=1e-5)
    for one, other in zip(parts[0].gradients, parts[1].gradients, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_padding_takes_no_part(tmp_path: Path) -> None:
    """Longer rows of the same examples: the same loss, gradient and loads."""
    results = []
    for seq_len in (128, 160):
        model = train_toy.model()
        step = step_batch(rows=1, micro_rows=1)
        micro = step.micro[0]
        pad = seq_len - 128
        micro = replace(
            micro,
            input_ids_BT=F.pad(micro.input_ids_BT, (0, pad), value=5),
            position_ids_BT=F.pad(micro.position_ids_BT, (0, pad)),
            segment_ids_BT=F.pad(micro.segment_ids_BT, (0, pad)),
            targets_BT=F.pad(micro.targets_BT, (0, pad), value=-100),
        )
        part = Objective(0.3, 0.1, False).part(model, LoadBalance(model), micro, step)
        results.append((part.figures, part.loads_LE, part.gradients))
    torch.testing.assert_close(results[0], results[1])


def test_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    """A hook that runs the model, in between, draws random numbers and is hungry: the same weights come out."""

    def evaluate(model, step):
        torch.rand(7)
        return {"loss": model(torch.randint(10, (8, 30)), mtp=True).logits.mean().item()}

    weights = []
    for every in (0, 2):
        model = train_toy.model()
        settings = train_toy.settings(total_tokens=2_000, eval_every=every, ema=0.5)
        train(model, train_toy.example, settings, tmp_path / str(every), eval_hook=evaluate if every else None)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(weights[0][name].any() for name in weights[0] if "correction_bias" in name)


def test_the_average_of_the_weights_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    seen = {}

    def evaluate(model, step):
        seen[step] = model.lm_head.weight.detach().clone()
        return {}

    settings = train_toy.settings(total_tokens=800, eval_every=1, checkpoint_every=1)
    plain = train_toy.model()
    initial = plain.lm_head.weight.detach().clone()
    train(plain, train_toy.example, settings, tmp_path / "plain", eval_hook=evaluate)
    live = dict(seen)
    average = initial
    averaged = train_toy.model()
    train(averaged, train_toy.example, replace(settings, ema=0.3), tmp_path / "ema", eval_hook=evaluate)
    for step in sorted(live):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * live[step]
        torch.testing.assert_close(seen[step], average)
    torch.testing.assert_close(averaged.lm_head.weight.detach(), average)
    saved = load_model(tmp_path / "ema").lm_head.weight
    assert torch.equal(saved, averaged.lm_head.weight.to(torch.bfloat16))


def test_the_mtp_weight_drops_late_and_zero_leaves_the_module_alone(tmp_path: Path) -> None:
    model = train_toy.model()
    before = {n: p.detach().clone() for n, p in model.model.layers[-1].named_parameters()}
    train(model, train_toy.example, train_toy.settings(total_tokens=500, mtp_weight=0.0), tmp_path)
    assert all(torch.equal(before[n], p) for n, p in model.model.layers[-1].named_parameters())
    assert "mtp_loss" not in log(tmp_path)[0]

    norms = []
    for late in (None, 0.0):
        settings = train_toy.settings(total_tokens=1_500, mtp_weight_late=late, mtp_late_from=0.5, checkpoint_every=99)
        train(train_toy.model(), train_toy.example, settings, tmp_path / str(late))
        norms.append([row["grad_norm"] for row in log(tmp_path / str(late))])
    changed = [a != b for a, b in zip(*norms, strict=True)]
    tokens = [0] + [row["tokens"] for row in log(tmp_path / "None")]
    assert changed.index(True) == next(i for i, t in enumerate(tokens) if t >= 750)


def test_bf16_autocast_keeps_float32_weights_and_learns(tmp_path: Path) -> None:
    model = train_toy.model()
    result = train(model, train_toy.example, train_toy.settings(total_tokens=6_000, bf16=True), tmp_path)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert result.last["loss"] < 1.0 < log(tmp_path)[0]["loss"]


def test_weight_decay_is_on_matrices_only(tmp_path: Path) -> None:
    """A head of zeros sends no gradient back: what moves below it moved by decay alone."""
    model = train_toy.model()
    model.lm_head.weight.data.zero_()
    before = {name: p.detach().clone() for name, p in model.model.layers[1].named_parameters()}
    train(model, train_toy.example, train_toy.settings(total_tokens=1, mtp_weight=0.0), tmp_path)
    for name, parameter in model.model.layers[1].named_parameters():
        expected = before[name] * (1 - 1e-2 * 0.1) if parameter.dim() > 1 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
    assert {p.dim() for p in before.values()} == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"total_tokens": 0}, "training setting total_tokens is 0; expected at least 1"),
        ({"schedule": "linear"}, "training setting schedule is 'linear'; expected one of multi_step"),
        ({"ema": 1.0}, "training setting ema is 1.0; expected at least 0 and below 1"),
        ({"micro_tokens": 100}, r"training setting micro_tokens is 100; expected at least seq_len \(128\)"),
    ],
)
def test_a_setting_out_of_bounds_is_named(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train_toy.settings(**changes)


def test_a_diverged_run_stops_without_a_checkpoint_of_it(tmp_path: Path) -> None:
    model = train_toy.model()
    settings = train_toy.settings(total_tokens=4_000, log_every=1, checkpoint_every=3)

    def poison(model, step):
        if step == 4:
            model.lm_head.weight.data.fill_(float("nan"))
        return {}

    with pytest.raises(ValueError, match=r"at step 5 the loss is nan .* lower learning_rate"):
        train(model, train_toy.example, replace(settings, eval_every=1), tmp_path, eval_hook=poison)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_bf16_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not float32"):
        train(train_toy.model().to(torch.bfloat16), train_toy.example, train_toy.settings(), tmp_path)


def test_an_example_longer_than_the_model_context_is_refused(tmp_path: Path) -> None:
    model = train_toy.model(max_position_embeddings=16)
    with pytest.raises(ValueError, match="at most 16 fit seq_len and the model's context"):
        train(model, train_toy.example, train_toy.settings(), tmp_path)


def test_batches_are_prepared_in_the_order_of_the_stream(tmp_path: Path) -> None:
    """The example function is called from one thread, each index in order but for those set aside."""
    drawn: list[int] = []

    def noting(index: int) -> Example:
        drawn.append(index)
        return train_toy.example(index)

    train(train_toy.model(), noting, train_toy.settings(total_tokens=1_000), tmp_path)
    first = list(dict.fromkeys(drawn))
    assert first == list(range(len(first)))
    fields = {"rows": 2, "micro_rows": 2, "seq_len": 128, "longest": 128}
    steps = list(islice(step_batches(train_toy.example, Cursor(), **fields), 3))
    assert steps[0].indices[0] == 0
