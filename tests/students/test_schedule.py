import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from students.schedule import lr_factor, lr_scheduler


def test_multi_step_drops_at_80_and_90_percent_of_the_steps() -> None:
    factors = [lr_factor("multi_step", step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert factors[5:80] == [1.0] * 75
    assert factors[80:90] == [0.316] * 10
    assert factors[90:] == [0.1] * 10


@pytest.mark.parametrize("total", [1, 7, 10, 15, 33, 47, 101, 1000])
def test_multi_step_drops_at_the_first_step_past_the_bound(total: int) -> None:
    factors = [lr_factor("multi_step", step, total, 0.0) for step in range(total)]
    for step, factor in enumerate(factors):
        assert factor == (0.1 if step * 10 >= total * 9 else 0.316 if step * 10 >= total * 8 else 1.0)


def test_cosine_is_transformers_cosine_over_a_floor_of_a_tenth() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=99)
    for step in range(100):
        assert lr_factor("cosine", step, 100, 0.0) == pytest.approx(0.1 + 0.9 * theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_constant_stays() -> None:
    assert {lr_factor("constant", step, 50, 0.0) for step in range(50)} == {1.0}


def test_scheduler_sets_the_factor_on_every_group() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0},
                                 {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 4.0}])  # fmt: skip
    scheduler = lr_scheduler(optimizer, "multi_step", 10, 0.1)
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [rate for rate, _ in seen] == [1.0, *[2.0] * 7, 0.632, 0.2]
    assert [rate for _, rate in seen] == [2.0, *[4.0] * 7, 1.264, 0.4]


def test_unknown_schedule_is_named() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="'linear' is not known; expected multi_step, cosine or constant"):
        lr_scheduler(optimizer, "linear", 10, 0.0)  # type: ignore[arg-type]
