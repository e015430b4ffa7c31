"""The recipe's section `filters`: which traces are accepted."""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from distill.recipe_base import Section
from distill.recipe_data import ProblemSource

# Codes for languages in Latin script, names of scripts for the others: what distill.filters.language tells apart.
Language = Literal[
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "id", "vi", "ro", "cs", "fi",
    "Chinese", "Japanese", "Korean", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Thai",
]  # fmt: skip


class JudgeModel(Section):
    """A model behind an OpenAI-compatible endpoint; its key is the environment's DISTILL_JUDGE_KEY, if it wants one."""

    base_url: str = Field(description="The endpoint's address, up to and including /v1.")
    model: str = Field(min_length=1, description="The model's name there.")
    votes: int = Field(3, ge=1, le=99, description="Replies a verdict rests on; odd.")
    temperature: float = Field(0.6, ge=0, le=2, description="Of its replies; 0 makes one vote enough.")
    max_tokens: int = Field(4096, ge=1, description="Most tokens of a reply, its reasoning included.")
    seconds: float = Field(120.0, gt=0, description="Most seconds of a reply, with all attempts.")
    at_once: int = Field(8, ge=1, le=1024, description="Requests at once, of each process of the filter stage.")

    @field_validator("base_url")
    @classmethod
    def _an_address_without_secrets(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            # Not repeated in the message: what stands there may be a key.
            raise ValueError("holds more than an address; a key belongs in the environment variable DISTILL_JUDGE_KEY")
        return value

    @field_validator("votes")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"expected an odd number, for a majority, found {value}")
        return value


class CorrectnessFilter(Section):
    """The final answer equals the reference answer."""

    without_reference: Literal["reject", "pass", "judge"] = Field(
        "reject",
        description="Traces of problems without a reference answer; 'pass' leaves them to `agreement` or `quality`.",
    )
    judge: JudgeModel | None = Field(
        None, description="Who grades the kind 'judge', and 'open' problems with a reference; null for nobody."
    )

    @model_validator(mode="after")
    def _a_judge_to_ask(self) -> "CorrectnessFilter":
        if self.without_reference == "judge" and self.judge is None:
            raise ValueError("`without_reference: judge` needs a `judge` to ask")
        return self


class FormatFilter(Section):
    """Exactly one <think>…</think>, a final answer, and no text leaked."""

    single_answer: bool = Field(False, description="Also reject a reply that boxes two different answers.")


class LengthFilter(Section):
    max_reasoning_tokens: int | None = Field(None, ge=1, description="Longer reasoning is rejected; null for no bound.")
    min_reasoning_tokens: int = Field(1, ge=0, description="Shorter reasoning is rejected.")


class RepetitionFilter(Section):
    ngram: int = Field(16, ge=2, le=100, description="Length in words of the repeated stretch looked for.")
    max_share: float = Field(0.2, ge=0, le=1, description="Largest share of such stretches that may be repeats.")


class LanguageFilter(Section):
    language: Language | None = Field(
        None, description="What traces should be written in; null for each problem's own language."
    )
    min_share: float = Field(0.98, ge=0, le=1, description="Smallest share of words in that language.")
    max_run: int | None = Field(
        None,
        ge=0,
        description="Most words of another language in a row; null for 0 where the language has Latin script, else 2.",
    )


class ReadabilityFilter(Section):
    max_paragraph_words: int | None = Field(
        400, ge=1, description="Longest paragraph (text without a line break) in words; null for no bound."
    )
    code_blocks: bool = Field(False, description="Whether code blocks may stand where no code was asked for.")


class ReflectionFilter(Section):
    """Counts of reconsidering words ("wait", "let me check"); measured, nothing is rejected."""


class QualityFilter(Section):
    """A judge model scores the trace from 1 to 10: the median of its votes. Asked only of what passed before."""

    judge: JudgeModel = Field(description="Who scores.")
    min_score: float = Field(6.0, ge=1, le=10, description="Smallest score that is accepted.")


class DecontaminationFilter(Section):
    against: list[ProblemSource] = Field(
        min_length=1, description="Evaluation sets to keep apart from; `problem` names their field."
    )
    ngram: int = Field(8, ge=2, le=50, description="Length in words of the overlaps looked for.")
    max_overlap: float = Field(
        0.5, ge=0, lt=1, description="Largest share of an evaluation problem's stretches that may stand in a problem."
    )
    similarity: float = Field(
        0.7, gt=0, le=1, description="Jaccard similarity of word triples that makes two the same."
    )
    numbers: bool = Field(True, description="Also find the same problem with other numbers.")


class AgreementFilter(Section):
    min_samples: int = Field(4, ge=2, description="Answered samples of a problem below which there is no majority.")
    min_share: float = Field(0.5, ge=0, le=1, description="The commonest answer must have more than this share.")


class OutliersFilter(Section):
    max_ratio: float = Field(4.0, gt=1, description="Longest reasoning, in medians of its problem's samples.")
    min_ratio: float = Field(0.0, ge=0, lt=1, description="Shortest reasoning, in the same unit.")
    min_samples: int = Field(4, ge=3, description="Samples of a problem below which there is no outlier.")


class DuplicatesFilter(Section):
    """A trace of the same problem with the same text was accepted before."""


class NearDuplicatesFilter(Section):
    ngram: int = Field(5, ge=1, le=50, description="Length in words of the stretches compared.")
    similarity: float = Field(gt=0, le=1, description="Jaccard similarity of stretches from which on two are one.")


class NearDuplicateProblems(NearDuplicatesFilter):
    ngram: int = Field(3, ge=1, le=50, description="Length in words of the stretches compared.")
    similarity: float = Field(0.9, gt=0, le=1, description="Jaccard similarity of stretches from which on two are one.")


class NearDuplicateTraces(NearDuplicatesFilter):
    similarity: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of stretches from which on two are one.")


class Filters(Section):
    """Each is off unless named. In the order of the funnel; those after `quality` compare traces or problems."""

    decontamination: DecontaminationFilter | None = Field(None, description="Drop evaluation problems; null to skip.")
    format: FormatFilter | None = Field(
        None, description="Check the form of the reasoning and the answer; null to skip."
    )
    correctness: CorrectnessFilter | None = Field(None, description="Judge the final answer; null to skip.")
    length: LengthFilter | None = Field(None, description="Bound the reasoning's length; null to skip.")
    repetition: RepetitionFilter | None = Field(None, description="Reject text that loops; null to skip.")
    language: LanguageFilter | None = Field(None, description="Reject mixed languages; null to skip.")
    readability: ReadabilityFilter | None = Field(None, description="Reject long paragraphs, code; null to skip.")
    reflection: ReflectionFilter | None = Field(None, description="Count reconsidering words; null to skip.")
    quality: QualityFilter | None = Field(None, description="Let a model score what has passed so far; null to skip.")
    agreement: AgreementFilter | None = Field(
        None, description="Without a reference, accept the majority's answer; null to skip."
    )
    outliers: OutliersFilter | None = Field(None, description="Reject lengths unusual for the problem; null to skip.")
    near_duplicate_problems: NearDuplicateProblems | None = Field(
        None, description="Of problems nearly the same, keep one; null to skip."
    )
    duplicates: DuplicatesFilter | None = Field(None, description="Reject exact duplicates; null to skip.")
    near_duplicates: NearDuplicateTraces | None = Field(None, description="Of traces nearly the same, keep one.")


def default_filters() -> dict[str, dict[str, Any]]:
    """The filters of a recipe that names traces and no filters: what R1's authors dropped, and what loops or leaks."""
    named: dict[str, dict[str, Any]] = {"format": {}, "correctness": {"without_reference": "pass"}}
    return named | {name: {} for name in ("repetition", "language", "readability", "reflection", "duplicates")}
