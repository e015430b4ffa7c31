"""One typed recipe describes a whole run; every field has its meaning and bounds here, and nowhere else."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill.recipe_base import Kind as Kind
from distill.recipe_base import Name as Name
from distill.recipe_base import Section as Section
from distill.recipe_data import ForeignTraces as ForeignTraces
from distill.recipe_data import ProblemSource as ProblemSource
from distill.recipe_data import Selection as Selection
from distill.recipe_filters import AgreementFilter as AgreementFilter
from distill.recipe_filters import CorrectnessFilter as CorrectnessFilter
from distill.recipe_filters import DecontaminationFilter as DecontaminationFilter
from distill.recipe_filters import DuplicatesFilter as DuplicatesFilter
from distill.recipe_filters import Filters as Filters
from distill.recipe_filters import FormatFilter as FormatFilter
from distill.recipe_filters import JudgeModel as JudgeModel
from distill.recipe_filters import Language as Language
from distill.recipe_filters import LanguageFilter as LanguageFilter
from distill.recipe_filters import LengthFilter as LengthFilter
from distill.recipe_filters import NearDuplicateProblems as NearDuplicateProblems
from distill.recipe_filters import NearDuplicatesFilter as NearDuplicatesFilter
from distill.recipe_filters import NearDuplicateTraces as NearDuplicateTraces
from distill.recipe_filters import OutliersFilter as OutliersFilter
from distill.recipe_filters import QualityFilter as QualityFilter
from distill.recipe_filters import ReadabilityFilter as ReadabilityFilter
from distill.recipe_filters import ReflectionFilter as ReflectionFilter
from distill.recipe_filters import RepetitionFilter as RepetitionFilter
from distill.recipe_filters import default_filters as default_filters
from distill.recipe_teacher import R1_INSTRUCTION as R1_INSTRUCTION
from distill.recipe_teacher import Adaptive as Adaptive
from distill.recipe_teacher import Budget as Budget
from distill.recipe_teacher import Endpoint as Endpoint
from distill.recipe_teacher import Sampling as Sampling
from distill.recipe_teacher import Teacher as Teacher
from distill.recipe_teacher import Vllm as Vllm

Baseline = Literal["base", "answers_only"]


class Lora(Section):
    r: int = Field(16, ge=1, le=1024, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale; the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target_modules: list[str] | Literal["all-linear"] = Field("all-linear", description="Modules that get adapters.")


class Student(Section):
    name: Name = Field(description="Name of the student's folder and of its line in the report.")
    base: str = Field(min_length=1, description="A shipped base's name, a checkpoint folder or a hub name.")
    method: Literal["full", "lora"] = Field("full", description="Train all weights, or low-rank adapters.")
    lora: Lora = Field(default_factory=Lora, description="Settings of method 'lora'.")
    epochs: float = Field(2.0, gt=0, le=1000, description="Passes over the training set.")
    max_length: int = Field(2048, ge=8, description="Longest example in tokens; longer ones are left out and counted.")
    tokens_per_step: int = Field(
        16384, ge=1, description="Non-padding tokens an optimiser step, over all micro-batches."
    )
    learning_rate: float = Field(1e-5, gt=0, le=1, description="Peak learning rate of AdamW.")
    schedule: Literal["multi_step", "cosine", "constant"] = Field(
        "multi_step",
        description="multi_step: drops to 31.6% and 10% after 80% and 90% of the steps (DeepSeek LLM, §2.3).",
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    packing: bool = Field(True, description="Several examples in a row, attending only to themselves.")
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints from which training resumes.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 trains under autocast; weights stay float32."
    )
    recompute: bool = Field(
        False, description="Activations made anew for the gradient: much less memory, up to a third more time."
    )
    baselines: list[Baseline] = Field(
        default=["base", "answers_only"],
        description="base: untouched; answers_only: the same problems and as many tokens, without the reasoning.",
    )


class Evals(Section):
    problems: ProblemSource | None = Field(None, description="Problems of the task 'distill_problems'.")
    tasks: list[str] = Field(default_factory=lambda: ["distill_problems"], description="lm-eval tasks to run.")
    samples: int = Field(4, ge=1, le=10000, description="Samples a problem; the score is mean@k.")
    temperature: float = Field(0.6, ge=0, le=2, description="0 is greedy; R1's published setting is 0.6.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus size; R1's published setting is 0.95.")
    max_tokens: int = Field(32768, ge=1, description="Most tokens generated a sample.")
    batch_size: int = Field(256, ge=1, le=65536, description="Samples decoded at once.")
    bootstrap: int = Field(2000, ge=100, le=1000000, description="Resamples behind each confidence interval.")
    teacher: bool = Field(True, description="Evaluate the teacher too, as the ceiling.")

    @model_validator(mode="after")
    def _problems_for_task(self) -> "Evals":
        if "distill_problems" in self.tasks and self.problems is None:
            raise ValueError("task 'distill_problems' needs `problems`")
        return self


class Report(Section):
    traces_shown: int = Field(60, ge=0, le=100000, description="Traces in the page's reader.")
    answers_shown: int = Field(60, ge=0, le=100000, description="Evaluation problems with answers side by side.")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class Recipe(Section):
    name: Name = Field(description="Name of the run; its folder is runs/NAME.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of sampling, selection and training.")
    problems: ProblemSource = Field(description="Problems the teacher solves.")
    teacher: Teacher = Field(description="Who writes the traces.")
    sampling: Sampling = Field(description="How the teacher is sampled.")
    budget: Budget = Field(default_factory=Budget, description="What the traces may cost; the stage stops there.")
    traces: Annotated[list[ForeignTraces], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Traces that others made, instead of problems, teacher and sampling."
    )
    filters: Filters = Field(default_factory=Filters, description="Which traces are accepted.")
    selection: Selection = Field(default_factory=Selection, description="Which accepted traces are trained on.")
    students: list[Student] = Field(
        default_factory=list,
        description="Students to fine-tune, each with its baselines; none: the dataset is the end.",
    )
    evals: Evals = Field(
        default_factory=lambda: Evals(tasks=[], teacher=False),
        description="What the students and baselines are measured on.",
    )
    report: Report = Field(default_factory=Report, description="What the page shows.")

    @model_validator(mode="before")
    @classmethod
    def _fill_for_imported_traces(cls, tree: Any) -> Any:
        """Traces that exist need no teacher: the sections about making them are filled in with what is true of them."""
        if not isinstance(tree, dict) or not tree.get("traces"):
            return tree
        tree = dict(tree)
        first = tree["traces"] if isinstance(tree["traces"], dict) else next(iter(tree["traces"]), None)
        source = first.get("source") if isinstance(first, dict) else None
        tree.setdefault("problems", {"source": source if isinstance(source, str) and source else "traces"})
        if "teacher" not in tree:
            tree["teacher"] = {"kind": "recorded", "model": "recorded"}
            if isinstance(tree.get("evals"), dict):
                tree["evals"] = {"teacher": False} | tree["evals"]
        tree.setdefault("sampling", {"samples": 1, "instruction": ""})
        tree.setdefault("filters", default_filters())
        return tree

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        recorded = self.teacher.kind == "recorded"
        if not self.traces:
            if self.students and not self.evals.tasks:
                raise ValueError("evals.tasks: expected at least one, on which `students` are measured; found none")
            if recorded:
                raise ValueError("teacher.kind: 'recorded' is for recipes with `traces`")
        if recorded and self.evals.teacher:
            raise ValueError(
                "evals.teacher: whoever wrote the traces cannot be evaluated; name a `teacher` or set false"
            )
        correct = self.filters.correctness
        asked = {f"traces.{n}": t.kind for n, t in enumerate(self.traces)} or {"problems": self.problems.kind}
        for place, kind in asked.items():
            if kind == "judge" and correct is not None and correct.judge is None:
                raise ValueError(f"{place}.kind: 'judge' needs somebody to ask: `filters.correctness.judge`")
        if self.evals.problems is not None and self.evals.problems.kind in ("judge", "open"):
            raise ValueError(
                f"evals.problems.kind: {self.evals.problems.kind!r} is not measured; expected a kind that is decided "
                "by rule"
            )
        rated = self.selection.difficulty
        bounds = (rated.min_pass_rate, rated.max_pass_rate) if rated else (0.0, 1.0)
        if bounds != (0.0, 1.0) and self.filters.correctness is None and self.filters.agreement is None:
            raise ValueError("selection.difficulty: pass rates come from `filters.correctness` or `filters.agreement`")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [student.name for student in self.students]
        # Folders of a student's training and of its baseline, and its baselines' files of samples.
        ends = (".partial", "-answers_only", "-answers_only.partial", ".base", ".answers_only")
        taken = {name + end: name for name in names for end in ends}
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two students are named {name!r}; each needs its own folder")
            if name == "teacher":
                raise ValueError("a student cannot be named 'teacher'; the report uses that name")
            if name in taken:
                raise ValueError(f"a student cannot be named {name!r} beside {taken[name]!r}, whose file that is")
        return self
