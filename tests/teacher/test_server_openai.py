"""OpenAI's own client against the server on loopback: what comes is what the engine alone makes of the same request."""

import asyncio
import math

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from teacher.requests import Request
from teacher.server.generate import sample_seed
from tests.teacher import serving

QUESTION = "how many of them are there?"
SAY = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def server():
    with serving.serve(serving.random_engine(), serving.served(parser="none")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def engine_says(content=QUESTION, **settings):
    fields = {"temperature": 1.0, "top_p": 1.0, "stop_ids": (257,), "text": True} | settings
    return serving.expected(Request("alone", serving.prompt_ids(content), **fields))[0]


def gather(stream):
    """Texts, finish reasons and usage of a stream of chat chunks, by choice."""
    texts, ends, usage = {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return texts, ends, usage


def test_models(client):
    assert [model.id for model in client.models.list()] == [serving.NAME, "alias"]
    assert {model.root for model in client.models.list()} == {serving.NAME}
    assert client.models.retrieve("alias").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here; this server has tiny-random, alias"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 11}])
def test_a_chat_reply_is_the_engines(client, settings):
    alone = engine_says(max_tokens=40, **settings)
    reply = client.chat.completions.create(model="alias", messages=SAY, max_tokens=40, **settings)
    (choice,) = reply.choices
    assert (reply.model, choice.message.role) == (serving.NAME, "assistant")
    assert (choice.message.content, choice.finish_reason) == (alone.text, alone.finish_reason)
    prompt = len(serving.prompt_ids(QUESTION))
    generated = len(alone.token_ids) + (alone.stop_id is not None)
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, generated, prompt + generated)


def test_settings_that_openai_has_not(client):
    extra = {"top_k": 5, "min_p": 0.05, "ignore_eos": True}
    alone = engine_says(max_tokens=60, seed=2, top_k=5, min_p=0.05, stop_ids=())
    reply = client.chat.completions.create(
        model=serving.NAME, messages=SAY, max_completion_tokens=60, seed=2, extra_body=extra
    )
    assert reply.choices[0].message.content == alone.text
    assert reply.choices[0].finish_reason == "length"


def test_n_samples_streamed_and_whole_are_the_same(client):
    call = {"model": serving.NAME, "messages": SAY, "n": 3, "seed": 4, "max_tokens": 30}
    alone = [engine_says(seed=sample_seed(4, n), max_tokens=30) for n in range(3)]
    reply = client.chat.completions.create(**call)
    assert [choice.message.content for choice in reply.choices] == [c.text for c in alone]
    assert len({c.text for c in alone}) == 3

    stream = client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True})
    texts, ends, usage = gather(stream)
    assert [texts[n] for n in range(3)] == [c.text for c in alone]
    assert [ends[n] for n in range(3)] == [c.finish_reason for c in alone]
    assert usage.completion_tokens == reply.usage.completion_tokens
    # The whole pages of the prompt were still in the cache.
    assert usage.prompt_tokens_details.cached_tokens > 0


def test_without_a_seed_samples_differ(client):
    call = {"model": serving.NAME, "messages": SAY, "max_tokens": 30}
    assert len({client.chat.completions.create(**call).choices[0].message.content for _ in range(3)}) == 3


def test_stop_strings_and_ids(client):
    alone = engine_says(temperature=0, max_tokens=40)
    stop = alone.text[5:8]
    call = {"model": serving.NAME, "messages": SAY, "temperature": 0, "max_tokens": 40}
    for extra in ({"stop": stop}, {"stop": ["not in it at all", stop]}):
        (choice,) = client.chat.completions.create(**call, **extra).choices
        assert choice.message.content == alone.text[: alone.text.index(stop)]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
        texts, ends, _ = gather(client.chat.completions.create(**call, **extra, stream=True))
        assert (texts, ends) == ({0: choice.message.content}, {0: "stop"})
    token = alone.token_ids[3]
    (choice,) = client.chat.completions.create(**call, extra_body={"stop_token_ids": [token]}).choices
    first = alone.token_ids.index(token)
    assert choice.message.content == serving.tokenizer().decode(alone.token_ids[:first])
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)


def test_chat_logprobs_are_the_models(client):
    call = {"model": serving.NAME, "messages": SAY, "max_tokens": 12, "seed": 1, "logprobs": True, "top_logprobs": 4}
    (choice,) = client.chat.completions.create(**call).choices
    alone = engine_says(seed=1, max_tokens=12)
    prompt = serving.prompt_ids(QUESTION)
    true_PV = serving.log_probs(serving.random_model(), prompt + alone.token_ids)[len(prompt) - 1 :]
    found = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in found).decode(errors="replace") == choice.message.content
    for entry, token, row_V in zip(found, alone.token_ids, true_PV, strict=True):
        assert entry.logprob == pytest.approx(float(row_V[token]), abs=1e-4)
        best = row_V.topk(4).values.tolist()
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(best, abs=1e-4)
    streamed = [
        entry
        for chunk in client.chat.completions.create(**call, stream=True)
        for each in chunk.choices
        if each.logprobs
        for entry in each.logprobs.content
    ]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in found], abs=1e-4)


def test_completions_of_text_ids_and_batches(client):
    ids = serving.tokenizer()("one two", add_special_tokens=False)["input_ids"]
    alone = serving.expected(Request("a", ids, 0.0, max_tokens=20, stop_ids=(257,), text=True))[0]
    call = {"model": serving.NAME, "temperature": 0, "max_tokens": 20}
    for prompt in ("one two", ids, ["one two"], [ids]):
        (choice,) = client.completions.create(prompt=prompt, **call).choices
        assert (choice.text, choice.finish_reason) == (alone.text, alone.finish_reason)
    reply = client.completions.create(prompt=["one two", "three", "one two"], n=2, **call)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert {reply.choices[n].text for n in (0, 1, 4, 5)} == {alone.text}
    assert reply.choices[2].text == reply.choices[3].text != alone.text
    assert reply.usage.prompt_tokens == 2 * len(ids) + len("three")
    parts = [chunk.choices[0].text for chunk in client.completions.create(prompt=ids, echo=True, stream=True, **call)]
    assert "".join(parts) == "one two" + alone.text
    # OpenAI's default of max_tokens; greedily, for a draw may end it before.
    assert client.completions.create(prompt="x", model=serving.NAME, temperature=0).usage.completion_tokens == 16


@pytest.mark.parametrize("prompts", [["—é one two"], ["a", "a longer one", "b" * 200]])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_gives_the_prompts_log_probabilities(client, prompts, max_tokens):
    reply = client.completions.create(
        model=serving.NAME, prompt=prompts, max_tokens=max_tokens, temperature=0, echo=True, logprobs=3
    )
    for prompt, choice in zip(prompts, reply.choices, strict=True):
        ids = serving.tokenizer()(prompt, add_special_tokens=False)["input_ids"]
        given = len(ids)
        if max_tokens:
            ids = ids + serving.expected(Request("a", ids, 0.0, max_tokens=max_tokens, stop_ids=()))[0].token_ids
        true_TV = serving.log_probs(serving.random_model(), ids)
        found = choice.logprobs
        assert choice.text == serving.tokenizer().decode(ids)
        assert len(found.tokens) == len(found.text_offset) == len(ids)
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        for place, row_V in enumerate(true_TV, start=1):
            assert found.token_logprobs[place] == pytest.approx(float(row_V[ids[place]]), abs=1e-4)
            assert max(found.top_logprobs[place].values()) == pytest.approx(float(row_V.max()), abs=1e-4)
            assert len(found.top_logprobs[place]) in (3, 4)
        for token, offset in zip(found.tokens[:given], found.text_offset, strict=False):
            assert token.startswith("bytes:") or choice.text[offset : offset + len(token)] == token


def test_echo_counts_a_stop_token_too(client):
    """lm-eval cuts one token off at the end: without the stop token it would cut off the prompt's last."""
    ids = serving.tokenizer()("one two", add_special_tokens=False)["input_ids"]
    first = serving.expected(Request("a", ids, 0.0, max_tokens=1, stop_ids=()))[0].token_ids[0]
    reply = client.completions.create(
        model=serving.NAME, prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=1,
        extra_body={"stop_token_ids": [first]},
    )  # fmt: skip
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == ("one two", "stop")
    assert len(choice.logprobs.token_logprobs) == len(ids) + 1
    assert reply.usage.completion_tokens == 1


def test_completion_logprobs_of_what_is_generated(client):
    call = {"model": serving.NAME, "prompt": "one", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    (choice,) = client.completions.create(**call).choices
    ids = serving.tokenizer()("one", add_special_tokens=False)["input_ids"]
    alone = serving.expected(Request("a", ids, 0.0, max_tokens=8, stop_ids=()))[0].token_ids
    best_T = serving.log_probs(serving.random_model(), ids + alone)[len(ids) - 1 :].max(-1).values.tolist()
    assert choice.logprobs.token_logprobs == pytest.approx(best_T, abs=1e-4)
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**call, stream=True)]
    streamed = [value for part in parts if part for value in part.token_logprobs]
    offsets = [value for part in parts if part for value in part.text_offset]
    assert streamed == pytest.approx(best_T, abs=1e-4)
    assert offsets == choice.logprobs.text_offset


def test_a_wrong_model_and_wrong_settings(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=SAY)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    too_long = "x" * 600
    for wrong, param, code in [
        ({"temperature": -1}, "temperature", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logit_bias": {"3": 1}}, "logit_bias", "unsupported_parameter"),
        ({"max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": 600}, "max_completion_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": too_long}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", None),
        ({"extra_body": {"stop_token_ids": [263]}}, "stop_token_ids", None),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**({"model": serving.NAME, "messages": SAY} | wrong))
        assert (caught.value.param, caught.value.code) == (param, code), caught.value
    for prompt in ("", [], [""], [300], [[]]):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=serving.NAME, prompt=prompt)
        assert caught.value.param == "prompt"


def test_text_parts_are_joined(client):
    parts = [{"type": "text", "text": "how "}, {"type": "text", "text": "many?"}]
    call = {"model": serving.NAME, "temperature": 0, "max_tokens": 10}
    whole, joined = (
        client.chat.completions.create(messages=[{"role": "user", "content": content}], **call).choices[0].message
        for content in ("how many?", parts)
    )
    assert whole.content == joined.content


def test_tokenize(server):
    reply = httpx2.post(f"{server.url}/tokenize", json={"messages": SAY}).json()
    ids = serving.prompt_ids(QUESTION)
    assert reply == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    assert httpx2.post(f"{server.url}/tokenize", json={"prompt": "ab"}).json()["count"] == 2
    assert httpx2.post(f"{server.url}/tokenize", json={}).status_code == 400


def test_64_streams_at_once_and_half_of_them_hang_up(server):
    """Those that stay get what the engine alone gives; of those that leave nothing goes on."""
    requests = [
        Request(str(n), serving.prompt_ids(f"{n}?"), 0.9, 1.0, max_tokens=60, seed=n, stop_ids=(257,), text=True)
        for n in range(64)
    ]
    alone = serving.expected(*requests)

    async def one(client, n):
        stream = await client.chat.completions.create(
            model=serving.NAME, messages=[{"role": "user", "content": f"{n}?"}], temperature=0.9, top_p=1, seed=n,
            max_tokens=400 if n % 2 else 60, stream=True, extra_body={"ignore_eos": bool(n % 2)},
        )  # fmt: skip
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if n % 2 and len(text) > 5:
                await stream.close()
                return None
        return text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, n) for n in range(64)))

    texts = asyncio.run(all_of_them())
    assert [texts[n] for n in range(0, 64, 2)] == [alone[n].text for n in range(0, 64, 2)]
    assert [texts[n] for n in range(1, 64, 2)] == [None] * 32
    wait_until_idle(server)
    assert counted(server, "distill:request_success_total", finished_reason="abort") == 32


def wait_until_idle(server, seconds=10):
    async def wait():
        for _ in range(int(seconds / 0.02)):
            if not server.worker._live and counted(server, "distill:num_requests_running") == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("requests go on though their clients are gone")

    asyncio.run(wait())


def counted(server, name, **labels):
    page = httpx2.get(f"{server.url}/metrics").text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    raise AssertionError(f"{name} {labels} is not on the page")


def test_metrics_count_what_was_done(server, client):
    def page():
        names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total",
                 "time_to_first_token_seconds_count", "e2e_request_latency_seconds_count")  # fmt: skip
        labels = {"request_success_total": {"finished_reason": "length"}}
        return {name: counted(server, f"distill:{name}", **labels.get(name, {})) for name in names}

    call = {"model": serving.NAME, "messages": SAY, "max_tokens": 7, "extra_body": {"ignore_eos": True}}
    client.chat.completions.create(**call)
    before = page()
    client.chat.completions.create(**call)
    gather(client.chat.completions.create(**call, stream=True))
    wait_until_idle(server)
    after = page()
    prompt = len(serving.prompt_ids(QUESTION))
    assert {name: after[name] - before[name] for name in before} == {
        "prompt_tokens_total": 2 * prompt,
        "generation_tokens_total": 14,
        "request_success_total": 2,
        "time_to_first_token_seconds_count": 1,  # the stream's
        "e2e_request_latency_seconds_count": 2,
    }
    assert 0 <= counted(server, "distill:kv_cache_usage_perc") <= 1
    for name in ("num_requests_waiting", "num_preemptions_total", "spec_decode_num_draft_tokens_total",
                 "spec_decode_num_accepted_tokens_total", "prefix_cache_hits_total"):  # fmt: skip
        assert math.isfinite(counted(server, f"distill:{name}"))
