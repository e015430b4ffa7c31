"""The students' optimizer: torch's Muon and AdamW behind one face."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2Config, Qwen2ForCausalLM

from students.muon import MuonAdamW


def _model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def _optimizer(model):
    return MuonAdamW(model, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


def test_every_parameter_is_in_one_part_and_embeddings_are_not_orthogonalised():
    model = _model()
    muon, adamw = _optimizer(model).param_groups
    found = [id(p) for p in muon["params"] + adamw["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() == 2 for p in muon["params"])
    assert id(model.get_input_embeddings().weight) in {id(p) for p in adamw["params"]}


def test_a_scheduler_reaches_both_parts_also_after_loading_a_state():
    model = _model()
    optimizer = _optimizer(model)
    scheduler = LambdaLR(optimizer, lambda step: 0.5 ** (step + 1))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for part in optimizer._parts for group in part.param_groups] == [0.0025, 0.0025]


def test_interrupted_equals_uninterrupted():
    def run(interrupted):
        model = _model()
        optimizer = _optimizer(model)
        for step in range(4):
            if interrupted and step == 2:
                state, optimizer = optimizer.state_dict(), _optimizer(model)
                optimizer.load_state_dict(state)
            ids = torch.arange(20).reshape(2, 10) + step
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(False), run(True))
