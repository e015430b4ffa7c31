"""FP8 training: each product against its definition and against fp32, the modules that take part, the bf16 averages."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from teacher.adamw import AdamW
from teacher.checkpoint import is_fp8_matrix
from teacher.experts import reference_experts
from teacher.fp8 import dequantize, quantize
from teacher.fp8_training import experts, fp8_products, linear
from teacher.routing import Routing
from teacher.train import train
from teacher.train_settings import TrainSettings
from tests.teacher import train_toy


def fake(x, block):
    return dequantize(*quantize(x, block), torch.float32, block)


def relative(found, truth):
    assert truth.norm() > 0
    return float((found - truth).norm() / truth.norm())


def definition(x, w, dy):
    """Forward, gradient of input and of weight, each operand quantised as the paper says."""
    y = fake(x, (1, 128)) @ fake(w, (128, 128)).T
    dx = fake(dy, (1, 128)) @ fake(w, (128, 128))
    dw = fake(dy, (128, 1)).T @ fake(fake(x, (1, 128)), (128, 1))
    return y, dx, dw


@pytest.mark.parametrize("rows", [1, 127, 128, 577])
@pytest.mark.parametrize(("inner", "outer"), [(64, 40), (300, 129)])
def test_a_linear_layer_and_its_gradients_are_the_definition_and_near_fp32(rows, inner, outer):
    generator = torch.Generator().manual_seed(rows + inner)
    x = torch.randn(rows, inner, generator=generator) * torch.exp2(torch.randn(rows, 1, generator=generator))
    w = torch.randn(outer, inner, generator=generator) / inner**0.5
    dy = torch.randn(rows, outer, generator=generator) * 1e-4  # as small as gradients are: scales, not range, carry it
    leaf_x, leaf_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = linear(leaf_x, leaf_w)
    y.backward(dy)
    found = (y.detach(), leaf_x.grad, leaf_w.grad)
    truth = (x @ w.T, dy @ w, dy.T @ x)
    assert leaf_w.grad.dtype == torch.float32
    # Two operands rounded to 4 significant bits: 2.6% each on average; the weight's gradient has a third rounding.
    for value, expected, exact, bound in zip(found, definition(x, w, dy), truth, (0.045, 0.045, 0.055), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
        assert relative(value, exact) < bound


def test_what_is_kept_for_the_backward_pass_is_fp8():
    kept = []
    x, w = torch.randn(4, 64, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, w)
    assert {t.dtype for t in kept if t.numel() > 1000} == {torch.float8_e4m3fn}
    # Values, a scale for 128 of x, a scale for 128 x 128 of w.
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() + x.numel() // 32 + w.numel() + 4 * 2


def test_under_autocast_the_input_is_bf16_and_the_weight_is_quantised_from_float32():
    x, w = torch.randn(8, 128), torch.randn(64, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, w)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    expected = fake(x.bfloat16().float(), (1, 128)) @ fake(w.detach(), (128, 128)).T
    torch.testing.assert_close(y.detach(), expected.bfloat16(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 70, 300])
def test_experts_are_the_linear_layers_one_by_one(tokens):
    """Expert 2 gets nothing, expert 0 nearly everything; rows of others and filling rows touch no scale."""
    torch.manual_seed(tokens)
    hidden, inner, count = 256, 128, 5
    gate_up = torch.randn(count, 2 * inner, hidden) / hidden**0.5
    down = torch.randn(count, hidden, inner) / inner**0.5
    indices = torch.stack((torch.zeros(tokens, dtype=torch.long), torch.randint(0, 2, (tokens,)) * 2 + 1), dim=1)
    weights = torch.rand(tokens, 2)
    x = torch.randn(tokens, hidden)
    x[0] *= 1000  # filling rows are copies of token 0: were they seen, they would set the scales
    mine = [t.clone().requires_grad_() for t in (x, gate_up, down, weights)]
    out = experts(mine[0], Routing(indices, mine[3], torch.empty(0)), mine[1], mine[2])
    dout = torch.randn_like(out)
    out.backward(dout)
    theirs = [t.clone().requires_grad_() for t in (x, gate_up, down, weights)]
    total = torch.zeros_like(x)
    for expert in range(count):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        if len(token):
            gate, up = linear(theirs[0][token], theirs[1][expert]).chunk(2, dim=-1)
            one = linear(F.silu(gate) * up, theirs[2][expert])
            total = total.index_add(0, token, one * theirs[3][token, slot, None])
    total.backward(dout)
    torch.testing.assert_close(out, total, rtol=1e-3, atol=1e-3 * float(total.detach().abs().mean()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().mean()))
    assert not mine[1].grad[2].any()  # no rows, no gradient, and no NaN
    if tokens > 1:  # three rounded products: 3.7% each; the first token is so large that it would be the whole norm
        assert relative(out.detach()[1:], reference_experts(x, indices, weights, gate_up, down)[1:]) < 0.08


def test_the_projections_that_an_fp8_checkpoint_holds_take_part_and_become_themselves_again():
    model = train_toy.model()
    before = {name: type(module) for name, module in model.named_modules()}
    names = set(model.state_dict())
    with fp8_products(model):
        changed = {name for name, module in model.named_modules() if type(module) is not before[name]}
        assert set(model.state_dict()) == names
    assert {name: type(module) for name, module in model.named_modules()} == before
    linears = {name for name, kind in before.items() if kind is torch.nn.Linear}
    assert changed & linears == {name for name in linears if is_fp8_matrix(name + ".weight")}
    assert "lm_head" not in changed and any(name.endswith("mlp.experts") for name in changed)


@pytest.fixture
def two_threads():
    """They decide the order of sums, and the bound below was measured by two. After one step one thread's weights are
    2e-8 from two threads'; after four 5e-3, where float32's are 1e-5: a last bit apart is another FP8 code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_training_in_fp8_follows_float32_and_resumes_bit_for_bit(tmp_path, two_threads):
    settings = {"fp8": True, "moments": "bfloat16", "total_tokens": 6_000}
    whole = train(train_toy.model(), train_toy.example, train_toy.settings(**settings), tmp_path / "whole")
    plain = train(train_toy.model(), train_toy.example, train_toy.settings(total_tokens=6_000), tmp_path / "plain")
    logs = [(run.folder / "training_log.jsonl").read_text().splitlines() for run in (whole, plain)]
    curves = [torch.tensor([json.loads(line)["loss"] for line in log]) for log in logs]
    assert curves[0][0] != curves[1][0]  # it did run in FP8
    assert float((curves[0] / curves[1]).log()[:7].abs().max()) < 0.1 and curves[0][-1] < 0.02

    class Stop(Exception):
        pass

    def example(index):
        if index > 150:
            raise Stop
        return train_toy.example(index)

    with pytest.raises(Stop):
        train(train_toy.model(), example, train_toy.settings(**settings), tmp_path / "part")
    assert any((tmp_path / "part" / "checkpoints").iterdir())
    train(train_toy.model(), train_toy.example, train_toy.settings(**settings), tmp_path / "part")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("part", "whole"))
    assert all(torch.equal(ours[name].view(torch.int16), theirs[name].view(torch.int16)) for name in theirs)


def test_bfloat16_averages_are_torch_adamw_up_to_their_rounding():
    torch.manual_seed(0)
    start = torch.randn(40, 30)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    group = {"lr": 1e-2, "betas": (0.9, 0.95)}
    mine = AdamW([{"params": [ours], "weight_decay": 0.1}], moments=torch.bfloat16, **group)
    torchs = torch.optim.AdamW([theirs], weight_decay=0.1, **group)
    for _ in range(30):
        gradient = torch.randn_like(start)
        for weight, optimizer in ((ours, mine), (theirs, torchs)):
            weight.grad = gradient.clone()
            optimizer.step()
    assert mine.state[ours]["exp_avg_sq"].dtype == torch.bfloat16 and ours.dtype == torch.float32
    moved = (theirs - start).detach().norm()
    assert 0 < float((ours - theirs).detach().norm() / moved) < 0.01


def test_averages_too_slow_for_bfloat16_are_refused():
    with pytest.raises(ValueError, match=r"betas is \(0.9, 0.999\); expected at most 0.99 where moments are bfloat16"):
        TrainSettings(total_tokens=1, moments="bfloat16", betas=(0.9, 0.999))
