"""`distill show`: the right traces, plain text into a pipe, and no control character to a terminal."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from distill import show
from distill.errors import UserError
from distill.visible import visible
from tests.distill.fake_run import FILTERS, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "shown", hostile=True)


def ids(folder: Path, **choice: str) -> list[str]:
    return [item.trace["id"] for item in show.chosen(folder, show.Choice(**choice))]


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "verdicts.jsonl").open()]


def test_choices(folder: Path) -> None:
    lines = ledger(folder)
    assert ids(folder) == [line["trace_id"] for line in lines]
    assert ids(folder, status="rejected") == [line["trace_id"] for line in lines if not line["accepted"]]
    assert set(ids(folder, status="accepted")) == set(ids(folder)) - set(ids(folder, status="rejected"))
    failed = [line["trace_id"] for line in lines if not line["verdicts"]["correctness"]["pass"]]
    assert failed and ids(folder, failed="correctness") == failed
    assert ids(folder, trace=lines[3]["trace_id"][:10]) == [lines[3]["trace_id"]]
    assert ids(folder, problem=lines[0]["problem_id"]) == [lines[0]["trace_id"], lines[1]["trace_id"]]


def test_piped_output_is_plain_and_complete(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show.run(folder, status="rejected")
    text = capsys.readouterr().out
    assert not set(text) & {chr(c) for c in range(32)} - {"\n", "\t"}
    assert not set(text) & set("\x7f\x9b\u202e\u2028\ud800")
    rejected = [line for line in ledger(folder) if not line["accepted"]]
    assert all(line["trace_id"] in text for line in rejected)
    assert text.count("FAIL") == sum(not said["pass"] for line in rejected for said in line["verdicts"].values())
    assert "[bold red]not markup[/]" in text
    problem = next(json.loads(line) for line in (folder / "problems.jsonl").open())
    assert problem["problem"] in text or rejected[0]["problem_id"] != problem["id"]


def test_lines_into_a_pipe_are_not_wrapped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = next(show.chosen(folder, show.Choice()))
    show.run(folder, limit=1)
    lines = capsys.readouterr().out.splitlines()
    assert visible(first.problem["problem"]) in lines
    assert all(any(line.startswith((f"pass  {name}", f"FAIL  {name}")) for line in lines) for name in FILTERS)


def test_limit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show.run(folder, limit=3)
    assert capsys.readouterr().out.count("reference answer\n") == 3


def test_names_that_do_not_exist(folder: Path, tmp_path: Path) -> None:
    for choice, said in (
        ({"failed": "corectness"}, "no filter 'corectness'.*correctness"),
        ({"family": "gdc"}, "no problem is of family 'gdc'.*gcd"),
        ({"problem": "zzz"}, "no problem's id begins with 'zzz'"),
        ({"status": "bad"}, "status 'bad' is not known"),
    ):
        with pytest.raises(UserError, match=said):
            ids(folder, **choice)
    with pytest.raises(UserError, match="no such file"):
        ids(tmp_path)


def test_without_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", stages=("problems", "traces"))
    show.run(folder, limit=1)
    assert "the filters have not seen this trace" in capsys.readouterr().out
    with pytest.raises(UserError, match="run `distill filter` first"):
        ids(folder, status="rejected")


def test_last_line_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=("problems", "traces"))
    before = ids(folder)
    with (folder / "traces" / "traces.jsonl").open("a") as file:
        file.write('{"id": "torn", "probl')
    assert ids(folder) == before


@pytest.mark.parametrize("width", [60, 140])
def test_terminal_puts_verdicts_beside_the_text_where_there_is_room(folder: Path, width: int) -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=width, record=True, file=io.StringIO())
    item = next(show.chosen(folder, show.Choice()))
    for part in show.rendered(item, console):
        console.print(part)
    text = console.export_text()
    assert any("problem" in line and "verdicts" in line for line in text.splitlines()) == (width >= show.WIDE)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b[31mred" not in text


def test_reader_that_closes_the_pipe_is_no_error(folder: Path) -> None:
    program = f"from pathlib import Path; from distill import show; show.run(Path({str(folder)!r}))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 0 and process.stderr.read() == b""


def test_named_outcomes_and_failures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", stages=("problems", "traces"))
    path = folder / "traces" / "traces.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    row |= {
        "finish_reason": "content_filter",
        "reasoning": "",
        "response": "",
        "attempts": 3,
        "endpoint": "http://a/v1",
    }
    odd = {**row, "id": "other", "finish_reason": "odd\x1b", "attempts": 1}
    path.write_text(json.dumps(row) + "\n" + json.dumps(odd) + "\n")
    kinds = ["timeout: no byte", "http_500: \x1b[31m", "http_500: again", "timeout"]
    lines = [json.dumps({"id": sample, "error": kind}) for sample, kind in zip("abbc", kinds, strict=True)]
    (folder / "traces" / "failures.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"torn')
    said = "3 samples were given up at some start (timeout 2, http_500 1)"
    show.run(folder)
    text = capsys.readouterr().out
    assert text.startswith(said)
    assert "ended by content_filter (the server held the answer back)" in text
    assert "3 attempts  from http://a/v1" in text and "reasoning\n(none)\nanswer\n(none)" in text
    assert "ended by odd" in text and "\x1b" not in text
    show.run(folder, trace="other")
    assert said not in capsys.readouterr().out
    path.write_text("")
    show.run(folder)
    assert said in capsys.readouterr().err
