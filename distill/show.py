"""`distill show RUN`: a run's traces in the terminal, each with its verdicts beside it.

On a terminal the traces stream into a pager (less), one after the other, so that a million of them start as
fast as one; into a pipe they go as plain text. Model text is hostile to a terminal too: control characters
and reordering marks are shown by name and never sent.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from distill.errors import UserError
from distill.generation.totals import error_kind
from distill.jsonl import read_jsonl
from distill.visible import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Row = dict[str, Any]

STATUSES = ("all", "accepted", "rejected")
# Side by side needs this many columns; narrower terminals get the verdicts below the text.
WIDE = 100

_ENDINGS = {
    "length": "cut off at the token limit",
    "prompt_too_long": "it does not fit the context, so it was not sent",
    "content_filter": "the server held the answer back",
    "refusal": "the model refused to answer",
    "empty": "nothing but white space came",
    "invalid_utf8": "the bytes were no text",
}


@dataclass(frozen=True)
class Choice:
    """Which traces to show; every field that is set must hold."""

    status: str = "all"
    family: str | None = None
    failed: str | None = None  # name of a filter that the trace failed
    problem: str | None = None  # beginning of a problem's id
    trace: str | None = None  # beginning of a trace's id


@dataclass(frozen=True)
class Item:
    trace: Row
    problem: Row
    line: Row | None  # the trace's line of verdicts.jsonl; None where the filters have not seen it


def run(
    folder: Path,
    *,
    status: str = "all",
    family: str | None = None,
    failed: str | None = None,
    problem: str | None = None,
    trace: str | None = None,
    limit: int | None = None,
) -> None:
    """Page the traces of a run folder; see Choice for the filters.

    Raises UserError if there are no traces, a filter needs verdicts that do not exist, or a name is unknown.
    """
    choice = Choice(status, family, failed, problem, trace)
    items = chosen(folder, choice)
    first = next(items, None)
    failed = failures(folder) if choice == Choice() else None
    if first is None:
        print("\n".join(["no trace matches", *([failed] if failed else [])]), file=sys.stderr)
        return
    with _output() as (console, stream):
        if failed:
            stream.write(f"{failed}\n\n")
        for item in islice(chain([first], items), limit):
            # Captured and written here: when the reader goes away, rich would end the process with an error code.
            with console.capture() as captured:
                for part in rendered(item, console):
                    console.print(part, soft_wrap=not console.is_terminal)
            stream.write(captured.get())


def chosen(folder: Path, choice: Choice) -> Iterator[Item]:
    """The traces that fit, in the file's order, read as they are asked for. Names are checked before the first one."""
    path = folder / "traces" / "traces.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; `distill traces` writes it")
    problems = {row["id"]: row for row in _rows(folder / "problems.jsonl")}
    ledger = {row["trace_id"]: row for row in _rows(folder / "verdicts.jsonl")}
    _check(folder, choice, problems, ledger)
    for trace in _rows(path):
        item = Item(trace, problems.get(trace["problem_id"], {}), ledger.get(trace["id"]))
        if _fits(item, choice):
            yield item


def _rows(path: Path) -> Iterator[Row]:
    return (row for _, row in read_jsonl(path, torn_ok=True)) if path.is_file() else iter(())


def _check(folder: Path, choice: Choice, problems: dict[str, Row], ledger: dict[str, Row]) -> None:
    if choice.status not in STATUSES:
        raise UserError(f"status '{choice.status}' is not known; choose one of {', '.join(STATUSES)}")
    if (choice.status != "all" or choice.failed) and not ledger:
        raise UserError(f"{folder}: the traces have no verdicts yet; run `distill filter` first")
    if choice.failed:
        names = list(dict.fromkeys(name for line in ledger.values() for name in line["verdicts"]))
        if choice.failed not in names:
            raise UserError(f"no filter '{choice.failed}' judged these traces; there are {', '.join(names)}")
    families = {_family(row) for row in problems.values()}
    if choice.family and choice.family not in families:
        raise UserError(f"no problem is of family '{choice.family}'; there are {', '.join(sorted(families))}")
    if choice.problem and not any(key.startswith(choice.problem) for key in problems):
        raise UserError(f"{folder / 'problems.jsonl'}: no problem's id begins with '{choice.problem}'")


def _family(problem: Row) -> str:
    return str(problem.get("meta", {}).get("family") or problem.get("source") or "unknown")


def _fits(item: Item, choice: Choice) -> bool:
    if choice.status != "all" and (item.line is None or item.line["accepted"] != (choice.status == "accepted")):
        return False
    if choice.failed and (item.line is None or item.line["verdicts"].get(choice.failed, {}).get("pass", True)):
        return False
    return (
        (choice.family is None or _family(item.problem) == choice.family)
        and item.trace["problem_id"].startswith(choice.problem or "")
        and item.trace["id"].startswith(choice.trace or "")
    )


def failures(folder: Path) -> str | None:
    """How many samples were given up, and why, in one line; None where none was."""
    last = {row["id"]: error_kind(row["error"]) for row in _rows(folder / "traces" / "failures.jsonl")}
    if not last:
        return None
    kinds = ", ".join(f"{visible(kind)} {count}" for kind, count in Counter(last.values()).most_common())
    said = f"{len(last)} samples were" if len(last) > 1 else "1 sample was"
    return f"{said} given up at some start ({kinds}); `distill traces` asks again for those still missing"


def ending(trace: Row) -> str:
    """How the trace ended, with what that means where the name alone does not say it."""
    reason = visible(str(trace["finish_reason"]))
    return f"ended by {reason}{f' ({_ENDINGS[reason]})' if reason in _ENDINGS else ''}"


def judgement(item: Item) -> tuple[str, str]:
    """What became of the trace, and the style that says so."""
    if item.line is None:
        return "not judged", "yellow"
    failed = [name for name, said in item.line["verdicts"].items() if not said["pass"]]
    return ("accepted", "green") if item.line["accepted"] else (f"rejected: {', '.join(failed)}", "red")


def rendered(item: Item, console: "Console") -> "Iterator[RenderableType]":
    """One trace for the console's width: verdicts beside the text, or below it where there is no room."""
    from rich.console import Group
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    said, style = judgement(item)
    trace = item.trace
    family = visible(_family(item.problem))
    title = Text.assemble((visible(trace["id"]), "bold"), f"  {family}  ", (visible(said), style))
    if console.is_terminal:
        yield Rule(style="dim")
    yield title
    prompt, reasoning, answer = (trace[f"{part}_tokens"] for part in ("prompt", "reasoning", "answer"))
    facts = f"  {prompt} prompt, {reasoning} reasoning, {answer} answer tokens"
    if (attempts := trace.get("attempts", 1)) > 1:
        facts += f"  {attempts} attempts"
    if endpoint := trace.get("endpoint"):
        facts += f"  from {endpoint}"
    yield Text.assemble(
        visible(f"problem {trace['problem_id']}  sample {trace['sample']}  "),
        (ending(trace), "" if trace["finish_reason"] == "stop" else "yellow"),
        visible(facts),
        style="dim",
    )
    texts = _texts(item)
    verdicts = _verdicts(item)
    if console.is_terminal and console.width >= WIDE:
        table = Table.grid(padding=(0, 3), expand=True)
        table.add_column(ratio=1)
        table.add_column(width=36)
        table.add_row(Group(*texts), Group(*verdicts))
        yield table
    else:
        yield from texts
        yield from verdicts
    yield Text("")


def _texts(item: Item) -> "list[RenderableType]":
    from rich.text import Text

    trace = item.trace
    question = item.problem.get("problem") or trace["messages"][0]["content"]
    reference = item.problem.get("answer")
    parts = [
        ("problem", question),
        ("reasoning", trace["reasoning"] or "(none)"),
        ("answer", trace["response"] or "(none)"),
    ]
    parts.append(("reference answer", "(none)" if reference is None else reference))
    lines: list[RenderableType] = []
    for name, text in parts:
        lines += [Text(name, style="bold cyan"), Text(visible(text))]
    return lines


def _verdicts(item: Item) -> "list[RenderableType]":
    from rich.text import Text

    lines: list[RenderableType] = [Text("verdicts", style="bold cyan")]
    if item.line is None:
        return [*lines, Text("the filters have not seen this trace", style="yellow")]
    for name, said in item.line["verdicts"].items():
        word, style = ("pass", "green") if said["pass"] else ("FAIL", "red")
        reason = " ".join(visible(said["reason"]).split())
        lines.append(Text.assemble((word, style), f"  {visible(name)}: ", (reason, "dim")))
    return lines


@contextmanager
def _output() -> "Iterator[tuple[Console, IO[str]]]":
    """A console to render with and a stream to write to: the pager's, or stdout where that is not a terminal.

    A reader that goes away early (`q` in the pager, `| head`) is no error.
    """
    from rich.console import Console

    if not sys.stdout.isatty():
        with suppress(AttributeError):  # a stdout replaced by a test or a notebook
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        try:
            yield Console(file=sys.stdout, force_terminal=False, no_color=True, highlight=False), sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:
            # Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    command = shlex.split(os.environ.get("PAGER", "less"))
    if not command or shutil.which(command[0]) is None:
        yield Console(highlight=False), sys.stdout
        return
    # R: colours pass; F: leave at once if it all fits; X: leave the text on the screen.
    settings = {"LESS": "FRX", **os.environ}
    width = shutil.get_terminal_size().columns
    pager = subprocess.Popen(command, stdin=subprocess.PIPE, env=settings, encoding="utf-8", errors="replace")
    assert pager.stdin is not None
    try:
        yield Console(force_terminal=True, width=width, highlight=False), pager.stdin
    except BrokenPipeError:
        pass
    finally:
        with suppress(BrokenPipeError):
            pager.stdin.close()
        pager.wait()
