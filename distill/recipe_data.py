"""The recipe's sections about data: problems, traces that others made, which of the accepted ones are learnt from."""

from typing import Any, Literal

from pydantic import Field, model_validator

from distill.recipe_base import Kind, Name, Section

LayoutName = Literal[
    "auto", "open-r1", "openthoughts", "openthoughts-metadata", "bespoke-stratos", "am", "s1", "s1.1",
    "mip-overthinking", "messages", "sharegpt", "prompt-response", "distill", "none",
]  # fmt: skip


class ProblemSource(Section):
    source: str = Field(
        min_length=1, description="'reasoning-gym', a .jsonl or .parquet file, or a `datasets` name or folder."
    )
    split: str | None = Field(
        None,
        description="reasoning-gym: 'train' or 'heldout' (a tenth by text hash); else a `datasets` split.",
    )
    count: int | None = Field(None, ge=1, le=10**9, description="Problems to take; all of a file if not given.")
    seed: int = Field(
        0, ge=0, description="Seed of the generated problems, and of the choice of `count` from a larger source."
    )
    families: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="reasoning-gym: task family -> its settings; problems are shared out evenly."
    )
    problem: str = Field("problem", min_length=1, description="Field of a source's row that holds the problem's text.")
    answer: str | None = Field(
        "answer", description="Field that holds the reference answer; null for problems without."
    )
    kind: Kind = Field(
        "math", description="How answers are judged; of generated ones only 'reasoning-gym' counts: by its own scorers."
    )
    id: str | None = Field(None, description="Field that holds an identifier to keep in `meta`.")

    @model_validator(mode="after")
    def _generated_needs_settings(self) -> "ProblemSource":
        if self.source == "reasoning-gym":
            if not self.families:
                raise ValueError("source 'reasoning-gym' needs at least one entry in `families`")
            if self.count is None:
                raise ValueError("source 'reasoning-gym' needs a `count`")
            if self.split not in (None, "train", "heldout"):
                raise ValueError(f"source 'reasoning-gym' has the splits 'train' and 'heldout', not {self.split!r}")
        return self


class TraceFields(Section):
    """Names of a row's fields, dotted for nested ones ('messages.0.info.source'). Several generations are a list."""

    problem: str | None = Field(None, description="What was asked; not needed where `messages` says it.")
    messages: str | None = Field(None, description="A conversation; its last turn is the reply if it is the model's.")
    text: str | None = Field(None, description="The whole reply, reasoning and answer in one.")
    reasoning: str | None = Field(None, description="The reasoning alone.")
    response: str | None = Field(None, description="What follows the reasoning.")
    answer: str | None = Field(None, description="The reference answer.")
    solution: str | None = Field(None, description="A worked solution whose last box is the reference, if no answer.")
    tests: str | None = Field(None, description="Tests of a code problem, as JSON or its text.")
    kind: str | None = Field(None, description="Domain of the problem, turned into a kind by `kinds`.")
    source: str | None = Field(None, description="Where the problem comes from.")
    teacher: str | None = Field(None, description="Who wrote the reply.")
    licence: str | None = Field(None, description="The row's licence.")
    finish_reason: str | None = Field(None, description="Why the reply ended: 'stop', 'length', ...")
    correct: str | None = Field(None, description="The source's own verdict; kept, not believed.")
    reasoning_tokens: str | None = Field(None, description="Tokens of the reasoning.")
    tokens: str | None = Field(None, description="Tokens of the whole reply.")
    id: str | None = Field(None, description="An identifier to keep in `meta`.")


class ForeignTraces(Section):
    source: str = Field(
        min_length=1, description="A .jsonl (.gz, .zst) or .parquet file, a folder of them, or a `datasets` name."
    )
    layout: LayoutName = Field("auto", description="How rows are laid out; 'auto' looks at the first one.")
    fields: TraceFields = Field(default_factory=TraceFields, description="Fields that differ from the layout's.")
    name: Name | None = Field(None, description="The source's name in mixtures and card; the file's if not given.")
    split: str | None = Field(None, description="A `datasets` split; of a folder, the files with it in their name.")
    count: int | None = Field(None, ge=1, description="Rows to take from the beginning; all if not given.")
    kind: Kind | None = Field(
        None, description="How answers are judged; if not given, as the row says, else 'math' where there is an answer."
    )
    kinds: dict[str, Kind] = Field(
        default_factory=dict, description="What the field `kind` holds -> kind; 'open' for what is not named."
    )
    teacher: str | None = Field(None, description="Who wrote the traces, where rows do not say.")
    licence: str | None = Field(None, description="Licence of the source, where rows do not say.")
    instruction: str | None = Field(
        None, description="Text around the problem in what was asked that is no part of the problem."
    )
    unmarked: Literal["cut", "answer"] = Field(
        "cut", description="A reply that marks no end of thinking: 'cut' off while thinking, or an 'answer' without."
    )
    tokenizer: str | None = Field(
        None, description="A tokenizer.json or its folder to count tokens; estimated from the length if not given."
    )


class Difficulty(Section):
    min_pass_rate: float = Field(0.0, ge=0, le=1, description="Smallest share of right samples of the teacher.")
    max_pass_rate: float = Field(1.0, ge=0, le=1, description="Largest share: 0.99 drops what is always solved.")
    min_samples: int = Field(1, ge=1, description="Samples below which a pass rate says nothing; such problems stay.")
    student: str | None = Field(
        None, description="JSONL with the base student's results: `problem_id`, and `pass_rate` or `correct`."
    )
    student_min_pass_rate: float = Field(0.0, ge=0, le=1, description="Smallest share of right samples of the student.")
    student_max_pass_rate: float = Field(1.0, ge=0, le=1, description="Largest share of right samples of the student.")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "Difficulty":
        for low, high in (
            ("min_pass_rate", "max_pass_rate"),
            ("student_min_pass_rate", "student_max_pass_rate"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}")
        if self.student is None and (self.student_min_pass_rate, self.student_max_pass_rate) != (0.0, 1.0):
            raise ValueError("bounds for the student need its pass rates in `student`")
        return self


class MixturePart(Section):
    sources: list[str] = Field(
        default_factory=lambda: ["*"],
        min_length=1,
        description="Sources as in the dataset's rows ('*' stands for any text), or what is before a '/'.",
    )
    kinds: list[Kind] = Field(default_factory=list, description="Only problems of these kinds; empty for all.")
    weight: float | None = Field(None, gt=0, description="Share in proportion to the other parts' weights.")
    traces: int | None = Field(None, ge=1, description="Most traces of this part.")
    tokens: int | None = Field(None, ge=1, description="Most tokens of this part.")


class Selection(Section):
    per_problem: int = Field(1, ge=1, description="Accepted traces kept a problem.")
    choose: Literal["shortest", "median", "diverse", "random"] = Field(
        "shortest", description="Which accepted traces are kept; 'diverse' takes those least alike."
    )
    difficulty: Difficulty | None = Field(None, description="Bounds on problems' pass rates; null for none.")
    mixture: list[MixturePart] = Field(
        default_factory=list, description="Parts; what is in none of them is left out. Empty takes all."
    )
    mixture_by: Literal["traces", "tokens"] = Field("traces", description="What the weights are shares of.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of the whole dataset; null for no bound.")
    validation_fraction: float = Field(0.05, ge=0, lt=1, description="Share of problems set aside to watch the loss.")

    @model_validator(mode="after")
    def _weights_for_all(self) -> "Selection":
        weighted = sum(part.weight is not None for part in self.mixture)
        if weighted not in (0, len(self.mixture)):
            raise ValueError("mixture: give every part a weight, or none")
        return self
