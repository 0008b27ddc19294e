"""Functions, JSON and reasoning, in whatever form the model writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers import reference
from openai import OpenAI
from serving import (
    TEMPLATE,
    WEATHER,
    EchoEngine,
    ask,
    chat,
    chat_checkpoint,
    client_of,
    data_uri,
    echo_shelf,
    processor_of,
    serving,
)

from qwenvl_mlx.engine import Engine

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>'


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


def test_strict_functions_get_the_arguments_that_they_name(client: OpenAI, tiny_engine: Engine) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    bias = {str(tiny_engine.processor.tokenizer.id("<tool_call>")): 100, str(ord('"')): 20}
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
        yield client_of(url), engine


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


def test_the_originals_pictures_have_one_size(original: tuple[OpenAI, EchoEngine]) -> None:
    client, _ = original

    def ask_about(**fields: Any) -> Any:
        url = {"url": data_uri("rgb_97x61.png"), "detail": "low"}
        parts = [
            {"type": "image_url", "image_url": url, **fields.pop("part", {})},
            {"type": "text", "text": "say:x"},
        ]
        return chat(client, messages=[{"role": "user", "content": parts}], **fields)

    assert ask_about().choices[0].message.content == "x"
    for fields in ({"part": {"max_pixels": 9999}}, {"extra_body": {"min_pixels": 9999}}):
        with pytest.raises(openai.BadRequestError, match="one size"):
            ask_about(**fields)


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


def test_blanks_in_json_come_to_an_end(client: OpenAI) -> None:
    """A model that would write nothing but blanks must still finish."""
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    blanks = {str(ord(" ")): 100, str(ord("\n")): 90, str(ord("}")): 50}
    wanted = {"type": "json_object"}
    reply = chat(client, response_format=wanted, ignore_eos=False, logit_bias=blanks, max_tokens=100)
    assert json.loads(reply.choices[0].message.content) == {}
    assert reply.choices[0].finish_reason == "stop"


def test_a_schema_that_is_none_is_refused(client: OpenAI) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        chat(client, response_format=wanted)


def test_thinking_that_a_model_does_not_know_is_refused(
    original: tuple[OpenAI, EchoEngine], tmp_path: Path
) -> None:
    client, _ = original
    for fields in ({"enable_thinking": True}, {"reasoning_effort": "high"}):
        with pytest.raises(openai.BadRequestError, match="does not think"):
            chat(client, "say:x", extra_body=fields)
    assert chat(client, "say:x", extra_body={"enable_thinking": False}).choices[0].message.content == "x"
    with pytest.raises(openai.BadRequestError, match="number"):
        chat(client, "say:x", extra_body={"chat_template_kwargs": {"add_vision_id": True}})
    folder = chat_checkpoint(tmp_path)
    always = TEMPLATE.replace("{% if enable_thinking %}<think>\n{% endif %}", "<think>\n")
    assert always != TEMPLATE
    (folder / "chat_template.jinja").write_text(always, encoding="utf-8")
    with serving(echo_shelf(EchoEngine(processor_of(folder)))) as url:
        thinker = client_of(url)
        with pytest.raises(openai.BadRequestError, match="always thinks"):
            chat(thinker, "say:x", extra_body={"enable_thinking": False})
        reply = chat(thinker, "say:Hm.</think>x", extra_body={"enable_thinking": True}, max_tokens=99)
        assert reply.choices[0].message.content == "x"


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
