"""Multi-token prediction in training: loss and gradient are the paper's equations, and modules can be trained alone."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from teacher import load_model
from teacher.balance import LoadBalance
from teacher.batches import Cursor, Example, StepBatch, step_batches
from teacher.model import DeepseekV3
from teacher.objective import Objective
from teacher.rope import rotation_table
from teacher.train import train
from tests.teacher import train_toy

WEIGHT = 0.3


def one_example(depths: int) -> StepBatch:
    """One unpadded example in one row: equations without segments hold for it as they stand."""
    ids = train_toy.example(1)["input_ids"]
    fields = {"rows": 1, "micro_rows": 1, "seq_len": len(ids), "longest": len(ids), "depths": depths}
    return next(step_batches(lambda _: {"input_ids": ids, "loss_start": 1}, Cursor(), **fields))


def chain(model: DeepseekV3, ids_1T: torch.Tensor, depths: int, embeddings: list, heads: list) -> torch.Tensor:
    """DeepSeek-V3 eq. 21-25, with an embedding table and a head of its own for the main model and for every depth."""
    length = ids_1T.shape[1]
    cos, sin = (table[None, :length] for table in rotation_table(model.config, length))
    x = F.embedding(ids_1T, embeddings[0])
    for layer in model.main_layers:
        x = layer(x, cos, sin, None)[0]
    h = model.model.norm(x)
    loss = F.cross_entropy(F.linear(h[0, :-1], heads[0]), ids_1T[0, 1:])
    for k in range(1, depths + 1):
        module = model.mtp_layers[min(k, len(model.mtp_layers)) - 1]
        kept = length - k
        embedded = F.embedding(ids_1T[:, k:], embeddings[k])
        joined = torch.cat((module.enorm(embedded), module.hnorm(h[:, :kept])), dim=-1)
        h = module(module.eh_proj(joined), cos[:, :kept], sin[:, :kept], None)[0]
        logits = F.linear(module.shared_head.norm(h)[0, :-1], heads[k])
        loss = loss + WEIGHT / depths * F.cross_entropy(logits, ids_1T[0, k + 1 :])
    return loss


@pytest.mark.parametrize(("modules", "recursion"), [(1, 0), (2, 0), (1, 2)])
def test_loss_and_gradient_are_the_papers(modules: int, recursion: int) -> None:
    """The shared embedding and head get the sum of what the main model and each depth would send to their own."""
    model, depths = train_toy.model(num_nextn_predict_layers=modules), modules + recursion
    step = one_example(depths)
    objective = Objective(WEIGHT, 0.0, False, recursion)
    loss, part = objective.loss(model, LoadBalance(model), step.micro[0], step)
    gradients = torch.autograd.grad(loss, [model.model.embed_tokens.weight, model.lm_head.weight])

    copies = [
        [table.weight.detach().clone().requires_grad_() for _ in range(depths + 1)]
        for table in (model.model.embed_tokens, model.lm_head)
    ]
    expected = chain(model, step.micro[0].input_ids_BT, depths, *copies)
    torch.testing.assert_close(loss, expected)
    for gradient, own in zip(gradients, copies, strict=True):
        sent = torch.autograd.grad(expected, own, retain_graph=True)
        assert all(each.any() for each in sent)
        torch.testing.assert_close(gradient, sum(sent), rtol=1e-4, atol=1e-6)
    total = part.figures["loss"] + WEIGHT * part.figures["mtp_loss"]
    torch.testing.assert_close(total, loss.detach())


def test_two_depths_share_one_embedding_and_head_through_training_and_disk(tmp_path: Path) -> None:
    model = train_toy.model(num_nextn_predict_layers=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert sum("embed_tokens" in name or "lm_head" in name for name in before) == 2
    result = train(model, train_toy.example, train_toy.settings(total_tokens=12_000), tmp_path)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert result.last["mtp_acceptance"] > 0.9 and result.last["mtp_acceptance_2"] > 0.8
    # DeepSeek's files repeat the shared tensors in every module's layer.
    stored = load_file(tmp_path / "model.safetensors")
    for layer in (3, 4):
        assert torch.equal(stored[f"model.layers.{layer}.embed_tokens.weight"], stored["model.embed_tokens.weight"])
        assert torch.equal(stored[f"model.layers.{layer}.shared_head.head.weight"], stored["lm_head.weight"])
    ids = torch.tensor([train_toy.example(3)["input_ids"]])
    loaded = load_model(tmp_path, dtype=torch.float32)
    rounded = train_toy.model(num_nextn_predict_layers=2)
    rounded.load_state_dict({n: t.bfloat16().float() if t.dim() > 1 else t for n, t in model.state_dict().items()})
    for one, other in zip(loaded(ids, mtp=True).mtp_logits, rounded(ids, mtp=True).mtp_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_the_mtp_modules_alone_leaves_every_other_bit(optimizer: str, tmp_path: Path) -> None:
    """Weight decay, averaging, clipping, balance and the final bf16 file included."""
    train_toy.model().save_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    model = load_model(tmp_path / "start", dtype=torch.float32)
    LoadBalance(model).routers[0].e_score_correction_bias += torch.linspace(-0.1, 0.1, 8)
    model.save_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    settings = train_toy.settings(
        trainable="mtp", mtp_recursion=1, total_tokens=6_000, optimizer=optimizer, ema=0.5, balance_loss=0.01
    )
    result = train(model, train_toy.example, settings, tmp_path / "out")
    own = {name for name in before if name.startswith("model.layers.3.")}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == own
    assert all(p.requires_grad for p in model.parameters())  # as it was
    start, out = (load_file(tmp_path / folder / "model.safetensors") for folder in ("start", "out"))
    shared = ("embed_tokens", "shared_head.head")
    changed = {name for name in start if not torch.equal(start[name].float(), out[name].float())}
    assert changed and all(
        name.startswith("model.layers.3.") and not any(s in name for s in shared) for name in changed
    )
    rows = [json.loads(line) for line in (tmp_path / "out/training_log.jsonl").read_text().splitlines()]
    assert result.last["mtp_loss"] < 0.5 * rows[0]["mtp_loss"]


def sums(index: int) -> Example:
    """Each token is the sum of the two before, modulo five: a module that only ever read the main model's hidden states
    cannot go on from its own."""
    rng = random.Random(index)
    ids = [rng.randrange(5), rng.randrange(5)]
    for _ in range(rng.randint(8, 30)):
        ids.append((ids[-1] + ids[-2]) % 5)
    return {"input_ids": ids, "loss_start": 2}


def test_recursive_training_teaches_a_module_to_read_its_own_output(tmp_path: Path) -> None:
    losses = []
    for recursion in (0, 2):
        model = train_toy.model()
        settings = train_toy.settings(total_tokens=10_000, mtp_recursion=recursion)
        result = train(model, sums, settings, tmp_path / str(recursion))
        assert ("mtp_acceptance_3" in result.last) == (recursion == 2)
        fields = {"rows": 4, "micro_rows": 4, "seq_len": 128, "longest": 40, "depths": 3}
        step = next(step_batches(lambda index: sums(10**6 + index), Cursor(), **fields))
        with torch.no_grad():
            _, part = Objective(WEIGHT, 0.0, False, 2).loss(model, LoadBalance(model), step.micro[0], step)
        losses.append(part.figures["mtp_loss"].item())
    assert losses[1] < 0.5 < 1.0 < losses[0]


def test_recursion_counts_loads_of_all_its_steps() -> None:
    model = train_toy.model()
    step = one_example(3)
    length = step.tokens
    loads = [
        Objective(WEIGHT, 0.0, False, recursion).part(model, LoadBalance(model), step.micro[0], step).loads_LE
        for recursion in (0, 2)
    ]
    assert torch.equal(loads[0][:2], loads[1][:2])
    assert loads[0][2].sum() == 2 * (length - 1)
    assert loads[1][2].sum() == 2 * (length - 1 + length - 2 + length - 3)


@pytest.mark.parametrize("changes", [{"trainable": "mtp"}, {"mtp_recursion": 1}])
def test_a_model_without_a_module_is_refused(changes: dict, tmp_path: Path) -> None:
    model = train_toy.model(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="the model has no MTP module, which trainable: mtp and mtp_recursion ask for"):
        train(model, train_toy.example, train_toy.settings(**changes), tmp_path)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["mtp_weight", "mtp_weight_late"])
def test_a_weight_of_zero_with_nothing_else_to_train_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"training setting {name} is 0.0; expected above 0 where trainable is mtp"):
        train_toy.settings(**{"trainable": "mtp", name: 0.0})
