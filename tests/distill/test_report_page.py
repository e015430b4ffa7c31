"""report.html as a file: self-contained, inert whatever the texts hold, bounded, and made from any part of a run."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill import report
from distill.errors import UserError
from distill.recipe_load import load_recipe
from distill.report import page, readers
from distill.runfolder import RunFolder
from distill.visible import visible
from tests.distill.fake_run import FILTERS, HOSTILE, make_run


def make_report(folder: Path, *overrides: str) -> str:
    recipe = load_recipe(str(folder / "recipe.yaml"), list(overrides))
    with RunFolder.open(folder, recipe) as run:
        report.run(recipe, run)
    return (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text of scripts and of the rest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_report(make_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=True))


def embedded(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_no_text_becomes_markup(hostile: str) -> None:
    parsed = Tags(hostile)
    assert [attrs.get("type") for tag, attrs in parsed.tags if tag == "script"] == ["application/json", None]
    assert not {"img", "iframe", "object", "link", "base", "b&amp;"} & {tag for tag, _ in parsed.tags}
    handlers = [name for _, attrs in parsed.tags for name in attrs if name.startswith("on") or name == "style"]
    assert handlers == []
    # Outside the data a model's texts stand in the table of families, by name, and in the filters' examples.
    assert any("<b>&amp;" in text for text in parsed.text)
    shown = [text for text in parsed.text if "window.pwned" in text and not text.startswith("{")]
    assert any("<svg onload=window.pwned=3>" in text for text in shown)


def test_embedded_json_is_inert_and_loses_nothing(hostile: str) -> None:
    raw = hostile.split('id="data">')[1].split("</script>")[0]
    assert raw.isascii() and not set(raw) & set("<>&")
    texts = json.dumps(embedded(hostile), ensure_ascii=False)
    for text in HOSTILE:
        assert json.dumps(visible(text), ensure_ascii=False)[1:-1] in texts
    assert "<U+202E>evil<U+202C> <U+D800> lone" in texts


def test_nothing_is_fetched_and_only_our_script_may_run(hostile: str) -> None:
    parsed = Tags(hostile)
    assert not [attrs for _, attrs in parsed.tags if "src" in attrs or str(attrs.get("href", "#"))[:1] != "#"]
    rules = next(attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert rules is not None and rules.startswith("default-src 'none'; style-src 'sha256-")
    script = hostile.split("<script>")[-1].split("</script>")[0]
    style = hostile.split("<style>")[1].split("</style>")[0]
    assert page.policy(style, script) == rules
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    assert "@import" not in style and "url(" not in style


@pytest.mark.parametrize("done", range(6))
def test_any_part_of_a_run_has_a_page(tmp_path: Path, done: int) -> None:
    html = make_report(make_run(tmp_path / "run", stages=("problems", "traces", "filter", "train", "eval")[:done]))
    assert ("Missing from this run" in html) == (done < 5)
    shown = re.findall(r'<section id="(\w+)"', html)
    assert ("traces" in shown) == (done > 1) and ("funnel" in shown) == (done > 2)
    assert ("training" in shown) == (done > 3) and ("answers" in shown) == (done > 4)
    assert set(re.findall(r'href="#(\w+)"', html)) == set(shown)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["missing"]) == [5, 5, 4, 3, 1, 0][done]


def test_report_command_on_half_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "half", stages=("problems", "traces"))
    command = [sys.executable, "-m", "distill", "report", str(folder)]
    done = subprocess.run(command, cwd=Path(report.__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout and (folder / "report.html").is_file()


def test_every_filter_shows_what_it_rejected_and_accepted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    examples = json.loads((folder / "filter_examples.json").read_text())
    html = make_report(folder)
    section = html.split('<section id="filters"')[1].split("</section>")[0]
    text = "".join(Tags(section).text)
    assert section.count("<details>") == len(FILTERS) and "<details open" not in section
    assert section.count('class="example"') == sum(
        len(groups["rejected"]) + min(3, len(groups["accepted"])) for groups in examples.values()
    )
    for groups in examples.values():
        for example in groups["rejected"] + groups["accepted"][:3]:
            assert example["trace_id"] in text and example["reason"] in text and example["excerpt"] in text
    (folder / "filter_examples.json").unlink()
    less = make_report(folder)
    assert 'id="filters"' not in less and 0 < len(html) - len(less) < 100_000


def test_examples_of_fifteen_filters_with_long_texts_stay_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    long = {"trace_id": "t", "problem_id": "p", "sample": 0} | dict.fromkeys(
        ("reason", "problem", "excerpt"), "a word " * 9999
    )
    groups = {"rejected": [long] * 50, "accepted": [long] * 50}
    bare = len(make_report(folder))
    (folder / "filter_examples.json").write_text(json.dumps({f"filter{n}": groups for n in range(15)}))
    assert len(make_report(folder)) - bare < 250_000


def test_funnel_counts_problems_where_the_run_did(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    html = make_report(folder)
    last = json.loads((folder / "funnel.json").read_text())[-1]
    assert "problems left" in html and f"for {last['problems_out']} of {last['problems_in']} problems" not in html
    assert f"for {last['problems_out']} of 60 problems, with " in html
    rows = [
        {k: v for k, v in row.items() if not k.startswith("problems")}
        for row in json.loads((folder / "funnel.json").read_text())
    ]
    (folder / "funnel.json").write_text(json.dumps(rows))
    older = make_report(folder)
    assert 'id="funnel"' in older and "problems left" not in older


def test_curve_of_a_training_under_way(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=("problems", "traces", "filter", "train"))
    (folder / "students" / "tiny-qwen").rename(folder / "students" / "tiny-qwen.partial")
    html = make_report(folder)
    assert "student tiny-qwen has not been trained" in html
    assert [line["label"] for line in embedded(html)["charts"][0]["lines"]][-2:] == ["traces", "traces, validation"]


def test_one_family_needs_no_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for path in (folder / "evals").glob("*.jsonl"):
        path.write_text(re.sub(r'"family": "\w+"', '"family": ""', path.read_text()))
    html = make_report(folder)
    assert 'id="families"' not in html and 'href="#families"' not in html and 'id="endings"' in html


def test_reader_shows_as_many_as_asked_and_rejected_ones_among_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", train=120)
    data = embedded(make_report(folder, "report.traces_shown=20", "report.answers_shown=7"))
    assert len(data["traces"]) == 20 and len(data["answers"]) == 7
    assert sum(not item["accepted"] for item in data["traces"]) == 10
    assert len({item["family"] for item in data["traces"] if item["accepted"]}) == 6
    failed = {next(name for name, ok, _ in t["verdicts"] if not ok) for t in data["traces"] if not t["accepted"]}
    assert {"truncation", "correctness", "duplicates"} <= failed
    assert make_report(folder, "report.traces_shown=0", "report.answers_shown=0").count('class="reader"') == 0


def test_answers_are_the_first_samples_with_the_score_of_all(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    samples = folder / "evals" / "tiny-qwen.jsonl"
    rows = [json.loads(line) for line in samples.open()]
    samples.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    for item in embedded(make_report(folder))["answers"]:
        own = [row for row in rows if row["problem_id"] == item["id"]]
        answer = item["answers"]["tiny-qwen"]
        assert (answer["right"], answer["samples"]) == (sum(row["correct"] for row in own), 4)
        first = next(row for row in own if row["sample"] == 0)
        assert answer["extracted"] == first["extracted"] and answer["correct"] == first["correct"]
        assert answer["reasoning"] in first["text"] and answer["response"] in first["text"]


def test_stale_traces_are_not_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "traces" / "traces.jsonl"
    old = json.loads(path.read_text().splitlines()[0]) | {"id": "0" * 16}
    path.write_text(json.dumps(old) + "\n" + path.read_text())
    assert "0" * 16 not in {item["id"] for item in embedded(make_report(folder, "report.traces_shown=1000"))["traces"]}


def test_long_texts_are_cut_in_the_middle_and_the_page_stays_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "traces" / "traces.jsonl"
    rows = [json.loads(line) for line in path.open()]
    for row in rows:
        row["reasoning"] = "start " + "x" * 300_000 + " end"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = make_report(folder, "report.traces_shown=100")
    assert len(html) < 3_000_000
    for item in embedded(html)["traces"]:
        assert item["reasoning"].startswith("start ") and item["reasoning"].endswith(" end")
        assert re.search(r"\[… [\d,]+ characters left out here …\]", item["reasoning"])
    assert readers.limit(10**9) == readers.SHORTEST_CUT and readers.limit(0) == readers.LONGEST_CUT
    assert readers.cut("short", 100) == "short"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nwhy\n</think>\n\n\\boxed{1}", ("why", "\\boxed{1}", True)),
        ("why\n</think>\n\n\\boxed{1}", ("why", "\\boxed{1}", True)),
        ("\n</think>\n\n\\boxed{1}", ("", "\\boxed{1}", True)),
        ("never closed", ("never closed", "", False)),
        ("", ("", "", False)),
    ],
)
def test_split_thinking(text: str, parts: tuple[str, str, bool]) -> None:
    assert readers.split_thinking(text) == parts


def test_broken_line_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "verdicts.jsonl").open("a") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match=r"verdicts\.jsonl:121"):
        make_report(folder)


def test_page_is_the_same_for_the_same_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert make_report(folder) == make_report(folder)
