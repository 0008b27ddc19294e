"""Calls and reasoning are told apart from content, whole or streamed, and never half a tag is shown."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl_mlx.processor.answer import AnswerSplitter, Piece, split_answer
from qwenvl_mlx.processor.tool_calls import ToolCall, parse_call

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "zoom",
            "parameters": {
                "properties": {
                    "bbox": {"type": "array"},
                    "times": {"type": "integer"},
                    "smooth": {"type": "boolean"},
                    "title": {"type": "string"},
                }
            },
        },
    }
]
JSON_CALL = '<tool_call>\n{"name": "zoom", "arguments": {"bbox": [0, 1]}}\n</tool_call>'
TAG_CALL = (
    "<tool_call>\n<function=zoom>\n<parameter=bbox>\n[0, 1]\n</parameter>\n"
    "<parameter=title>\ntwo\nlines 5\n</parameter>\n</function>\n</tool_call>"
)
ZOOM = ToolCall("zoom", {"bbox": [0, 1]})


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ('{"name": "zoom", "arguments": {"bbox": [0, 1]}}', ZOOM),
        ('{"name": "zoom", "arguments": "{\\"bbox\\": [0, 1]}"}', ZOOM),
        ('{"name": "now"}', ToolCall("now", {})),
        ("<function=zoom>\n<parameter=times>\n3\n</parameter>\n</function>", ToolCall("zoom", {"times": 3})),
        ("<function=zoom><parameter=smooth>True</parameter></function>", ToolCall("zoom", {"smooth": True})),
        ("<function=zoom><parameter=title>\n7\n</parameter></function>", ToolCall("zoom", {"title": "7"})),
        ("<function=zoom><parameter=times>many</parameter></function>", ToolCall("zoom", {"times": "many"})),
        ("<function=other><parameter=n>3</parameter></function>", ToolCall("other", {"n": "3"})),
        (
            "<function=zoom>\n<parameter=title>\na\n<parameter=times>\n3",
            ToolCall("zoom", {"title": "a", "times": 3}),
        ),
        ("<function=now>\n</function>", ToolCall("now", {})),
        ('{"name": "zoom", "arguments": {"bbox"', None),
        ('{"name": 3}', None),
        ("[1]", None),
        ("nothing", None),
    ],
)
def test_calls(block: str, expected: ToolCall | None) -> None:
    assert parse_call(block, TOOLS) == expected


ANSWERS = [
    ("Hello.", False, None, "Hello.", ()),
    ("  two  spaces \n", False, None, "  two  spaces \n", ()),
    ("why</think>\n\nbecause", True, "why", "because", ()),
    ("<think>\nwhy\n</think>\n\nbecause", False, "why", "because", ()),
    ("cut off while thinking\n", True, "cut off while thinking", "", ()),
    ("</think>\n\nat once", True, None, "at once", ()),
    ("a <think> in passing </think>", False, None, "a <think> in passing </think>", ()),
    (JSON_CALL, False, None, "", (ZOOM,)),
    (
        f"I look.\n\n{TAG_CALL}",
        False,
        None,
        "I look.",
        (ToolCall("zoom", {"bbox": [0, 1], "title": "two\nlines 5"}),),
    ),
    (f"hm\n</think>\n\n{JSON_CALL}\n{JSON_CALL}", True, "hm", "", (ZOOM, ZOOM)),
    (f"x {JSON_CALL} y", False, None, "xy", (ZOOM,)),
    (JSON_CALL[:-12], False, None, "", (ZOOM,)),
    ("<tool_call>no call</tool_call>!", False, None, "<tool_call>no call</tool_call>!", ()),
    ('<tool_call>{"name": "zo', False, None, '<tool_call>{"name": "zo', ()),
    ("a < b <tool", False, None, "a < b <tool", ()),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "content", "calls"), ANSWERS)
def test_whole_answers(text: str, opened: bool, reasoning: str | None, content: str, calls: Any) -> None:
    answer = split_answer(text, opened=opened, tools=TOOLS)
    assert (answer.reasoning, answer.content, answer.calls) == (reasoning, content, calls)


@pytest.mark.parametrize("step", [1, 3, 7])
@pytest.mark.parametrize(("text", "opened", "reasoning", "content", "calls"), ANSWERS)
def test_streamed_answers(
    text: str, opened: bool, reasoning: str | None, content: str, calls: Any, step: int
) -> None:
    splitter = AnswerSplitter(opened=opened, tools=TOOLS)
    events = [event for at in range(0, len(text), step) for event in splitter.add(text[at : at + step])]
    events += splitter.finish()
    said = {
        kind: "".join(e.text for e in events if isinstance(e, Piece) and e.kind == kind)
        for kind in ("reasoning", "content")
    }
    assert (said["reasoning"] or None, said["content"]) == (reasoning, content)
    assert tuple(event for event in events if isinstance(event, ToolCall)) == calls


def test_content_is_not_held_back_without_need() -> None:
    splitter = AnswerSplitter(opened=False)
    assert [piece.text for part in ("One ", "two", " <", "3") for piece in splitter.add(part)] == [
        "One",
        " two",
        " <",
        "3",
    ]


def test_without_tools_no_calls_are_looked_for() -> None:
    assert split_answer(JSON_CALL, opened=False).content == JSON_CALL
