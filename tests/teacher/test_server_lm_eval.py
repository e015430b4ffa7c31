"""lm-eval's own clients against the server, offline: a generation task in chat form, and log-likelihoods by echo."""

import json

import pytest

from tests.teacher import serving

PROBLEM = "State the final answer to the following arithmetic problem: {} ="
SUMS = [(f"{a} + {b}", str(a + b)) for a, b in ((12, 30), (7, 5), (41, 18), (3, 66))]


@pytest.fixture(scope="module")
def tiny_r1():
    """tiny-r1 and the folder it lies in."""
    from transformers import AutoTokenizer

    from teacher import load_model
    from teacher.engine import Engine
    from teacher.server.generate import read_defaults

    model, tokenizer = load_model(serving.TINY_R1), AutoTokenizer.from_pretrained(serving.TINY_R1)
    what = serving.served(
        names=("tiny-r1",), model=model, tokenizer=tokenizer, max_len=2048, vocab_size=405,
        stop_ids=(tokenizer.eos_token_id,), defaults=read_defaults(serving.TINY_R1),
    )  # fmt: skip
    with serving.serve(Engine(model, tokenizer), what) as running:
        yield running


@pytest.fixture
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def write_task(folder, rows, lines):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\ntest_split: test\n"
    (folder / "local_task.yaml").write_text(f"task: local_task\n{data}{lines}")


def evaluate(folder, model, **settings):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=["local_task"], task_manager=manager, log_samples=True, **settings)


GENERATE = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], temperature: 0, max_gen_toks: 800}
metric_list: [{metric: exact_match}]
"""


def test_local_chat_completions_solves_sums(tiny_r1, tmp_path, offline):
    rows = [{"question": PROBLEM.format(text), "answer": f"The answer is \\boxed{{{answer}}}"} for text, answer in SUMS]
    write_task(tmp_path, rows, GENERATE)
    settings = {"model": "tiny-r1", "base_url": f"{tiny_r1.url}/v1/chat/completions", "num_concurrent": 4}
    results = evaluate(tmp_path, "local-chat-completions", model_args=settings, apply_chat_template=True)
    replies = [sample["resps"][0][0] for sample in results["samples"]["local_task"]]
    assert all("\\boxed{" in reply and "think>" not in reply for reply in replies), replies
    assert results["results"]["local_task"]["exact_match,none"] >= 0.5


CHOOSE = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.mark.parametrize("tokenized", [False, True])
def test_local_completions_scores_as_the_model_does(tiny_r1, tmp_path, offline, tokenized):
    from transformers import AutoTokenizer

    from teacher import load_model

    rows = [{"question": PROBLEM.format(text), "choices": [f" {answer}", " 999", " the"]} for text, answer in SUMS]
    write_task(tmp_path, rows, CHOOSE)
    settings = {
        "model": "tiny-r1", "base_url": f"{tiny_r1.url}/v1/completions", "tokenizer_backend": "huggingface",
        "tokenizer": str(serving.TINY_R1), "tokenized_requests": tokenized, "batch_size": 3,
    }  # fmt: skip
    results = evaluate(tmp_path, "local-completions", model_args=settings)
    model, tokenizer = load_model(serving.TINY_R1), AutoTokenizer.from_pretrained(serving.TINY_R1)
    for row, sample in zip(rows, results["samples"]["local_task"], strict=True):
        for choice, (found, greedy) in zip(row["choices"], sample["filtered_resps"], strict=True):
            context = tokenizer(row["question"])["input_ids"]
            whole = tokenizer(row["question"] + choice)["input_ids"]
            rows_PV = serving.log_probs(model, whole)[len(context) - 1 :]
            own = [float(row_V[token]) for row_V, token in zip(rows_PV, whole[len(context) :], strict=True)]
            assert float(found) == pytest.approx(sum(own), abs=1e-3)
            assert bool(greedy) == all(abs(a - float(b.max())) < 1e-6 for a, b in zip(own, rows_PV, strict=True))
