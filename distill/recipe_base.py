"""What all sections of the recipe share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Kind = Literal[
    "math", "exact", "choice", "regex", "code", "reasoning-gym", "judge", "open"
]  # as evals.grading has them


class Section(BaseModel):
    # Strict: a recipe is written by hand, and "3" where a number belongs is more often a slip than a wish.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
