"""dataset/README.md: what the rows are, where they come from, what was left out, and how to check it.

Holds nothing that differs between two runs with the same outcome (no times, no paths), so that equal datasets are
equal folders. Students depend on the rows alone: another card trains none anew.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.files import sha256_file, write_atomic
from distill.recipe import Recipe
from distill.records import FunnelRow

if TYPE_CHECKING:
    from distill.runfolder import RunFolder

_FEATURES: list[dict[str, Any]] = [
    {"name": "messages", "list": [{"name": "role", "dtype": "string"}, {"name": "content", "dtype": "string"}]},
    {"name": "problem_id", "dtype": "string"},
    {"name": "trace_id", "dtype": "string"},
    {"name": "source", "dtype": "string"},
    {"name": "answer", "dtype": "string"},
]

_BODY = r"""
# {name}: reasoning traces of {teacher}

Each row of the default configuration is one problem and one complete reply of the teacher, in `messages`: the user's
turn as it was asked, and an assistant turn `<think>\n…\n</think>\n\n…` that ends in the boxed answer. The
configuration `answers_only` has the same problems with an empty think block and the reference answer alone: it trains
the baseline that shows what the reasoning adds.

Chat templates of R1 and its distilled models delete everything before `</think>` from assistant turns. Build training
text as the rendered prompt plus the raw assistant text plus the end token, not by templating the assistant turn.

## Where it comes from

| | |
|---|---|
| problems | {source} |
| teacher | `{teacher}` |
| sampling | {sampling} |
| selection | {selection} |
| licence of the problems | {problem_licence} |
| licence of the teacher | {teacher_licence} |
{provenance}

## What was left out

| filter | traces in | traces out | tokens in | tokens out |
|---|---|---|---|---|
{funnel}

Every rejected trace and the reason are in the run's `verdicts.jsonl`.

## Separation from evaluation

{separation}

## Files

`datasets.load_dataset` reads this folder; TRL takes the rows as conversations; LLaMA-Factory finds them with
`llamafactory/` as its `dataset_dir`; for axolotl: `path: train.jsonl, ds_type: json, type: chat_template,
field_messages: messages`. Each of these renders the assistant turn with the chat template: use one that keeps what
stands before `</think>`.

| file | rows | sha256 |
|---|---|---|
{files}
"""


def write_card(
    run: "RunFolder",
    recipe: Recipe,
    rows: Mapping[str, int],
    funnel: Sequence[FunnelRow],
    narrowed: Mapping[str, Any] | None = None,
) -> None:
    """`rows` names the data files that exist, with their rows; `narrowed` is what distill.mixture counted."""
    import yaml

    folder = run.path("dataset")
    manifest = run.manifest.data
    asked = manifest.get("teacher", {})  # absent where the traces are somebody else's
    imported = manifest.get("imported") if recipe.traces else None
    teacher = _writers(imported) if imported else asked.get("id", recipe.teacher.model)
    licences = (
        (_import_licence(imported), "that of the traces' source")
        if imported
        else (_problem_licence(recipe), asked.get("licence") or "not stated in its model card")
    )
    header: dict[str, Any] = {
        "license": _licence_tag(imported, licences),
        "pretty_name": f"{recipe.name}: reasoning traces of {teacher}",
        "tags": ["reasoning", "distillation", "synthetic"],
        "task_categories": ["text-generation"],
        "configs": [
            {"config_name": "default", "default": True, "data_files": _data_files(rows, "")},
            {"config_name": "answers_only", "data_files": _data_files(rows, "answers_only/")},
        ],
        "dataset_info": [
            {"config_name": "default", "features": _FEATURES},
            {"config_name": "answers_only", "features": [f for f in _FEATURES if f["name"] != "trace_id"]},
        ],
    }
    for key in ("configs", "dataset_info"):
        header[key] = [entry for entry in header[key] if _data_files(rows, _prefix(entry["config_name"]))]
    settings = recipe.sampling
    body = _BODY.format(
        name=recipe.name,
        teacher=teacher,
        source=_source(recipe, manifest),
        sampling="by those who made the traces; their publications say how"
        if imported
        else f"{settings.samples} a problem, temperature {settings.temperature}, top-p {settings.top_p}, "
        f"at most {settings.max_tokens} tokens, seed {recipe.seed}",
        selection=f"{recipe.selection.choose}, {recipe.selection.per_problem} a problem"
        f"{_difficulty(recipe, narrowed or {})}; "
        f"{recipe.selection.validation_fraction:.0%} of the problems for validation",
        provenance=_provenance(imported) + _mixture(narrowed or {}),
        problem_licence=licences[0],
        teacher_licence=licences[1],
        funnel="\n".join(
            f"| {r['filter']} | {r['in']:,} | {r['out']:,} | {r['tokens_in']:,} | {r['tokens_out']:,} |" for r in funnel
        ),
        separation=_separation(manifest.get("problems")) + _decontamination(manifest.get("decontamination")),
        files="\n".join(f"| {name} | {count:,} | `{sha256_file(folder / name)}` |" for name, count in rows.items()),
    )
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    write_atomic(folder / "README.md", f"---\n{front}---\n{body}".encode())


def _writers(imported: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for source in imported for name in source["teachers"])
    return ", ".join(list(names)[:8]) + (" and others" if len(names) > 8 else "")


def _licence_tag(imported: Sequence[Mapping[str, Any]] | None, licences: Sequence[str]) -> str:
    """The hub's tag: a licence only if it is that of everything in here."""
    stated = {str(s["licence"] or "").lower() for s in imported} if imported else {name.lower() for name in licences}
    mixed = any(source["licence_field"] for source in imported or ())
    return stated.pop() if len(stated) == 1 and not mixed and stated <= {"apache-2.0", "mit", "cc-by-4.0"} else "other"


def _import_licence(imported: Sequence[Mapping[str, Any]]) -> str:
    found = dict.fromkeys(str(source["licence"] or "not stated") for source in imported)
    rows = "; some rows have their own" if any(source["licence_field"] for source in imported) else ""
    return ", ".join(found) + rows


def _provenance(imported: Sequence[Mapping[str, Any]] | None) -> str:
    """What was imported, from where, and what of it could not be used."""
    if not imported:
        return ""
    lines = [
        f"| {s['name']} | {s['source']} ({s['layout']}) | {', '.join(list(s['teachers'])[:4])} | "
        f"{s['licence'] or 'not stated'} | {s['rows']:,} | {s['traces']:,} | {s['skipped']:,} | {s['repeats']:,} | "
        f"{'`' + s['sha256'] + '`' if s['sha256'] else 'not a local file'} |"
        for s in imported
    ]
    estimated = (
        " Token counts are estimates from the length." if any(s["tokens"] == "estimated" for s in imported) else ""
    )
    held = sum(s["evaluation"] for s in imported)
    return (
        "\nThe traces were made by others and imported; `source` of a row names the line here that it came from."
        f"{estimated}{f' {held:,} traces of evaluation problems were left out.' if held else ''}\n\n"
        "| name | source (layout) | written by | licence | rows | traces | not mapped | repeats | sha256 |\n"
        "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def _difficulty(recipe: Recipe, narrowed: Mapping[str, Any]) -> str:
    settings = recipe.selection.difficulty
    if settings is None:
        return ""
    student = (
        f", the student's between {settings.student_min_pass_rate:g} and {settings.student_max_pass_rate:g}"
        if settings.student
        else ""
    )
    return (
        f"; problems with a pass rate of the teacher between {settings.min_pass_rate:g} and "
        f"{settings.max_pass_rate:g}{student} ({narrowed.get('outside_difficulty', 0):,} problems were outside)"
    )


def _mixture(narrowed: Mapping[str, Any]) -> str:
    if "mixture" not in narrowed:
        return ""
    lines = [
        f"| {', '.join(part['sources'])} | {', '.join(part['kinds']) or 'all'} "
        f"| {part['problems']:,} | {part['traces']:,} | {part['tokens']:,} |"
        for part in narrowed["mixture"]
    ]
    return (
        f"\nMixed ({narrowed['in_no_part']:,} problems are in no part):\n\n"
        "| sources | kinds | problems | traces | tokens |\n|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def _prefix(config: str) -> str:
    return "" if config == "default" else f"{config}/"


def _data_files(rows: Mapping[str, int], prefix: str) -> list[dict[str, str]]:
    paths = {split: f"{prefix}{split}.jsonl" for split in ("train", "validation")}
    return [{"split": split, "path": path} for split, path in paths.items() if path in rows]


def _source(recipe: Recipe, manifest: Mapping[str, Any]) -> str:
    problems = recipe.problems
    count = manifest.get("problems", {}).get("train", {}).get("count")
    asked = f"{count:,} from " if count is not None else ""
    if recipe.traces:
        return asked + ", ".join(source["name"] for source in manifest.get("imported", ()))
    if problems.source == "reasoning-gym":
        return f"{asked}reasoning-gym (seed {problems.seed}): {', '.join(problems.families)}"
    return f"{asked}{problems.source.rstrip('/').rsplit('/', 1)[-1]}"


def _problem_licence(recipe: Recipe) -> str:
    if recipe.problems.source == "reasoning-gym":
        return "Apache-2.0"
    return "not stated; it is that of the source"


def _separation(proof: Mapping[str, Any] | None) -> str:
    if proof is None or not proof["eval"]["count"]:
        return "The run has no evaluation problems of its own; nothing was compared."
    train, evaluation = proof["train"], proof["eval"]
    return (
        f"None of the {train['count']:,} training problems is among the {evaluation['count']:,} evaluation problems: "
        f"their hashes (sha256 of the NFKC, case-folded, blank-collapsed text) have {proof['overlap']} in common. "
        f"Sha256 of the sorted hashes, one a line: training `{train['sha256']}`, evaluation `{evaluation['sha256']}`."
    )


def _decontamination(proof: Mapping[str, Any] | None) -> str:
    """What was compared, how, and what was found; both texts of every hit are in the run's contamination.jsonl."""
    if proof is None:
        return ""
    settings, hits = proof["settings"], proof["hits"]
    found = ", ".join(f"{count:,} {how}" for how, count in hits.items()) or "none"
    sets = "\n".join(f"| {entry['name']} | {entry['rows']:,} | `{entry['sha256']}` |" for entry in proof["sets"])
    return (
        f"\n\nThe {proof['problems']:,} problems were also compared with the evaluation sets below: the same text "
        f"after normalisation; over {settings['max_overlap']:.0%} of an item's stretches of {settings['ngram']} words, "
        f"or a shorter item as a whole; word triples with a Jaccard similarity of {settings['similarity']} or more"
        f"{'; the same with other numbers' if settings['numbers'] else ''}. {proof['dropped']:,} problems were dropped "
        f"with all their traces ({found}). The hash is the sha256 of the sorted hashes of a set's texts, as above.\n\n"
        f"| evaluation set | problems | sha256 |\n|---|---|---|\n{sets}"
    )
