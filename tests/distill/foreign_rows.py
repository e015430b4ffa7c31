"""Rows as others publish their traces, in every kind of source, and an import of them: for the tests of imports."""

import gzip
import json

from distill.foreign import importing
from distill.recipe_load import load_recipe
from distill.runfolder import RunFolder

THOUGHT, ANSWER = "2 and 2 make 4.", "It is \\boxed{4}."
R1 = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
SKY = (
    f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n"
    f"<|begin_of_solution|>\n\n{ANSWER}\n\n<|end_of_solution|>"
)
ASKED = "What is 2 + 2?"

ROWS = {
    "open-r1": {
        "problem": ASKED, "solution": "By counting, $\\boxed{4}$.", "answer": "4", "problem_type": "Algebra",
        "question_type": "math-word-problem", "source": "olympiads", "uuid": "u1", "is_reasoning_complete": [True],
        "generations": [R1], "correctness_math_verify": [True], "correctness_llama": None, "finish_reasons": ["stop"],
        "correctness_count": 1, "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": R1}],
    },
    "openthoughts": {
        "system": "Your role as an assistant involves ...",
        "conversations": [
            {"from": "user", "value": f"Return your final response within \\boxed{{}}. {ASKED}"},
            {"from": "assistant", "value": SKY},
        ],
    },
    "openthoughts-metadata": {
        "problem": ASKED, "deepseek_reasoning": THOUGHT, "deepseek_solution": ANSWER,
        "ground_truth_solution": "So \\boxed{4}", "domain": "math", "source": "numina_math", "test_cases": None,
        "starter_code": None,
    },
    "am": {
        "messages": [
            {"role": "user", "content": ASKED, "info": {
                "source": "OpenMath", "reference_answer": "4", "test_case": None, "think_content": None,
                "answer_content": None}},
            {"role": "assistant", "content": f"<think>{THOUGHT}</think><answer>{ANSWER}</answer>", "info": {
                "source": None, "reference_answer": None, "test_case": None, "think_content": THOUGHT,
                "answer_content": ANSWER}},
        ],
    },
    "s1": {
        "question": ASKED, "solution": "4", "cot_type": "math", "source_type": "AI-MO/NuminaMath-CoT/aops_forum",
        "metadata": "{}", "cot": None, "thinking_trajectories": [THOUGHT], "attempt": ANSWER,
    },
    "s1.1": {
        "question": ASKED, "solution": "4", "cot_type": "math", "source_type": "aime", "metadata": "{}",
        "gemini_thinking_trajectory": "x", "gemini_attempt": "y", "deepseek_thinking_trajectory": THOUGHT,
        "deepseek_attempt": ANSWER, "gemini_grade": "No", "deepseek_grade": "Yes",
    },
    "mip-overthinking": {
        "id": "gsm8k-normal-0", "set": "gsm8k", "kind": "normal", "model": "QwQ-32B", "prompt": ASKED, "answer": "4",
        "solution": "#### 4", "response": f"{THOUGHT}\n</think>\n\n{ANSWER}", "eval_result": None,
    },
    "messages": {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": R1}]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": R1}]},
    "prompt-response": {"prompt": ASKED, "response": R1},
}  # fmt: skip
ANSWERED = {"open-r1", "openthoughts-metadata", "am", "s1", "s1.1", "mip-overthinking"}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(tmp_path, *traces, **more):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"name": "mine", "traces": list(traces), **more}))
    return load_recipe(path)


def imported(folder, recipe):
    with RunFolder.open(folder, recipe) as run:
        facts = importing.run(recipe, run)
        manifest = run.manifest.data
    return facts, read(folder, "problems.jsonl"), read(folder, "traces/traces.jsonl"), manifest


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def many(count=40):
    return [
        ROWS["open-r1"] | {"problem": f"What is {n} + {n}?", "answer": str(2 * n), "uuid": str(n),
                           "generations": [R1.replace("4", str(2 * n)), f"Hm, {n}.\n</think>\n\n\\boxed{{{2 * n}}}"],
                           "finish_reasons": ["stop", "stop"], "is_reasoning_complete": [True, True],
                           "correctness_math_verify": [True, True]}
        for n in range(count)
    ]  # fmt: skip


def stored(kind, folder):
    """The same forty rows in every kind of source."""
    import pyarrow
    from pyarrow import parquet

    rows, text = many(), "".join(json.dumps(row) + "\n" for row in many()).encode()
    folder.mkdir()
    if kind == "jsonl":
        (folder / "data.jsonl").write_bytes(text)
    elif kind == "gz":
        (folder / "data.jsonl.gz").write_bytes(gzip.compress(text))
    elif kind == "zst":
        with pyarrow.CompressedOutputStream(str(folder / "data.jsonl.zst"), "zstd") as file:
            file.write(text)
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet", row_group_size=7)
    elif kind == "folder":
        write_rows(folder / "deep" / "data" / "train-00000.jsonl", rows[:15])
        parquet.write_table(pyarrow.Table.from_pylist(rows[15:]), folder / "deep" / "data" / "train-00001.parquet")
        write_rows(folder / "deep" / "data" / "test-00000.jsonl", rows[:5])
        (folder / "README.md").write_text("about")
        return {"source": str(folder), "split": "train"}
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        return {"source": str(folder / "saved")}
    return {"source": str(next(folder.iterdir()))}
