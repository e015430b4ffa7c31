"""Small training sets for the tests of students, and settings that fit the models of tests.tiny."""

from pathlib import Path
from typing import Any

from students.loop import Optimisation
from students.sft import SftSettings


def rows(count: int = 60, first: int = 0) -> list[dict[str, Any]]:
    """Examples of 40 to 100 tokens with tests.tiny's byte tokenizer."""
    made = []
    for n in range(first, first + count):
        reply = f"<think>\n{n}+{n}={2 * n}{' hm' * (7 * n % 17)}\n</think>\n\n\\boxed{{{2 * n}}}"
        made.append({"messages": [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": reply}]})
    return made


def settings(base: Path, **changes: Any) -> SftSettings:
    """Two epochs of rows(60) are about 15 steps. Fields of Optimisation may be given beside SftSettings' own."""
    ours: dict[str, Any] = {"epochs": 2, "max_length": 128, "tokens_per_step": 512}
    optimisation: dict[str, Any] = {"learning_rate": 3e-3, "checkpoint_every": 3}
    for name, value in changes.items():
        (ours if name in SftSettings.__dataclass_fields__ else optimisation)[name] = value
    return SftSettings(base=base, optimisation=Optimisation(**optimisation), **ours)
