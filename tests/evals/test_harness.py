"""Our harness against plain lm-eval, its resume, and what becomes of killed and odd evaluations."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distill.jsonl import read_jsonl
from evals.harness import count_problems, evaluate
from evals.hf import HFBackend
from evals.lm import Answer, Ask
from students.pretrained import load_model, load_tokenizer
from tests.tiny import write_qwen

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {"model_name": "m", "revision": "r1", "tasks": ["distill_problems"], "samples": 3, "max_tokens": 24}


class FunctionBackend:
    """Answers with a function of the ask; remembers what it was asked."""

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def render(self, messages):
        return "|".join(message["content"] for message in messages)

    def generate(self, asks):
        for ask in sorted(asks, key=lambda ask: ask.id):  # not in the order asked
            self.asked.append(ask)
            yield self.reply(ask)


def right(ask: Ask) -> Answer:
    """Adds the two numbers of "a + b"."""
    a, _, b = ask.prompt.split("\n")[0].split()
    return Answer(ask.id, f"hm\n</think>\n\n\\boxed{{{int(a) + int(b)}}}", "stop", 7, 0.01)


def write_problems(path, count=6, **changes):
    rows = [
        {"id": f"p{n}", "problem": f"{n} + 2", "answer": str(n + 2), "kind": "math", "source": "x",
         "meta": {"family": "ab"[n % 2]}} | changes
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hf_backend(folder, batch_size=64):
    tokenizer = load_tokenizer(folder)
    return HFBackend(tokenizer, lambda: load_model(folder, tokenizer), batch_size=batch_size)


def test_rows_and_metrics(tmp_path):
    kept = []
    backend = FunctionBackend(right)
    result = evaluate(
        backend, problems=write_problems(tmp_path / "p.jsonl"), instruction="Box it.", keep=kept.extend, **SETTINGS
    )
    assert result.metrics == {"distill_problems": {"mean@k": 1.0, "truncated": 0.0, "no_answer": 0.0}}
    assert [(r["problem_id"], r["sample"]) for r in result.rows] == [(f"p{n}", k) for n in range(6) for k in range(3)]
    assert sorted(r["id"] for r in kept) == sorted(r["id"] for r in result.rows)
    row = result.rows[4]
    wanted = {
        "model": "m", "task": "distill_problems", "problem_id": "p1", "sample": 1, "family": "b", "extracted": "3",
        "correct": True, "verdict": "correct", "truncated": False, "no_answer": False, "tokens": 7,
    }  # fmt: skip
    assert wanted.items() <= row.items() and row["text"].endswith(r"\boxed{3}")
    assert {ask.prompt for ask in backend.asked if ask.id == row["id"]} == {"1 + 2\nBox it."}
    assert len({ask.seed for ask in backend.asked}) == 18


def test_a_cut_off_answer_is_never_correct_and_no_answer_is_counted(tmp_path):
    def reply(ask):
        answer = right(ask)
        if ask.prompt.startswith("0"):
            return Answer(ask.id, answer.text, "length", 24, 0.0)
        return Answer(ask.id, "</think> I do not know", "stop", 3, 0.0) if ask.prompt.startswith("1") else answer

    result = evaluate(FunctionBackend(reply), problems=write_problems(tmp_path / "p.jsonl"), **SETTINGS)
    (metrics,) = result.metrics.values()
    assert metrics == pytest.approx({"mean@k": 4 / 6, "truncated": 1 / 6, "no_answer": 1 / 6})
    assert [r["correct"] for r in result.rows if r["problem_id"] == "p0"] == [False] * 3
    assert result.rows[0]["verdict"] == "correct"  # what the grader said of the text stays visible


def test_a_box_inside_thinking_that_never_closes_is_no_answer(tmp_path):
    class Opening(FunctionBackend):
        def render(self, messages):
            return super().render(messages) + "\n<think>\n"

    def unclosed(ask):
        return Answer(ask.id, right(ask).text.replace("</think>", ""), "stop", 5, 0.0)

    path = write_problems(tmp_path / "p.jsonl")
    means = [
        evaluate(backend, problems=path, **SETTINGS).metrics["distill_problems"]["mean@k"]
        for backend in (Opening(unclosed), Opening(right), FunctionBackend(unclosed))
    ]
    assert means == [0.0, 1.0, 1.0]  # a template that opens no thinking leaves the whole text as the answer


def test_finished_samples_are_not_asked_again_and_everything_else_is(tmp_path):
    problems = write_problems(tmp_path / "p.jsonl")
    full = evaluate(FunctionBackend(right), problems=problems, **SETTINGS).rows
    backend, kept = FunctionBackend(right), []
    again = evaluate(backend, problems=problems, done=full[::2], keep=kept.extend, **SETTINGS)
    assert sorted(a.id for a in backend.asked) == sorted(r["id"] for r in full[1::2]) == sorted(r["id"] for r in kept)
    assert [r["id"] for r in again.rows] == [r["id"] for r in full]
    for change in ({"revision": "r2"}, {"max_tokens": 25}, {"temperature": 0.7}, {"seed": 1}, {"instruction": "Now."}):
        backend = FunctionBackend(right)
        evaluate(backend, problems=problems, done=full, **(SETTINGS | change))
        assert len(backend.asked) == 18, change
    backend = FunctionBackend(right)
    more = evaluate(backend, problems=problems, done=full, **(SETTINGS | {"samples": 4})).rows
    assert len(backend.asked) == 6 and len(more) == 24  # one more sample a problem, the others stay
    changed = write_problems(tmp_path / "q.jsonl", answer="5")
    backend = FunctionBackend(right)
    evaluate(backend, problems=changed, done=full, **SETTINGS)
    assert len(backend.asked) == 5 * 3  # another reference is another verdict; p3's was 5 before


def test_what_was_finished_before_a_failure_is_kept(tmp_path):
    calls = []

    def reply(ask):
        calls.append(ask.id)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return right(ask)

    kept = []
    with pytest.raises(OSError, match="No space"):
        evaluate(FunctionBackend(reply), problems=write_problems(tmp_path / "p.jsonl"), keep=kept.extend, **SETTINGS)
    assert sorted(row["id"] for row in kept) == sorted(calls[:5])


def test_a_backend_that_leaves_a_sample_out_is_told_on(tmp_path):
    class Lazy(FunctionBackend):
        def generate(self, asks):
            return super().generate(list(asks)[1:])

    with pytest.raises(ValueError, match="m: the backend left 1 of 18 samples unanswered"):
        evaluate(Lazy(right), problems=write_problems(tmp_path / "p.jsonl"), **SETTINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "no problems in it"),
        ("{\n", r"p\.jsonl:1: not valid JSON"),
        ("[1]\n", r"p\.jsonl:1: expected a JSON object, found list"),
        ('{"text": "1 + 1"}\n', r"p\.jsonl:1: no text field 'problem' or 'question'"),
        ('{"id": 1, "problem": "a"}\n' * 2, "two problems have the id '1'"),
    ],
)
def test_bad_problem_files_are_named(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        count_problems(["distill_problems"], path)


def test_unknown_task_and_missing_settings_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("DISTILL_PROBLEMS", raising=False)
    monkeypatch.delenv("DISTILL_BENCHMARKS", raising=False)
    with pytest.raises(ValueError, match="no task 'gsm9k'; there are aime24_r1"):
        count_problems(["gsm9k"])
    with pytest.raises(ValueError, match="DISTILL_PROBLEMS"):
        count_problems(["distill_problems"])
    with pytest.raises(ValueError, match=r"no folder for aime24\.jsonl"):
        count_problems(["aime24_r1"])


def test_published_benchmarks_load_as_tasks(tmp_path):
    data = Path(os.environ.get("DISTILL_DATA", REPOSITORY.parent / "shared" / "data")) / "benchmarks"
    if not (data / "gsm8k_test.jsonl").is_file():
        pytest.skip(f"no benchmark files in {data}")
    counts = count_problems(["gsm8k_r1", "math500_r1", "aime24_r1", "aime25_r1", "amc23_r1"], benchmarks=data)
    assert counts == {"gsm8k_r1": 1319, "math500_r1": 500, "aime24_r1": 30, "aime25_r1": 30, "amc23_r1": 40}
    from evals.harness import _load

    task = _load(["gsm8k_r1"], {"benchmarks": data})["tasks"]["gsm8k_r1"]
    assert task.doc_to_text(task.eval_docs[0]).endswith(
        "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert {len(doc["answer"].split()) for doc in task.eval_docs} == {1}


def test_gsm8k_as_published(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps({"question": "1 + 2", "answer": "One and two.\n#### 1,003"}) + "\n")
    result = evaluate(
        FunctionBackend(lambda ask: Answer(ask.id, r"\boxed{1003}", "stop", 1, 0.0)), problems=path, **SETTINGS
    )
    assert result.metrics["distill_problems"]["mean@k"] == 1.0


CHILD = """
import sys
from distill.jsonl import Appender
from tests.evals.test_harness import *
folder = Path(sys.argv[1])
with Appender(folder / "out.jsonl") as file:
    done = [row for _, row in read_jsonl(folder / "out.jsonl")]
    def slow(ask):
        time.sleep(0.05)
        with open(folder / "asked", "a") as log:
            log.write(ask.id + "\\n")
        return right(ask)
    result = evaluate(FunctionBackend(slow), problems=folder / "p.jsonl", done=done, keep=file.append_many,
                      **(SETTINGS | {"samples": 12}))
(folder / "metrics").write_text(json.dumps(result.metrics))
"""


def test_sigkill_loses_and_repeats_nothing_that_was_kept(tmp_path):
    write_problems(tmp_path / "p.jsonl")
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    kept_before: list[str] = []
    for attempt in range(2):
        child = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None:
            lines = out.read_bytes().count(b"\n") if out.exists() else 0
            if lines > 5 + 15 * attempt:
                break
            time.sleep(0.02)
        assert child.poll() is None, "the evaluation ended before it could be killed"
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept = [row["id"] for _, row in read_jsonl(out, torn_ok=True)]
        assert kept[: len(kept_before)] == kept_before
        (tmp_path / "asked").write_text("")  # from here on only what the next attempt asks
        kept_before = kept
    with out.open("a") as file:
        file.write('{"id": "torn')
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == 0
    rows = [row for _, row in read_jsonl(out)]
    assert len(rows) == len({row["id"] for row in rows}) == 6 * 12
    asked = (tmp_path / "asked").read_text().split()
    assert not set(asked) & set(kept_before) and len(asked) == 72 - len(kept_before)
    assert json.loads((tmp_path / "metrics").read_text())["distill_problems"]["mean@k"] == 1.0


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("student"))


def test_samples_of_a_model_do_not_depend_on_the_batch_or_on_resuming(tmp_path, student):
    problems = write_problems(tmp_path / "p.jsonl", count=5)
    whole = evaluate(hf_backend(student), problems=problems, **SETTINGS).rows
    single = evaluate(hf_backend(student, batch_size=2), problems=problems, done=whole[::4], **SETTINGS).rows
    assert [r["text"] for r in single] == [r["text"] for r in whole]
    assert len({r["text"] for r in whole}) == 15


def test_a_prompt_that_fills_the_context_is_answered_so(tmp_path, student):
    problems = write_problems(tmp_path / "p.jsonl", count=2, problem="x" * 600)
    result = evaluate(hf_backend(student), problems=problems, **SETTINGS)
    assert {(r["tokens"], r["truncated"], r["correct"]) for r in result.rows} == {(0, True, False)}


def test_no_chat_template_is_refused(tmp_path, student):
    tokenizer = load_tokenizer(student)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        HFBackend(tokenizer, lambda: None)


@pytest.fixture(scope="module")
def boxing_student(tmp_path_factory):
    """A model that has learned to say one thing, so that its metric is neither 0 nor 1."""
    folder = write_qwen(tmp_path_factory.mktemp("boxing"))
    tokenizer = load_tokenizer(folder)
    model = load_model(folder).train()
    prompts = [hf_render(tokenizer, f"{n} + 2") for n in range(6)]
    said = r"hm</think>\boxed{3}" + tokenizer.eos_token
    ids = torch.tensor(tokenizer([p + said for p in prompts], add_special_tokens=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def hf_render(tokenizer, text):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


def test_plain_lm_eval_gives_the_same_greedy_answers_and_metrics(tmp_path, boxing_student):
    """Greedy, because two samplers draw different samples: then texts and metrics must be equal one by one."""
    student, problems = boxing_student, write_problems(tmp_path / "p.jsonl", count=6)
    ours = evaluate(
        hf_backend(student), problems=problems, **(SETTINGS | {"temperature": 0.0, "top_p": 1.0, "samples": 4})
    )
    assert ours.metrics["distill_problems"]["mean@k"] == 1 / 6  # always 3: right for 1 + 2
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={student},dtype=float32",
        "--include_path", "evals/tasks", "--tasks", "distill_problems", "--apply_chat_template", "--batch_size", "4",
        "--metadata", json.dumps({"problems": str(problems)}), "--device", "cpu", "--log_samples",
        "--gen_kwargs", "temperature=0,do_sample=False,max_gen_toks=24", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=REPOSITORY, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["distill_problems"]
    (logged,) = (tmp_path / "out").rglob("samples_*.jsonl")
    texts = {row["doc"]["id"]: row["resps"][0] for row in map(json.loads, logged.read_text().splitlines())}
    assert texts == {row["id"]: [r["text"] for r in ours.rows if r["problem_id"] == row["id"]] for row in rows}
    (metrics,) = ours.metrics.values()
    assert metrics["mean@k"] == theirs["mean@k,all"] and metrics["no_answer"] == theirs["no_answer,all"]
