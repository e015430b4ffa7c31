"""One self-contained HTML page from a run's results and files.

Everything a model wrote is hostile here. Three walls, each enough alone: the template escapes every value
(Jinja's autoescape), the embedded JSON cannot leave its element, and a content security policy in the page
lets nothing run but the one script whose hash it names, loads nothing and sends nothing.
"""

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from distill.recipe import Recipe
from distill.report import sections, words
from distill.report.curves import read_curves
from distill.report.examples import read_examples
from distill.report.generation import generation
from distill.report.readers import choose_answers, choose_traces

Row = dict[str, Any]


def embed_json(value: Any) -> str:
    """JSON that is inert inside <script type="application/json">: no '<', '>', '&', U+2028 or U+2029 in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def policy(style: str, script: str) -> str:
    """The page's content security policy: this style and this script, and nothing else from anywhere."""
    rules = ["default-src 'none'", f"style-src {_source(style)}", f"script-src {_source(script)}"]
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def render(recipe: Recipe, folder: Path, results: Row) -> bytes:
    """The page as UTF-8. `results` is what results.json holds; texts come from the run folder.

    Raises UserError for a broken line in one of the run's files.
    """
    context = _context(recipe, folder, results)
    # Lone surrogates in a model's text have no UTF-8 form.
    return _template().render(context).encode("utf-8", "replace")


def _template() -> Any:
    import jinja2
    from markupsafe import Markup

    here = files("distill.report")
    style, reader, page = ((here / name).read_text(encoding="utf-8") for name in ("style.css", "reader.js", "page.js"))
    script = reader + page
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    for name in (
        "percent",
        "points",
        "count",
        "short_count",
        "duration",
        "memory",
        "interval",
        "point_interval",
        "amount",
    ):
        environment.filters[name] = getattr(words, name)
    environment.filters["heat"] = lambda share: round(10 * share)
    environment.filters["loss"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.globals.update(style=Markup(style), script=Markup(script), policy=policy(style, script))
    return environment.from_string((here / "template.html").read_text(encoding="utf-8"))


def _context(recipe: Recipe, folder: Path, results: Row) -> Row:
    from markupsafe import Markup

    students = [student["name"] for student in results["students"]]
    models = [row["key"] for student in results["students"] for row in sections.models_of(results, student)]
    models = list(dict.fromkeys(models))
    manifest = _manifest(folder)
    curves = read_curves(folder, [student.name for student in recipe.students])
    charts, series = sections.training(curves)
    traces, counts = choose_traces(folder, recipe.report.traces_shown)
    answers = choose_answers(folder, models, recipe.report.answers_shown)
    data = {"traces": traces, "answers": answers, "students": students, "models": models, "charts": series}
    context: Row = {
        "results": results,
        "headline": words.headline(results),
        "setting": words.setting(results),
        "missing": results["missing"],
        "plots": sections.plots(results),
        "families": sections.families(results),
        "endings": sections.endings(results),
        "generation": generation(results),
        "funnel": sections.funnel(results),
        "filters": read_examples(folder, results["funnel"]),
        "training": charts,
        "cost": sections.cost(results),
        "traces_note": words.traces_note(len(traces), counts),
        "answers_note": words.answers_note(len(answers), results["problems"]["eval"]),
        "overlap": words.overlap(manifest.get("problems")),
        "provenance": _provenance(manifest),
        "versions": sorted((manifest.get("environment") or {}).get("packages", {}).items()),
        "recipe_text": _text(folder / "recipe.yaml"),
        "manifest_text": _text(folder / "manifest.json"),
        "data": data,
        "data_json": Markup(embed_json(data)),
    }
    context["sections"] = _sections(context)
    return context


def _sections(context: Row) -> list[tuple[str, str]]:
    present = [("result", "Result", True), ("families", "Families", context["families"])]
    present.append(("endings", "Endings", context["endings"]))
    present += [("generation", "Generation", context["generation"]), ("funnel", "Funnel", context["funnel"])]
    present.append(("filters", "Filters", context["filters"]))
    present += [("training", "Training", context["training"]), ("cost", "Time", context["cost"])]
    present += [("traces", "Traces", context["data"]["traces"]), ("answers", "Answers", context["data"]["answers"])]
    present.append(("provenance", "Provenance", True))
    return [(name, label) for name, label, shown in present if shown]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _manifest(folder: Path) -> Row:
    text = _text(folder / "manifest.json")
    return json.loads(text) if text else {"stages": {}}


def _commits(manifest: Row) -> str | None:
    """The commit that made the run; where stages were made by different ones, each with its stages."""
    stages: dict[str, list[str]] = {}
    for name, entry in manifest["stages"].items():
        if entry.get("commit") and name != "report":
            stages.setdefault(entry["commit"], []).append(name)
    if len(stages) > 1:
        return "; ".join(f"{commit} ({', '.join(names)})" for commit, names in stages.items())
    return next(iter(stages), (manifest.get("environment") or {}).get("commit"))


def _provenance(manifest: Row) -> list[tuple[str, str]]:
    """Name and value of what made the run; what the manifest does not say is left out."""
    environment = manifest.get("environment") or {}
    problems = manifest.get("problems") or {"train": {}, "eval": {}}
    command = environment.get("command")
    facts = [
        ("Commit", _commits(manifest)),
        ("Started", min((s["started"] for s in manifest["stages"].values() if "started" in s), default=None)),
        ("Command", " ".join(command) if command else None),
        ("Machine", environment.get("platform")),
        ("CPU cores", environment.get("cpus")),
        ("Python", environment.get("python")),
        ("Seed", manifest.get("seed")),
        ("Recipe hash", manifest.get("recipe")),
        ("Teacher", (manifest.get("teacher") or {}).get("id")),
        ("Training problems, sha256", problems["train"].get("sha256")),
        ("Evaluation problems, sha256", problems["eval"].get("sha256")),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]
