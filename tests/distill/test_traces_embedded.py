"""The embedded teacher: identity, prompts, limits and counts with a made-up engine; then the real one, resumed."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from distill import problems, traces
from distill.embedded import EmbeddedTeacher, identity, teacher_id, teacher_licence
from distill.errors import UserError
from distill.generation.asks import ListedAsks
from distill.recipe import Teacher
from distill.records import Ask
from tests.distill.small_run import make_recipe, open_run
from tests.tiny import ASSISTANT, BOS, USER, write_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("model") / "tiny")


def ask(text="What is 2 + 2?", identity="a", **changes):
    fields = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 50, "seed": 1} | changes
    return Ask(identity, [{"role": "user", "content": text}], **fields)


def load(folder, **changes):
    return EmbeddedTeacher(Teacher(model=str(folder), **changes))


def replies(teacher, asks):
    return [reply for batch in teacher.generate(ListedAsks(asks)) for reply in batch]


class EngineSaying:
    """An engine whose model says `text`; keeps the requests and settings it got."""

    def __init__(self, monkeypatch, text, end="stop"):
        import teacher.engine

        self.requests = []

        def make(model, stop_ids, batch_size, max_len, **drafting):
            self.stop_ids, self.batch_size, self.max_len = stop_ids, batch_size, max_len
            return SimpleNamespace(add=self.requests.append, step=self.step, runs_in="torch")

        self.text, self.end, self.ended = text, end, 0
        monkeypatch.setattr(teacher.engine, "Engine", make)

    def step(self):
        from teacher.engine import Completion
        from teacher.requests import Update
        from tests.tiny import tokenizer

        ids = tokenizer()(self.text, add_special_tokens=False)["input_ids"]
        new, self.ended = self.requests[self.ended :], len(self.requests)
        done = [Completion(r.id, ids, self.end, 257, len(r.prompt_ids), 0.5) for r in reversed(new)]
        return [Update(completion.id, ids, completion=completion) for completion in done]


def test_the_id_is_the_content_of_weights_configuration_and_tokenizer(folder, tmp_path):
    first = teacher_id(str(folder))
    name, _, digest = first.partition("@")
    assert name == "tiny" and len(digest) == 12
    copy = shutil.copytree(folder, tmp_path / "tiny")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (copy / "training_log.jsonl").write_text("{}")
    assert teacher_id(str(copy)) == first
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = copy / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        assert teacher_id(str(copy)) != first, name
        path.write_bytes(before)
    assert teacher_id(str(copy)) == first == load(folder).id


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x", "mit"),
        ("# no header", None),
        ("---\ntags: [a]\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_model_card_declares(folder, tmp_path, card, licence):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    if card is not None:
        (copy / "README.md").write_text(card)
    assert teacher_licence(str(copy)) == licence


def test_a_model_card_with_a_broken_header_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    (copy / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(UserError, match=r"tiny/README\.md: the header is not valid YAML"):
        teacher_licence(str(copy))


def test_the_prompt_is_rendered_once_with_the_chat_template(folder, monkeypatch):
    engine = EngineSaying(monkeypatch, "x")
    teacher = load(folder)
    [reply] = replies(teacher, [ask("What is 2 + 2?")])
    [request] = engine.requests
    assert teacher.chat.tokenizer.decode(request.prompt_ids) == f"{BOS}{USER}What is 2 + 2?{ASSISTANT}<think>\n"
    assert list(request.prompt_ids).count(teacher.chat.tokenizer.bos_token_id) == 1
    assert reply.prompt_tokens == len(request.prompt_ids)
    assert (request.temperature, request.top_p, request.max_tokens, request.seed) == (0.6, 0.95, 50, 1)
    assert engine.stop_ids == (teacher.chat.tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("abc\n</think>\n\n\\boxed{4}", 5, 11),  # the tag is one token, everything else a byte a token
        ("never closed", 12, 0),
        ("ab</think>cd</think>e", 3, 4),
        ("a<think>b</think>c</think>de", 6, 2),
        ("é😀</think>ü", 7, 2),
        ("a leak<｜User｜></think>b", 8, 1),
    ],
)
def test_tokens_are_counted_on_both_sides_of_the_closing_tag(folder, monkeypatch, text, reasoning, answer):
    EngineSaying(monkeypatch, text)
    [reply] = replies(load(folder), [ask()])
    assert (reply.text, reply.reasoning_tokens, reply.answer_tokens) == (text, reasoning, answer)


@pytest.mark.parametrize(
    ("text", "end", "told"),
    [("", "stop", "empty"), (" \n", "stop", "empty"), ("", "length", "length"), ("x", "stop", "stop")],
)
def test_an_empty_reply_is_called_that(folder, monkeypatch, text, end, told):
    EngineSaying(monkeypatch, text, end)
    [reply] = replies(load(folder), [ask()])
    assert (reply.text, reply.finish_reason) == (text, told)


def test_thinking_is_forced_or_left_as_the_recipe_says(folder, monkeypatch, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    path = next(p for p in (copy / "chat_template.jinja", copy / "tokenizer_config.json") if p.is_file())
    given = path.read_text()
    path.write_text(re.sub(r"<think>(\n|\\+n)", "", given))
    assert path.read_text() != given
    ends = {}
    for think in ("auto", "force", "leave"):
        engine = EngineSaying(monkeypatch, "x")
        teacher = load(copy, think=think)
        replies(teacher, [ask()])
        ends[think] = teacher.chat.decode(engine.requests[0].prompt_ids).rpartition(ASSISTANT)[2]
    assert ends == {"auto": "<think>\n", "force": "<think>\n", "leave": ""}


def test_the_id_names_what_makes_the_same_model_write_something_else(folder):
    def of(**settings):
        return identity(Teacher(model=str(folder), **settings))["id"]

    usual = teacher_id(str(folder))
    assert of() == of(think="auto") == of(think="force") == of(dtype="float32") == of(batch_size=3) == usual
    assert of(think="leave") == load(folder, think="leave").id == f"{usual}+think=leave"
    assert of(think="leave", dtype="bfloat16") == f"{usual}+think=leave+dtype=bfloat16"
    assert of(experts="fp8") == f"{usual}+experts=fp8" and of(weights="fp8") == f"{usual}+weights=fp8"


def test_a_tag_spelled_in_several_tokens_is_counted_too(folder):
    teacher = load(folder)
    ids = [teacher.chat.tokenizer.convert_tokens_to_ids(character) for character in "ab</think>cd"]
    text = teacher.chat.tokenizer.decode(ids)
    assert text == "ab</think>cd" and teacher.chat.reasoning_tokens(text, ids) == 10


def test_a_prompt_that_fills_the_context_is_an_outcome_and_the_rest_goes_on(folder, monkeypatch):
    engine = EngineSaying(monkeypatch, "x")
    context = 512
    empty = len(load(folder).chat.ids(ask("").messages))
    asks = [ask("y" * (context - empty + n), f"{n}", max_tokens=50) for n in (-100, -10, -1, 0, 5)]
    found = {reply.id: reply for reply in replies(load(folder), asks)}
    assert {n: reply.finish_reason for n, reply in found.items()} == {
        "-100": "stop", "-10": "stop", "-1": "stop", "0": "prompt_too_long", "5": "prompt_too_long",
    }  # fmt: skip
    assert found["5"].prompt_tokens == context + 5 and found["5"].text == ""
    assert {request.id: request.max_tokens for request in engine.requests} == {"-100": 50, "-10": 10, "-1": 1}
    assert (engine.max_len, engine.batch_size) == (context, 3)
    asked = len(engine.requests)
    assert [reply.finish_reason for reply in replies(load(folder), asks[3:])] == ["prompt_too_long"] * 2
    assert len(engine.requests) == asked


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json; expected a model folder"),
        ("tokenizer.json", "no tokenizer.json; the teacher's folder needs its tokenizer"),
        ("model.safetensors", "no model.safetensors"),
    ],
)
def test_a_folder_that_lacks_something_is_one_sentence(folder, tmp_path, missing, message):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    (copy / missing).unlink()
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_a_teacher_that_is_not_there():
    with pytest.raises(UserError, match=r"teacher\.model: 'nowhere' is neither a folder nor a shipped model"):
        teacher_id("nowhere")


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    copy = write_teacher(tmp_path / "small", vocab_size=200, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with pytest.raises(
        UserError, match="the tokenizer has 263 tokens, the model only 200; they do not belong together"
    ):
        load(copy)


def test_a_tokenizer_that_is_no_tokenizer(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"teacher\.model: the tokenizer of .* does not load"):
        load(copy)


def test_the_whole_stage_with_a_real_engine_and_its_resume(folder, tmp_path):
    """A random teacher writes noise until its limit; what matters is that it comes back, once, with the same text."""
    recipe = make_recipe(teacher={"model": str(folder), "batch_size": 5}, sampling={"max_tokens": 12})
    path = tmp_path / "run" / "traces" / "traces.jsonl"

    def generate():
        with open_run(tmp_path / "run", recipe) as run:
            return traces.run(recipe, run), [json.loads(line) for line in path.read_bytes().split(b"\n") if line]

    with open_run(tmp_path / "run", recipe) as run:
        problems.run(recipe, run)
    facts, rows = generate()
    assert facts["traces"] == facts["made"] == 24 == len({row["id"] for row in rows})
    assert facts["runs_in"] in ("C", "torch")
    assert len({row["text"] for row in rows}) > 20
    for row in rows:
        tokens = row["reasoning_tokens"] + row["answer_tokens"]
        assert tokens <= 12 and (row["finish_reason"] == "length") == (tokens == 12)
        assert row["teacher"] == teacher_id(str(folder)) and row["seconds"] > 0
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:10]) + b"\n")
    facts, again = generate()
    assert (facts["made"], facts["resumed"]) == (14, 10)
    assert {row["id"]: row["text"] for row in again} == {row["id"]: row["text"] for row in rows}


def test_the_likeliest_tokens_come_with_the_reply_and_lie_beside_the_traces(folder, tmp_path):
    from distill.generation.logprobs import LogprobsReader

    teacher = load(folder, batch_size=2)
    [greedy] = replies(teacher, [ask(temperature=0.0, max_tokens=9, logprobs=3)])
    top = greedy.logprobs
    assert [row[0] for row in top.tokens] == list(top.chosen), "greedily the likeliest is drawn"
    assert all(len(row) == 3 and row == sorted(row, reverse=True) for row in top.logprobs)
    assert len(top.chosen) == greedy.reasoning_tokens + greedy.answer_tokens
    assert replies(teacher, [ask()])[0].logprobs is None
    recipe = make_recipe(teacher={"model": str(folder)}, sampling={"max_tokens": 9, "logprobs": 2})
    with open_run(tmp_path / "run", recipe) as run:
        problems.run(recipe, run)
        traces.run(recipe, run)
    with LogprobsReader(tmp_path / "run") as reader:
        assert len(reader) == 24
        for line in (tmp_path / "run" / "traces" / "traces.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert row["sampling"]["logprobs"] == 2
            assert reader.read(row["id"]).tokens_TK.shape == (row["reasoning_tokens"] + row["answer_tokens"], 2)


def test_a_prompt_longer_than_all_before_it_is_answered_like_in_a_batch_of_its_own(folder):
    """The cache is laid out for the first asks; what comes later may fill the context."""
    short = [ask(f"{n}", f"s{n}", max_tokens=6, seed=n) for n in range(6)]
    long = [ask("y" * 400 + str(n), f"l{n}", max_tokens=60, seed=n) for n in range(3)]
    together = {reply.id: reply.text for reply in replies(load(folder, batch_size=3), [*short, *long])}
    alone = {reply.id: reply.text for reply in replies(load(folder), long)}
    assert len(together) == 9 and alone.items() <= together.items()
