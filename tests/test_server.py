"""The server with the real ``openai`` client: every field does what it says, or is refused by name."""

from __future__ import annotations

import base64
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers import DATA, reference
from openai import OpenAI
from serving import EchoEngine, chat_checkpoint, echo_shelf, file_server, processor_of, serving

from qwenvl_mlx.api import load
from qwenvl_mlx.engine import Engine, EngineOptions
from qwenvl_mlx.server.settings import Limits, Settings
from qwenvl_mlx.server.shelf import Offer, Shelf

IMAGES = DATA / "images"
SEVERAL = 4
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    model, processor = load(checkpoint, dtype="float32")
    with Engine(model, processor, EngineOptions(prefill_chunk=64)) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    shelf = Shelf([Offer("tiny", "unused")], lambda source: engine, any_name=True)
    shelf.preload()
    with serving(shelf, Settings(allow_private_urls=True)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def echo(checkpoint: Path) -> EchoEngine:
    return EchoEngine(processor_of(checkpoint))


@pytest.fixture(scope="module")
def echo_url(echo: EchoEngine) -> Iterator[str]:
    with serving(echo_shelf(echo), Settings(keep_alive_seconds=0.2, allow_private_urls=True)) as url:
        yield url


@pytest.fixture(scope="module")
def told(echo_url: str) -> OpenAI:
    """A client of the engine that says what it is told."""
    return OpenAI(base_url=f"{echo_url}/v1", api_key="none", max_retries=0)


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(client: OpenAI, text: str = "Hello", *, ignore_eos: bool = True, **fields: Any) -> Any:
    """Greedy and 12 tokens long, unless the fields say otherwise."""
    values = {"model": "tiny", "messages": ask(text), "max_tokens": 12, "temperature": 0, **fields}
    values["extra_body"] = {"ignore_eos": ignore_eos, **fields.get("extra_body", {})}
    return client.chat.completions.create(**values)


def data_uri(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "it did not happen in time"
        time.sleep(0.01)


def post(url: str, body: Any, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# -- the guide's request ------------------------------------------------------------------------------------------


def test_the_guides_request_works_verbatim(url: str) -> None:
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
        status, reply = post(f"{url}/v1/chat/completions", {**body, "max_tokens": 5})
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


# -- fields of sampling, on the real engine ------------------------------------------------------------------------


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


def test_ignore_eos_goes_on(client: OpenAI, engine: Engine) -> None:
    end = str(engine.processor.tokenizer.id("<|im_end|>"))
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


# -- pictures and videos --------------------------------------------------------------------------------------------


def prompt_tokens(client: OpenAI, *parts: dict[str, Any], **fields: Any) -> int:
    content = [*parts, {"type": "text", "text": "?"}]
    tokens = chat(
        client, messages=[{"role": "user", "content": content}], max_tokens=1, **fields
    ).usage.prompt_tokens
    return int(tokens)


def test_all_forms_of_a_picture_are_one(client: OpenAI) -> None:
    uri = data_uri("photo_333x217.jpg")
    with file_server(IMAGES) as pictures:
        forms: list[dict[str, Any]] = [
            {"type": "image", "image": uri},
            {"type": "image_url", "image_url": uri},
            {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
            {"type": "image_url", "image_url": {"url": f"{pictures}/photo_333x217.jpg"}},
        ]
        counts = {prompt_tokens(client, form) for form in forms}
    assert len(counts) == 1
    assert counts.pop() > prompt_tokens(client) + 50


def test_low_detail_and_pixel_limits_make_pictures_smaller(client: OpenAI) -> None:
    def picture(**more: Any) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": data_uri("big_1600x1200.jpg"), **more}}

    large = {"extra_body": {"max_pixels": 600_000}}
    whole = prompt_tokens(client, picture(), **large)
    assert prompt_tokens(client, picture(detail="low"), **large) < whole
    assert prompt_tokens(client, picture(), extra_body={"max_pixels": 100_000}) < whole
    assert prompt_tokens(client, picture(detail="low")) == prompt_tokens(
        client, picture()
    )  # small by default
    small = {"type": "image", "image": data_uri("tiny_5x7.png")}
    larger = prompt_tokens(client, small, extra_body={"min_pixels": 100_000})
    assert larger > prompt_tokens(client, small)
    assert prompt_tokens(client, {**small, "min_pixels": 100_000}) == larger


def test_several_pictures_over_several_turns(client: OpenAI) -> None:
    picture = {"type": "image", "image": data_uri("rgb_97x61.png")}
    one = prompt_tokens(client, picture)
    turns = [
        {"role": "user", "content": [picture, picture]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [picture, {"type": "text", "text": "?"}]},
    ]
    text = prompt_tokens(client)
    many = chat(client, messages=turns, max_tokens=1).usage.prompt_tokens
    assert many > text + 3 * (one - text)


def test_videos_as_frames_and_as_a_file(client: OpenAI) -> None:
    pytest.importorskip("av", reason="videos need the extra 'video'")
    frame = data_uri("rgb_97x61.png")
    two = prompt_tokens(client, {"type": "video", "video": [frame] * 2})
    six = prompt_tokens(client, {"type": "video", "video": [frame] * 6})
    assert six > two
    clip = base64.b64encode((IMAGES / "clip_96x64_16fps.mp4").read_bytes()).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}}
    few = prompt_tokens(client, part, extra_body={"fps": 2})
    assert prompt_tokens(client, part, extra_body={"fps": 8}) > few


def test_boxes_come_in_source_pixels(told: OpenAI) -> None:
    picture = {"type": "image", "image": data_uri("rgb_97x61.png")}
    text = "say:<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,200),(500,1000)<|box_end|>"
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]
    expected = [{"points": [[9, 12], [48, 61]], "label": "dog", "image": 0}]
    message = chat(told, messages=messages, max_tokens=99).choices[0].message
    assert message.model_extra["boxes"] == expected
    *_, last = chat(told, messages=messages, max_tokens=99, stream=True)
    assert last.choices[0].delta.model_extra["boxes"] == expected


# -- functions ------------------------------------------------------------------------------------------------------


def test_a_call_is_told_apart_from_text(told: OpenAI) -> None:
    choice = chat(told, f"say:Let me see.\n{CALL}", tools=[WEATHER], max_tokens=99).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls[0].function.name == "get_weather"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "巴黎"}
    assert choice.message.tool_calls[0].id


def test_without_tools_a_call_is_text(told: OpenAI) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = chat(told, f"say:{CALL}", max_tokens=99, **fields).choices[0]
        assert choice.message.tool_calls is None
        assert "<tool_call>" in choice.message.content


def test_calls_are_streamed(told: OpenAI) -> None:
    chunks = list(chat(told, f"say:Yes.\n{CALL}\n{CALL}", tools=[WEATHER], stream=True, max_tokens=99))
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"name": "", "arguments": "", "id": ""})
            call["id"] += delta.id or ""
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    assert [call["name"] for call in calls.values()] == ["get_weather"] * 2
    assert json.loads(calls[1]["arguments"]) == {"city": "巴黎"}
    assert calls[0]["id"] != calls[1]["id"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == "Yes."


def test_parallel_calls_can_be_turned_off(told: OpenAI) -> None:
    reply = chat(told, f"say:{CALL}\n{CALL}", tools=[WEATHER], parallel_tool_calls=False, max_tokens=99)
    assert len(reply.choices[0].message.tool_calls) == 1
    assert (
        len(chat(told, f"say:{CALL}\n{CALL}", tools=[WEATHER], max_tokens=99).choices[0].message.tool_calls)
        == 2
    )


def test_an_answer_can_be_sent_back_as_it_came(told: OpenAI) -> None:
    first = chat(told, f"say:{CALL}", tools=[WEATHER], max_tokens=99).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "21 degrees"}
    messages = [*ask("Weather?"), first, result, *ask("say:Thanks")]
    assert chat(told, messages=messages, tools=[WEATHER]).choices[0].message.content == "Thanks"


def test_functions_of_the_older_api(told: OpenAI) -> None:
    functions = [WEATHER["function"]]
    choice = chat(told, f"say:{CALL}", functions=functions, max_tokens=99).choices[0]
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call.name == "get_weather"
    assert choice.message.tool_calls is None
    chunks = list(chat(told, f"say:{CALL}", functions=functions, stream=True, max_tokens=99))
    calls = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert calls[0].name == "get_weather"
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "巴黎"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_call_comes_from_any_model(client: OpenAI, choice: Any) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    bias = {str(ord('"')): 20}  # the random model would never close its strings
    reply = chat(
        client, tools=[WEATHER], tool_choice=choice, ignore_eos=False, logit_bias=bias, max_tokens=200
    ).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert set(json.loads(reply.message.tool_calls[0].function.arguments)) == {"city"}


def test_strict_functions_get_the_arguments_that_they_name(client: OpenAI, engine: Engine) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    bias = {str(engine.processor.tokenizer.id("<tool_call>")): 100, str(ord('"')): 20}
    fields: dict[str, Any] = {"logit_bias": bias, "max_tokens": 200, "parallel_tool_calls": False}
    choice = chat(client, tools=[strict], **fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert set(json.loads(choice.message.tool_calls[0].function.arguments)) == {"city"}
    assert chat(client, tools=[WEATHER], **fields).choices[0].finish_reason == "length"


def test_tool_results_with_pictures_reach_the_model(client: OpenAI) -> None:
    picture = {"type": "image", "image": data_uri("rgb_97x61.png")}

    def tokens(content: Any) -> int:
        call = {
            "id": "c1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "x"}'},
        }
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": content},
        ]
        return int(chat(client, messages=messages, tools=[WEATHER], max_tokens=1).usage.prompt_tokens)

    assert tokens([{"type": "text", "text": "21"}, picture]) > tokens("21") + 5


def test_an_answer_of_the_assistant_is_continued(told: OpenAI, echo: EchoEngine) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, say:two"}]
    assert chat(told, messages=messages).choices[0].message.content == "two"
    text = echo.processor.tokenizer.decode(echo.requests[-1].prompt.input_ids, skip_special=False)
    assert text.endswith("<|im_start|>assistant\nOne, say:two")


# -- the original Qwen-VL ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original() -> Iterator[tuple[OpenAI, EchoEngine]]:
    engine = EchoEngine(processor_of(reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32")))
    with serving(echo_shelf(engine)) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0), engine


REACT = 'say:Thought: I should.\nAction: get_weather\nAction Input: {"city": "Paris"}\nObservation: 99'


def prompt_of(engine: EchoEngine) -> str:
    return engine.processor.tokenizer.decode(engine.requests[-1].prompt.input_ids, skip_special=False)


def test_the_original_calls_functions_in_react(original: tuple[OpenAI, EchoEngine]) -> None:
    client, engine = original
    legacy = chat(client, REACT, functions=[WEATHER["function"]], max_tokens=99).choices[0]
    assert legacy.finish_reason == "function_call"
    assert legacy.message.content == "Thought: I should."
    assert json.loads(legacy.message.function_call.arguments) == {"city": "Paris"}
    assert "You have access to the following APIs:\n\nget_weather: Call this tool" in prompt_of(engine)
    modern = chat(client, REACT, tools=[WEATHER], max_tokens=99).choices[0]
    assert modern.finish_reason == "tool_calls"
    assert modern.message.tool_calls[0].function.name == "get_weather"
    final = chat(client, "say:Thought: Fine.\nFinal Answer: 21 degrees", tools=[WEATHER], max_tokens=99)
    assert final.choices[0].message.content == "21 degrees"
    chunks = list(chat(client, REACT, tools=[WEATHER], max_tokens=99, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert calls[0].function.name == "get_weather"
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Paris"}


def test_the_original_goes_on_after_a_result(original: tuple[OpenAI, EchoEngine]) -> None:
    client, engine = original
    call = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "get_weather", "content": "21"},
    ]
    chat(client, messages=messages, functions=[WEATHER["function"]])
    assert prompt_of(engine).endswith(
        "assistant\nThought: I can use get_weather.\nAction: get_weather\n"
        'Action Input: {"city": "Paris"}\nObservation: 21\nThought:'
    )


def test_the_originals_boxes(original: tuple[OpenAI, EchoEngine]) -> None:
    client, _ = original
    picture = {"type": "image", "image": data_uri("rgb_97x61.png")}
    text = {"type": "text", "text": "say:<ref>dog</ref><box>(100,200),(500,1000)</box>"}
    message = (
        chat(client, messages=[{"role": "user", "content": [picture, text]}], max_tokens=99)
        .choices[0]
        .message
    )
    assert message.model_extra["boxes"] == [{"points": [[9, 12], [48, 61]], "label": "dog", "image": 0}]


def test_a_call_can_be_demanded_of_the_original(original: tuple[OpenAI, EchoEngine]) -> None:
    client, _ = original
    choice = {"type": "function", "function": {"name": "get_weather"}}
    reply = chat(client, 'say: {"city": "Rome"}', tools=[WEATHER], tool_choice=choice, max_tokens=99).choices[
        0
    ]
    # The echo repeats the beginning that was written for it; the call must be there all the same.
    assert reply.message.tool_calls[0].function.name == "get_weather"


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_json_schema_holds_for_any_model(client: OpenAI) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "legs": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["kind", "legs"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    for temperature in (0, 1.0):
        reply = chat(
            client, response_format=wanted, ignore_eos=False, max_tokens=200, temperature=temperature, seed=1
        )
        animal = json.loads(reply.choices[0].message.content)
        assert animal["kind"] in ("cat", "dog")
        assert 0 <= animal["legs"] <= 9
        assert reply.choices[0].finish_reason == "stop"


def test_json_object_begins_an_object(client: OpenAI) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    wanted = {"type": "json_object"}
    reply = chat(
        client, response_format=wanted, ignore_eos=False, logit_bias={str(ord("}")): 50}, max_tokens=20
    )
    assert json.loads(reply.choices[0].message.content) == {}


def test_a_schema_that_is_none_is_refused(client: OpenAI) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        chat(client, response_format=wanted)


# -- reasoning --------------------------------------------------------------------------------------------------------


def test_reasoning_is_told_apart(told: OpenAI) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    for fields in (thinking, {"enable_thinking": True}, {"reasoning_effort": "high"}):
        reply = chat(told, "say:Hm, a dog.</think>\n\nA dog.", extra_body=fields, max_tokens=99)
        assert reply.choices[0].message.content == "A dog."
        assert reply.choices[0].message.model_extra["reasoning_content"] == "Hm, a dog."
        assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = list(chat(told, "say:Hm.</think>\n\nA dog.", extra_body=thinking, stream=True, max_tokens=99))
    reasoning = [(chunk.choices[0].delta.model_extra or {}).get("reasoning_content", "") for chunk in chunks]
    assert "".join(reasoning) == "Hm."
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "A dog."
    off = chat(told, "say:A dog.", extra_body={"reasoning_effort": "none"}, max_tokens=99)
    assert off.choices[0].message.content == "A dog."


# -- plain completions ------------------------------------------------------------------------------------------------


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
    logprobs = client.completions.create(prompt="Hello", logprobs=2, **fields).choices[0].logprobs
    assert len(logprobs.token_logprobs) == 6
    assert all(len(top) >= 1 for top in logprobs.top_logprobs)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"store": True}, "store"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages[0].name"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "tool", "tool_call_id": "z", "content": ""},
                ]
            },
            "messages[1]",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_refused_by_name(url: str, fields: dict[str, Any], names: str) -> None:
    body = {"model": "tiny", "messages": ask("x"), **fields}
    status, reply = post(f"{url}/v1/chat/completions", body)
    assert status == 400, reply
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == names
    assert error["type"] == "invalid_request_error"


def test_unknown_models_and_paths_are_404(url: str, engine: Engine) -> None:
    assert post(f"{url}/v1/nothing", {})[0] == 404
    shelf = Shelf([Offer("a", ""), Offer("b", "")], lambda source: engine)
    with pytest.raises(Exception, match="no model 'c'"):
        shelf.find("c")
    named = Shelf([Offer("a", "")], lambda source: engine, aliases=["gpt-4o"])
    assert named.names == ["gpt-4o"]
    assert named.find("gpt-4o").name == "a"
    with pytest.raises(Exception, match="no model 'a'"):
        named.find("a")


def test_a_bad_picture_is_the_clients_fault(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not a picture"):
        prompt_tokens(client, {"type": "image", "image": "data:image/png;base64,AAAA"})


# -- running ----------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_429_with_retry_after(checkpoint: Path) -> None:
    engine = EchoEngine(processor_of(checkpoint), max_queue=0)
    with serving(echo_shelf(engine)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client, "say:x")
        assert int(caught.value.response.headers["retry-after"]) > 0


def test_comments_keep_a_waiting_stream_alive(told: OpenAI, echo: EchoEngine, echo_url: str) -> None:
    echo.hold.clear()
    body = {"model": "tiny", "messages": ask("say:late"), "stream": True}
    request = urllib.request.Request(
        f"{echo_url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        lines = [response.readline() for _ in range(6)]
        assert any(line.startswith(b": ") for line in lines)
        echo.hold.set()
        assert b"late" in response.read()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(echo: EchoEngine, echo_url: str, *, stream: bool) -> None:
    echo.hold.clear()
    before = len(echo.requests)
    body = json.dumps({"model": "tiny", "messages": ask("say:never"), "stream": stream}).encode()
    address = echo_url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: len(echo.requests) > before)
        assert not echo.requests[-1].cancelled
    wait_for(lambda: echo.requests[-1].cancelled)
    echo.hold.set()


def test_time_runs_out(checkpoint: Path) -> None:
    engine = EchoEngine(processor_of(checkpoint))
    engine.hold.clear()
    settings = Settings(limits=Limits(request_seconds=0.3))
    with serving(echo_shelf(engine), settings) as url:
        status, reply = post(f"{url}/v1/chat/completions", {"model": "m", "messages": ask("say:x")})
        assert status == 504
        assert reply["error"]["code"] == "timeout"
        time.sleep(0.1)
        assert engine.requests[-1].cancelled


def test_shutdown_lets_an_answer_finish(checkpoint: Path) -> None:
    engine = EchoEngine(processor_of(checkpoint), pause=0.05)
    with serving(echo_shelf(engine)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        stream = chat(client, "say:" + "x" * 100, stream=True, max_tokens=99)
        next(iter(stream))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert len(text) >= 90
    assert engine.closed


def test_the_python_example_of_the_readme_runs(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parent.parent / "server" / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "photo.jpg").write_bytes((IMAGES / "photo_333x217.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    code = code.replace("http://localhost:8000", url).replace("stream=True", "stream=True, max_tokens=5")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_metrics_count(told: OpenAI, echo_url: str) -> None:
    chat(told, "say:hello", max_tokens=99)
    text = urllib.request.urlopen(f"{echo_url}/metrics").read().decode()
    assert 'qwenvl_requests_total{path="chat",status="200"}' in text
    assert "qwenvl_first_token_seconds_bucket" in text
    assert "qwenvl_active_requests 0" in text
    assert 'qwenvl_model_loaded{model="tiny"} 1' in text
