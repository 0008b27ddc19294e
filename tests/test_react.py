"""Function calls of the original Qwen-VL: prompts and answers equal those of its published API server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import reference

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.processor import react

GOLDENS = "qwen_vl/goldens"


def golden(name: str) -> Any:
    return json.loads(reference(f"{GOLDENS}/{name}").read_text(encoding="utf-8"))


def canonical(message: dict[str, Any]) -> dict[str, Any]:
    """The goldens' older form -> what the server hands to the processor."""
    role = {"function": "tool"}.get(message["role"], message["role"])
    result: dict[str, Any] = {"role": role, "content": message["content"] or ""}
    if call := message.get("function_call"):
        result["tool_calls"] = [{"id": "call", "type": "function", "function": call}]
    return result


def test_prompts_equal_the_reference() -> None:
    for case in golden("react_parse_messages.json"):
        if "exception" in case:
            continue  # the reference fails on these by accident
        functions = case["functions"] or []
        messages = [canonical(message) for message in case["messages"]]
        if "error" in case:
            with pytest.raises(PromptError):
                react.write(messages, functions)
            continue
        turns, begun = react.write(messages, functions)
        assert (begun is not None) == case["completion_mode"]
        history = [turn["content"] for turn in turns]
        expected = [text for pair in case["history"] for text in pair]
        if case["completion_mode"]:
            assert [*history, begun] == expected
        else:
            assert history == [*expected, case["query"]]


def test_answers_are_read_as_the_reference_does() -> None:
    for case in golden("react_parse_response.json"):
        content, call = react.parse(case["response"])
        message = case["choice"]["message"]
        expected = message["function_call"]
        assert content == message["content"]
        assert call == (expected and (expected["name"], expected["arguments"]))


def test_pictures_stay_in_their_turns() -> None:
    picture = {"type": "image", "image": "a.png"}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "Where is this?"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "look", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": [picture]},
    ]
    turns, begun = react.write(messages, [{"name": "look", "parameters": {}}])
    assert turns[0]["content"][0]["text"].endswith("Begin!\n\nQuestion: ")
    assert turns[0]["content"][1] == picture
    assert begun == [
        {"type": "text", "text": 'Thought: I can use look.\nAction: look\nAction Input: {"x": 1}'},
        {"type": "text", "text": "\nObservation: "},
        picture,
        {"type": "text", "text": "\nThought:"},
    ]
