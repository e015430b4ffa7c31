"""The teacher as an lm-eval model against lm-eval's own model on the same checkpoint, and lm-eval's command with it."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from distill.errors import UserError
from distill.lm_eval import NAME, TARGET
from distill.lm_eval_teacher import TeacherLM
from tests.tiny import ASSISTANT, BOS, EOS, USER, write_teacher

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_teacher(tmp_path_factory.mktemp("model") / "tiny", seed=3))


def ours(folder, **changes):
    return TeacherLM(folder, **({"device": "cpu"} | changes))


def theirs(folder, **changes):
    return HFLM(folder, **({"device": "cpu", "dtype": "auto", "batch_size": 4} | changes))


def instances(kind, arguments):
    return [Instance(kind, {}, args, 0, metadata=("task", n, 1)) for n, args in enumerate(arguments)]


def same_scores(found, wanted):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-4, rel=1e-5)


def test_log_likelihoods_are_hflms(folder):
    contexts = ["Is it so?\nAnswer: ", "", BOS + "begins with it", TEXT * 3, "ends in blanks  "]
    asked = [(context, text) for context in contexts for text in ("yes", "no", " maybe not", "y")]
    asked += [asked[0], ("x" * 600, "y" * 40), ("x" * 600, "z")]  # twice the same; longer than the context of 512
    requests = instances("loglikelihood", asked)
    teacher, hflm = ours(folder), theirs(folder)
    same_scores(teacher.loglikelihood(requests), hflm.loglikelihood(requests))


def test_what_the_model_says_is_greedy(folder):
    teacher = ours(folder)
    (completion,) = teacher._complete([teacher._request("0", *instances("generate_until", [("a", {})]), 0)[0]])
    said = completion.token_ids
    pairs = [(None, [64], said[:9]), (None, [64], [*said[:8], (said[8] + 1) % 256]), (None, [64], said[:1])]
    assert teacher.tok_encode("a") == [64]
    assert [greedy for _, greedy in teacher._loglikelihood_tokens(pairs)] == [True, False, True]


def test_log_likelihoods_with_other_special_tokens_and_length_are_hflms(folder):
    asked = [("", "yes"), (TEXT, "no"), (TEXT, "or"), ("", TEXT)]
    settings = {"prefix_token_id": 7, "add_bos_token": True, "max_length": 48}
    requests = instances("loglikelihood", asked)
    same_scores(ours(folder, **settings).loglikelihood(requests), theirs(folder, **settings).loglikelihood(requests))


@pytest.mark.parametrize("max_length", [None, 32])
def test_rolling_log_likelihoods_are_hflms(folder, max_length):
    requests = instances("loglikelihood_rolling", [(TEXT,), (TEXT * 14,), ("",), ("é",)])
    found = ours(folder, max_length=max_length).loglikelihood_rolling(requests)
    wanted = theirs(folder, max_length=max_length).loglikelihood_rolling(requests)
    assert found == pytest.approx(wanted, abs=1e-4, rel=1e-5) and found[2] == 0


def test_greedy_texts_are_hflms(folder):
    prompts = ["", "What is 2 + 2?", TEXT, BOS + "x", TEXT * 20]  # the last fills the context: its beginning is cut
    prompts[0] = "a"
    plain = instances("generate_until", [(prompt, {"max_gen_toks": 24}) for prompt in prompts])
    teacher, hflm = ours(folder), theirs(folder, batch_size=1)
    texts = teacher.generate_until(plain)
    assert texts == hflm.generate_until(plain)
    assert max(map(len, texts)) > 8
    # Stop strings that do occur, in the middle, of several tokens; a list, a string, with one that does not.
    stops = [text[len(text) // 2 :][:2] for text in texts]
    asked = [
        (prompt, {"until": [stop, "no such thing"], "max_tokens": 24})
        for prompt, stop in zip(prompts, stops, strict=True)
    ]
    asked += [(prompts[1], {"until": stops[1], "do_sample": False, "temperature": 0.7, "num_beams": 1})]
    stopped = teacher.generate_until(instances("generate_until", asked))
    assert stopped == hflm.generate_until(instances("generate_until", asked))
    assert all(len(cut) < len(text) for cut, text in zip(stopped, texts, strict=False) if text)


def test_generation_ends_where_the_stop_string_is_complete(folder, monkeypatch):
    teacher = ours(folder)
    (text,) = teacher.generate_until(instances("generate_until", [("a", {"max_gen_toks": 200})]))
    lengths = []
    inner = teacher._complete
    monkeypatch.setattr(
        teacher, "_complete", lambda asked: (lengths.append(len(c.token_ids)) or c for c in inner(asked))
    )
    teacher.generate_until(instances("generate_until", [("a", {"max_gen_toks": 200, "until": text[2:4]})]))
    assert lengths[0] < 40


def test_a_prompt_keeps_its_beginning_while_a_token_fits_behind_it(folder):
    teacher = ours(folder)
    (one,) = instances("generate_until", [("x" * 500, {"max_gen_toks": 32768})])
    request, _ = teacher._request("0", one, 0)
    assert len(request.prompt_ids) == 500 and request.max_tokens == 12
    (long,) = instances("generate_until", [("x" * 900, {"max_gen_toks": 32768})])
    request, _ = teacher._request("0", long, 0)
    assert len(request.prompt_ids) == 256 and request.max_tokens == 256


def test_samples_differ_and_depend_on_the_seed_alone(folder):
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_gen_toks": 12}
    one, other = instances("generate_until", [("What?", settings)] * 2)
    requests = [one] * 4 + [other] * 4  # as lm-eval repeats them
    texts = ours(folder, seed=1).generate_until(requests)
    assert len(set(texts)) == 8
    assert ours(folder, seed=1, max_batch_size=2).generate_until(requests) == texts
    assert ours(folder, seed=1).generate_until(requests[4:])[:2] == texts[4:6]
    assert not set(ours(folder, seed=2).generate_until(requests)) & set(texts)
    (seeded,) = instances("generate_until", [("What?", settings | {"seed": 1})])
    assert ours(folder, seed=2).generate_until([seeded]) == texts[:1]


def test_batch_sizes(folder):
    sizes = [({}, 256), ({"batch_size": "auto:4"}, 256), ({"batch_size": 1}, 256), ({"batch_size": "8"}, 8),
             ({"batch_size": 1, "max_batch_size": 1}, 1)]  # fmt: skip
    assert [ours(folder, **given).batch_size for given, _ in sizes] == [size for _, size in sizes]


def test_chats_are_rendered_as_by_hflm(folder):
    teacher, hflm = ours(folder), theirs(folder)
    chat = [{"role": "user", "content": "2 + 2?"}]
    prompt = teacher.apply_chat_template(chat)
    assert prompt == hflm.apply_chat_template(chat) == f"{BOS}{USER}2 + 2?{ASSISTANT}<think>\n"
    assert teacher.tok_encode(prompt).count(256) == 1
    begun = [*chat, {"role": "assistant", "content": "It is"}]
    assert teacher.apply_chat_template(begun, False) == hflm.apply_chat_template(begun, False)
    assert teacher.tokenizer_name == hflm.tokenizer_name
    assert teacher.chat_template(True) == hflm.chat_template(True)
    no_system = "{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = "{% for m in messages %}" + no_system + "{{ m['content'] }}{% endfor %}"
    teacher.tokenizer.chat_template = template
    assert teacher.apply_chat_template([{"role": "system", "content": "s"}, *chat]) == "2 + 2?"


@pytest.mark.parametrize("end", ["</think>", 262, "262"])
def test_only_what_follows_the_thinking_counts_and_is_stopped(folder, end):
    teacher = ours(folder, think_end_token=end)
    ids = teacher.tok_encode("one\n\ntwo</think>\n\nthree\n\nfour" + EOS)
    assert teacher._answer(ids, ["\n\n"]) == "three"
    assert teacher._answer(ids[:5], ["\n\n"]) == "one"
    (one,) = instances("generate_until", [("x", {"until": ["\n\n"]})])
    request, until = teacher._request("0", one, 0)
    assert (list(request.stop), until) == ([], ["\n\n", EOS])
    request, until = ours(folder)._request("0", one, 0)
    assert list(request.stop) == until == ["\n\n", EOS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained is None; expected a model folder or the name of a shipped model"),
        ({"pretrained": "nowhere"}, "pretrained: 'nowhere' is neither a folder nor a shipped model"),
        ({"pretrained": "tests"}, r"tests: no config\.json; expected a model folder \(pretrained\)"),
        ({"batchsize": 4}, "batchsize is not known to distill-teacher; did you mean batch_size"),
        ({"peft": "x"}, "peft is not known to distill-teacher; there are add_bos_token, "),
        ({"dtype": "float99"}, "dtype is 'float99'; expected "),
        ({"device": "moon"}, "device is 'moon', which torch cannot use"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many'; expected a whole number"),
        ({"max_length": 1000}, "max_length is 1000; the model's context is 512 tokens"),
        ({"enable_thinking": True}, "think_end_token must say where the thinking ends"),
    ],
)
def test_a_wrong_argument_is_one_sentence(folder, arguments, message):
    given = {"pretrained": folder} | arguments if arguments else {}
    with pytest.raises(ValueError, match=message):
        simple_evaluate(model="distill-teacher", model_args={"device": "cpu"} | given, tasks=["any"])


def test_what_a_task_cannot_ask_for(folder):
    teacher = ours(folder)
    with pytest.raises(UserError, match="generation_kwargs of task: num_beams=4 is not known to this model"):
        teacher.generate_until(instances("generate_until", [("x", {"num_beams": 4})]))
    with pytest.raises(ValueError, match=r"top_p is 2\.0"):
        teacher.generate_until(instances("generate_until", [("x", {"top_p": 2.0})]))
    thinking = ours(folder, enable_thinking=True, think_end_token="</think>")
    with pytest.raises(UserError, match="a task that scores given answers cannot be run with it"):
        thinking.loglikelihood(instances("loglikelihood", [("a", "b")]))


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "4"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks on one file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{n} + 2?", "choices": [f" {n + 2}", " no", f" {n} is it"], "answer": n % 3} for n in range(12)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.replace("FILE", str(file)))
    (folder / "generate.yaml").write_text(GENERATE.replace("FILE", str(file)))
    return folder


def lm_eval(*arguments, cache):
    """The command, offline."""
    command = [sys.executable, "-m", "distill.lm_eval", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=300)


def test_the_command_finds_the_model_and_gives_hflms_results(folder, tasks, tmp_path):
    names = ["tiny_choice", "tiny_generate"]
    done = lm_eval(
        "--model", "distill-teacher", "--model_args", f"pretrained={folder}", "--tasks", ",".join(names),
        "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--log_samples", cache=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())
    assert found["config"]["model"] == "distill-teacher" and len(found["config"]["model_sha"]) == 12
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    wanted = simple_evaluate(model=theirs(folder), tasks=names, task_manager=manager, bootstrap_iters=0)
    for name in names:
        metrics = {key: value for key, value in wanted["results"][name].items() if key.endswith(",none")}
        stderr = {key for key in metrics if "stderr" in key}
        assert {key: found["results"][name][key] for key in metrics.keys() - stderr} == {
            key: value for key, value in metrics.items() if key not in stderr
        }
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        for mine, theirs_ in zip(samples, wanted["samples"][name], strict=True):
            if name == "tiny_generate":
                assert mine["resps"] == theirs_["resps"]
            else:
                pairs = [
                    (float(a), float(b)) for [(a, _)], [(b, _)] in zip(mine["resps"], theirs_["resps"], strict=True)
                ]
                assert all(a == pytest.approx(b, abs=1e-4) for a, b in pairs)


def test_k_samples_of_our_own_tasks(folder, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"id": "p", "problem": "1 + 1", "answer": "2", "kind": "math"}) + "\n")
    manager = TaskManager(
        include_path=str(ROOT / "evals" / "tasks"), include_defaults=False, metadata={"problems": str(problems)}
    )
    results = simple_evaluate(
        model="distill-teacher", model_args={"pretrained": folder, "device": "cpu"}, tasks=["distill_problems"],
        task_manager=manager, apply_chat_template=True, gen_kwargs="max_gen_toks=16", bootstrap_iters=0,
    )  # fmt: skip
    ((texts,),) = [sample["resps"] for sample in results["samples"]["distill_problems"]]
    assert len(set(texts)) == 4
    assert results["results"]["distill_problems"]["mean@k,all"] == 0


def test_later_releases_of_lm_eval_find_the_model_by_its_entry_point():
    """Read from pyproject.toml: what is installed may be older."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, target),) = project["entry-points"]["lm_eval.models"].items()
    assert (name, target) == (NAME, TARGET)
    assert EntryPoint(name, target, "lm_eval.models").load() is TeacherLM
