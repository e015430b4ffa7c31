"""Configurations of the two commands that train shipped models: `distill teacher train` and `distill base train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.errors import UserError
from distill.recipe_load import explain, read_tree
from distill.shipped import resolve_config

Families = dict[str, dict[str, Any]]


class TrainingConfig(BaseModel):
    """What both commands need."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(description="name of the model; decides its special tokens and chat form", min_length=1)
    out: str = Field(
        description="folder of the run: checkpoints and log while it trains, the finished model at the end"
    )
    seed: int = Field(description="seed of the weights and of the training problems", ge=0)
    families: Families = Field(description="reasoning-gym families and settings of the problems to train on")
    model: dict[str, Any] = Field(description="fields of the model's config.json; the vocabulary's size is filled in")
    training: dict[str, Any] = Field(description="settings of the training loop")
    threads: int = Field(1, description="CPU threads of the trainer; two share these small products badly", ge=1)


class TeacherTraining(TrainingConfig):
    """configs/teacher/*.yaml."""

    init: str | None = Field(None, description="model folder to go on from; without it, fresh weights from the seed")
    turns: dict[str, int] = Field({}, description="turns a round of a family that shall come more often than once")
    exam_problems: int = Field(140, description="held-out problems sampled at every evaluation", ge=1)


class BaseTraining(TrainingConfig):
    """configs/students/*.yaml."""

    small_families: Families = Field(description="settings of the much smaller problems that are shown whole")
    mixture: dict[str, float] = Field(description="weights of lines, unfinished, ending and small documents")
    drill_lines: int = Field(400, description="held-out single steps measured at every evaluation", ge=1)


Config = TypeVar("Config", bound=TrainingConfig)


def load_training_config(path: str | Path, overrides: Sequence[str], model: type[Config]) -> Config:
    """Read and check one configuration. Raises UserError naming the file and the field."""
    found = resolve_config(str(path))
    if found is None or not found.is_file():
        raise UserError(
            f"{path}: no such training configuration; expected a YAML file such as configs/teacher/tiny-r1.yaml"
        )
    tree = read_tree(found, overrides, "the configuration's keys")
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{found}: {explain(error, model)}") from None


def settings_from(fields: dict[str, Any], settings: type, place: str, **given: Any) -> Any:
    """Build a dataclass of settings; an unknown field is the user's mistake, not a TypeError."""
    import dataclasses
    import difflib

    known = [field.name for field in dataclasses.fields(settings) if field.name not in given]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{place}: unknown key {name!r}; {hint}")
    try:
        return settings(**{**fields, **given})
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}") from None
