"""Learning-rate schedules over a budget of tokens.

All are a factor on the peak rate, a pure function of the share of the budget already seen, so that a resumed run
needs no scheduler state and a run of another batch size follows the same curve.
"""

import math
from typing import Literal, get_args

Schedule = Literal["multi_step", "cosine", "wsd", "constant"]


def learning_rate_factor(
    schedule: Schedule,
    tokens_seen: int,
    total_tokens: int,
    *,
    warmup_tokens: int = 0,
    decay_fraction: float = 0.2,
    final_fraction: float = 0.1,
) -> float:
    """The factor in (0, 1] for the step that starts after `tokens_seen` tokens.

    multi_step  DeepSeek LLM (arXiv 2401.02954, section 2.3): 1 until 80% of the tokens, then 31.6%, 10% from 90%.
    cosine      half a cosine from 1 to `final_fraction`.
    wsd         constant, then linear to `final_fraction` over the last `decay_fraction` of the tokens: an
                undecayed checkpoint can be trained further, as with multi_step, and the decay is as short as wanted.
    constant    1.
    Each after a linear warm-up over `warmup_tokens`. ValueError on an unknown name.
    """
    if tokens_seen < warmup_tokens:
        # Not 0: a first step at rate 0 would only spend its tokens.
        return max(tokens_seen, 0.01 * warmup_tokens) / warmup_tokens
    done = min(1.0, tokens_seen / total_tokens)
    if schedule == "constant":
        return 1.0
    if schedule == "multi_step":
        return 1.0 if done < 0.8 else 0.316 if done < 0.9 else 0.1
    if schedule == "cosine":
        warm = warmup_tokens / total_tokens
        through = (done - warm) / max(1.0 - warm, 1e-9)
        return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * through))
    if schedule == "wsd":
        left = (1.0 - done) / decay_fraction if decay_fraction > 0 else 1.0
        return final_fraction + (1.0 - final_fraction) * min(1.0, left)
    raise ValueError(f"unknown learning-rate schedule {schedule!r}; expected one of {', '.join(get_args(Schedule))}")
