"""The server with the real ``openai`` client: the guide's request, and every field of sampling."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving import (
    IMAGES,
    chat,
    data_uri,
    file_server,
    post,
)

from qwenvl_mlx.engine import Engine

SEVERAL = 4


def test_the_guides_request_works_verbatim(server_url: str) -> None:
    with file_server(IMAGES) as pictures:
        body = {
            "model": "Qwen-VL-Chat-7B",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "这是哪里？"},
                        {"type": "image", "image": f"{pictures}/photo_333x217.jpg"},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "这是在海滩上，一个年轻女人和她的狗在沙滩上"}],
                },
                {"role": "user", "content": [{"type": "text", "text": "是什么品种的狗？"}]},
            ],
            "functions": [],
            "stop": [],
            "top_p": 0.9,
            "temperature": 0.7,
            "stream": False,
        }
        status, reply = post(f"{server_url}/v1/chat/completions", {**body, "max_tokens": 5})
        assert status == 200, reply
        assert reply["object"] == "chat.completion"
        assert reply["model"] == "Qwen-VL-Chat-7B"
        message = reply["choices"][0]["message"]
        assert message["role"] == "assistant"
        assert message["function_call"] is None
        assert reply["usage"]["prompt_tokens"] > 60  # the picture counts


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_an_answer_has_all_of_openais_parts(client: OpenAI) -> None:
    reply = chat(client)
    assert reply.id.startswith("chatcmpl-")
    assert reply.object == "chat.completion"
    assert abs(reply.created - time.time()) < 60
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply.system_fingerprint


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_limits_on_the_answer(client: OpenAI, field: str) -> None:
    values: dict[str, Any] = {"max_tokens": openai.NOT_GIVEN, field: 3}
    assert chat(client, **values).usage.completion_tokens == 3


def test_max_length_counts_the_prompt(client: OpenAI) -> None:
    prompt = chat(client).usage.prompt_tokens
    reply = chat(client, max_tokens=openai.NOT_GIVEN, extra_body={"max_length": prompt + 4})
    assert reply.usage.completion_tokens == 4


def test_a_stream_adds_up_to_the_whole_answer(client: OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_what_is_so_anyway_may_be_asked_for(client: OpenAI) -> None:
    hints = {"safety_identifier": "me", "prompt_cache_key": "mine", "user": "me", "service_tier": "auto"}
    options = {"include_obfuscation": False}
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options=options, **hints))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_a_stream_tells_usage_only_when_asked(client: OpenAI) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in chat(client, stream=True))


def test_stop_ends_before_the_text(client: OpenAI) -> None:
    whole = chat(client, max_tokens=30).choices[0].message.content
    stop = whole[3:5]
    cut = chat(client, max_tokens=30, stop=[stop, "never"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert chat(client, max_tokens=30, stop=stop).choices[0].message.content == whole[: whole.index(stop)]


def test_seed_repeats_and_n_differs(client: OpenAI) -> None:
    def contents(**fields: Any) -> list[str]:
        reply = chat(client, temperature=1.5, extra_body={"top_k": 0}, top_p=1.0, **fields)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.message.content for choice in reply.choices]

    assert contents(seed=7) == contents(seed=7)
    assert contents(seed=7) != contents(seed=8)
    several = contents(seed=7, n=SEVERAL)
    assert len(set(several)) == SEVERAL
    assert several[0] == contents(seed=7)[0]


def test_streamed_choices_keep_their_index(client: OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "seed": 7, "n": 3, "top_p": 1.0}
    texts = {0: "", 1: "", 2: ""}
    for chunk in chat(client, stream=True, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in chat(client, **fields).choices]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"top_p": 1e-6},
        {"extra_body": {"top_k": 1}},
        {"extra_body": {"min_p": 1.0, "top_k": 0}},
    ],
    ids=["temperature", "top_p", "top_k", "min_p"],
)
def test_what_narrows_sampling_makes_it_greedy(client: OpenAI, sampling: dict[str, Any]) -> None:
    wide = {"temperature": 2.0, "top_p": 1.0, "extra_body": {"top_k": 0}}
    greedy = chat(client, temperature=0).choices[0].message.content
    assert chat(client, seed=3, **wide).choices[0].message.content != greedy
    assert chat(client, seed=3, **{**wide, **sampling}).choices[0].message.content == greedy


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 1.8}}],
    ids=lambda value: next(iter(value)),
)
def test_penalties_change_a_greedy_answer(client: OpenAI, penalty: dict[str, Any]) -> None:
    plain = chat(client, max_tokens=40).choices[0].message.content
    assert chat(client, max_tokens=40, **penalty).choices[0].message.content != plain


def test_logit_bias_forces_a_token(client: OpenAI) -> None:
    assert chat(client, logit_bias={str(ord("x")): 100}, max_tokens=4).choices[0].message.content == "xxxx"


def test_logprobs_tell_the_alternatives(client: OpenAI) -> None:
    reply = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 6
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert entries[0].logprob == pytest.approx(entries[0].top_logprobs[0].logprob)  # greedy
    assert chat(client).choices[0].logprobs is None
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, max_tokens=6, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert streamed[0].top_logprobs == []


def test_ignore_eos_goes_on(client: OpenAI, tiny_engine: Engine) -> None:
    end = str(tiny_engine.processor.tokenizer.id("<|im_end|>"))
    ended = chat(client, logit_bias={end: 100}, ignore_eos=False)
    assert ended.usage.completion_tokens == 1
    assert ended.choices[0].finish_reason == "stop"
    assert chat(client, logit_bias={end: 100}).usage.completion_tokens == 12


def test_a_second_question_about_a_picture_is_partly_cached(client: OpenAI) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_uri("rgb_97x61.png")}}
    first = [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]
    chat(client, messages=first)
    again = chat(client, messages=first)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_completions_take_texts_and_tokens(client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 6,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    text = client.completions.create(prompt="Hello", **fields)
    tokens = client.completions.create(prompt=list(b"Hello"), **fields)
    assert text.choices[0].text == tokens.choices[0].text
    assert text.usage.completion_tokens == 6
    assert text.id.startswith("cmpl-")
    both = client.completions.create(prompt=["Hello", "Other"], n=2, **fields)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == text.choices[0].text
    echoed = client.completions.create(prompt="Hello", echo=True, **fields)
    assert echoed.choices[0].text == "Hello" + text.choices[0].text
    streamed = client.completions.create(prompt="Hello", stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(prompt="Hello", logprobs=2, echo=True, **fields)
    logprobs = client.completions.create(prompt="Hello", logprobs=2, **fields).choices[0].logprobs
    assert len(logprobs.token_logprobs) == 6
    assert all(len(top) >= 1 for top in logprobs.top_logprobs)
