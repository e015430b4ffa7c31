"""The sampler by kernels draws what the sampler draws."""

import pytest
import torch

pytest.importorskip("triton")

from teacher.kernels.draw import WHOLE, draw_likely
from teacher.sampling import Settings, sample, sample_likely

ROWS = 60


def settings(device, **values):
    given = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | values
    floats = [torch.full((ROWS,), given[name], device=device) for name in ("temperature", "top_p", "min_p")]
    top_k = torch.full((ROWS,), given["top_k"], dtype=torch.int64, device=device)
    seed = torch.randint(-(2**62), 2**62, (ROWS,), device=device)
    return Settings(floats[0], floats[1], top_k, floats[2], seed)


@pytest.mark.parametrize(
    "vocabulary", [50, 128, 300, 405, 1024, 1025, 9000] if torch.cuda.is_available() else [50, 300, 9000]
)
@pytest.mark.parametrize(
    "limits",
    [
        {}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 64}, {"top_k": 70}, {"min_p": 0.1}, {"temperature": 0.0},
        {"top_p": 0.5, "top_k": 40, "min_p": 0.05}, {"temperature": 2.0, "top_p": 0.95},
    ],
)  # fmt: skip
def test_the_same_tokens(vocabulary, limits, device):
    torch.manual_seed(vocabulary)
    logits = (torch.randn(ROWS, vocabulary, device=device) * 4).contiguous()
    logits[::7] *= 10  # nearly all on one token
    how = settings(device, **limits)
    counter = torch.arange(ROWS, device=device)
    found, sure = draw_likely(logits, how, counter)
    expected, sure_expected = sample_likely(logits, how, counter)
    if vocabulary <= WHOLE:  # all of it is looked at
        assert sure.all()
        assert (found == sample(logits, how, counter)).float().mean() >= 0.98
        return
    # The sums are added in another order: a draw or a limit on a border may fall to its other side.
    mass = (logits / how.temperature_B.clamp_min(1e-6)[:, None]).softmax(-1).topk(min(64, vocabulary)).values.sum(-1)
    clear = (mass - how.top_p_B).abs() > 1e-5  # top-p 1 is a border itself where the likeliest are nearly all
    assert (sure.bool() == sure_expected)[clear].all()
    assert (found == expected).float().mean() >= 0.98
    assert len(found.unique()) > 10


@pytest.mark.parametrize("vocabulary", [300, 9000])
def test_rows_of_one_request_count_on(vocabulary, device):
    """Settings and counters of a sequence for several rows, as a round that verifies drafts has them."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, vocabulary, device=device).mul_(4).contiguous()
    how, counter = settings(device, top_p=0.9), torch.arange(ROWS, device=device) * 7
    few = Settings(*(each[: ROWS // 5].contiguous() for each in how))
    found = draw_likely(logits, few, counter[: ROWS // 5].contiguous(), repeat=5, offset=2)
    many = Settings(*(each.repeat_interleave(5) for each in few))
    numbers = counter[: ROWS // 5].repeat_interleave(5) + torch.arange(5, device=device).repeat(ROWS // 5) + 2
    assert torch.equal(found, draw_likely(logits, many, numbers))
    with pytest.raises(ValueError, match="12 values for 60 rows; taken: one for 4 of them"):
        draw_likely(logits, few, counter, repeat=4)


def test_equal_logits_go_by_their_ids(device, monkeypatch):
    """As in a stable sort: bf16 makes many equal, and a draw must not depend on how they happen to be sorted."""
    monkeypatch.setattr("teacher.sampling.CANDIDATES", 400)  # the sampler sorts all, stably
    torch.manual_seed(0)
    logits = torch.randn(ROWS, 400, device=device).mul_(2).round_().bfloat16()
    for limits in ({}, {"top_k": 7}, {"top_p": 0.6}):
        how, counter = settings(device, **limits), torch.arange(ROWS, device=device)
        found, sure = draw_likely(logits, how, counter)
        assert sure.all() and (found == sample(logits.float(), how, counter)).float().mean() >= 0.98


def test_equal_logits_and_bf16(device):
    """At temperature 0 the first of the largest, as argmax has it; in bf16 many are equal."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, 5000, device=device).mul_(2).round_().bfloat16()
    how, counter = settings(device, temperature=0.0), torch.zeros(ROWS, dtype=torch.int64, device=device)
    found, sure = draw_likely(logits, how, counter)
    assert torch.equal(found, (logits.float() == logits.float().amax(-1, keepdim=True)).int().argmax(-1)) and sure.all()


def test_every_seed_its_own_draw(device):
    logits = torch.zeros(ROWS, 100, device=device)
    how = settings(device, temperature=1.0)
    first, _ = draw_likely(logits, how, torch.zeros(ROWS, dtype=torch.int64, device=device))
    again, _ = draw_likely(logits, how, torch.zeros(ROWS, dtype=torch.int64, device=device))
    later, _ = draw_likely(logits, how, torch.ones(ROWS, dtype=torch.int64, device=device))
    assert torch.equal(first, again) and not torch.equal(first, later) and len(first.unique()) > 25
    with pytest.raises(ValueError, match="temperature_B is float64; taken: float32"):
        draw_likely(logits, how._replace(temperature_B=how.temperature_B.double()), first)
