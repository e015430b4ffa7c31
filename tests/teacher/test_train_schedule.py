"""Learning-rate schedules: the values that the papers name."""

from itertools import pairwise

import pytest

from teacher.schedule import learning_rate_factor

TOTAL = 1_000_000


def test_multi_step_drops_where_deepseek_llm_does() -> None:
    def at(tokens: int) -> float:
        return learning_rate_factor("multi_step", tokens, TOTAL, warmup_tokens=20_000)

    assert at(10_000) == pytest.approx(0.5)
    assert [at(t) for t in (20_000, 500_000, 799_999)] == [1.0, 1.0, 1.0]
    assert [at(t) for t in (800_000, 899_999)] == [0.316, 0.316]
    assert [at(t) for t in (900_000, 999_999, 2_000_000)] == [0.1, 0.1, 0.1]


def test_cosine_goes_from_one_to_the_final_fraction_after_warmup() -> None:
    def at(tokens: int) -> float:
        return learning_rate_factor("cosine", tokens, TOTAL, warmup_tokens=100_000, final_fraction=0.1)

    assert at(100_000) == pytest.approx(1.0)
    assert at(550_000) == pytest.approx(0.55)
    assert at(TOTAL) == pytest.approx(0.1)


def test_wsd_is_constant_then_linear() -> None:
    def at(tokens: int) -> float:
        return learning_rate_factor("wsd", tokens, TOTAL, decay_fraction=0.2, final_fraction=0.0)

    assert [at(t) for t in (0, 400_000, 800_000)] == pytest.approx([1.0, 1.0, 1.0])
    assert [at(t) for t in (850_000, 900_000, TOTAL)] == pytest.approx([0.75, 0.5, 0.0])
    assert learning_rate_factor("wsd", TOTAL, TOTAL, decay_fraction=0.0) == 1.0


@pytest.mark.parametrize("schedule", ["multi_step", "cosine", "wsd", "constant"])
def test_no_schedule_starts_at_zero_or_rises_after_warmup(schedule: str) -> None:
    factors = [
        learning_rate_factor(schedule, t, TOTAL, warmup_tokens=50_000, final_fraction=0.1)
        for t in range(0, TOTAL + 1, 10_000)
    ]
    assert factors[0] > 0
    assert all(b >= a for a, b in pairwise(factors[:6]))
    assert all(b <= a + 1e-12 for a, b in pairwise(factors[5:]))


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'linear'; expected one of multi_step"):
        learning_rate_factor("linear", 0, TOTAL)  # type: ignore[arg-type]
