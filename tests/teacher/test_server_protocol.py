"""What a body may hold: each mistake is named by its field, and nothing that would change the answer is ignored."""

import json

import pytest

from teacher.server.errors import ApiError
from teacher.server.generate import Defaults, read_defaults, sample_seed
from teacher.server.protocol import ONLY_AT, ChatBody, CompletionBody, parse

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}


@pytest.mark.parametrize(
    ("kind", "body", "param", "says"),
    [
        (ChatBody, {}, "messages", "required"),
        (ChatBody, {"messages": []}, "messages", "at least 1"),
        (ChatBody, {"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        (
            ChatBody,
            {"messages": [CHAT["messages"][0], {"role": "user", "content": 3}]},
            "messages[1].content",
            "string",
        ),
        (ChatBody, CHAT | {"temperature": -1}, "temperature", "greater than or equal to 0"),
        (ChatBody, CHAT | {"temperature": "1"}, "temperature", "number"),
        (ChatBody, CHAT | {"temperature": float("inf")}, "temperature", "finite"),
        (ChatBody, CHAT | {"top_p": 0}, "top_p", "greater than 0"),
        (ChatBody, CHAT | {"top_k": 2**40}, "top_k", "less than"),
        (ChatBody, CHAT | {"n": 129}, "n", "less than or equal to 128"),
        (ChatBody, CHAT | {"n": True}, "n", "integer"),
        (ChatBody, CHAT | {"seed": 2**63}, "seed", "less than"),
        (ChatBody, CHAT | {"stop": ""}, "stop", "at least 1 character"),
        (ChatBody, CHAT | {"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        (ChatBody, CHAT | {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (ChatBody, CHAT | {"top_logprobs": 3}, "top_logprobs", "logprobs is not true"),
        (ChatBody, CHAT | {"stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
        (ChatBody, CHAT | {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "not permitted"),
        (ChatBody, CHAT | {"temprature": 1}, "temprature", "did you mean temperature"),
        (ChatBody, CHAT | {"prompt": "x"}, "prompt", "unknown field"),
        (CompletionBody, {"prompt": 3}, "prompt", "string"),
        (CompletionBody, {"prompt": ["a", 3]}, "prompt[1]", "string"),
        (CompletionBody, {"prompt": [1, -3]}, "prompt[1]", "greater than or equal to 0"),
        (CompletionBody, {"prompt": [[1], ["a"]]}, "prompt[1][0]", "integer"),
        (CompletionBody, TEXT | {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        (CompletionBody, TEXT | {"max_tokens": 0}, "max_tokens", "unless echo"),
        (CompletionBody, TEXT | {"echo": True, "stream": True, "logprobs": 1}, "stream", "echo with logprobs"),
    ],
)
def test_a_mistake_is_named(kind, body, param, says):
    with pytest.raises(ApiError) as caught:
        parse(kind, body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert says in caught.value.message


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 1}},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"best_of": 2},
        {"min_tokens": 3},
        {"min_tokens": False},
        {"skip_special_tokens": True},
        {"reasoning_effort": "high"},
        {"chat_template": "x"},
    ],
)
def test_what_is_not_served_is_refused_by_name(field):
    with pytest.raises(ApiError) as caught:
        parse(ChatBody, CHAT | field)
    (name,) = field
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")


def test_what_asks_for_nothing_is_accepted():
    nothing = {name: values[0] for name, values in ONLY_AT.items() if values} | {"audio": None, "stop": None, "n": None}
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "frequency_penalty": 0.0}
    assert parse(ChatBody, CHAT | nothing | harmless) == parse(ChatBody, CHAT)
    assert parse(CompletionBody, TEXT | harmless) == parse(CompletionBody, TEXT)


def test_a_turn_may_carry_what_a_client_got():
    turn = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "reasoning_content": "y"}
    assert parse(ChatBody, {"messages": [turn]}).messages[0].content == "x"


def test_sampling_defaults_are_the_models(tmp_path):
    assert read_defaults(tmp_path) == Defaults(1.0, 1.0, 0, 0.0)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": None}))
    assert read_defaults(tmp_path) == Defaults(0.6, 0.95, 0, 0.0)
    for wrong, says in (({"repetition_penalty": 1.2}, "repetition_penalty is 1.2"), ({"top_p": "a"}, "top_p is 'a'")):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=says):
            read_defaults(tmp_path)


def test_seeds_of_samples_are_far_apart_and_int64():
    seeds = {sample_seed(seed, sample) for seed in (0, 1, 2, -1, 2**63 - 1, -(2**63)) for sample in range(128)}
    assert len(seeds) == 6 * 128
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert sample_seed(-5, 0) == -5
