"""Conversations become the text that transformers renders, in a sandbox, whatever form they are given in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenvl_mlx.errors import CheckpointError, PromptError
from qwenvl_mlx.processor.chat_template import ChatTemplate
from qwenvl_mlx.processor.messages import conversation

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl_instruct", "qwen3_vl_thinking", "qwen3_5")
CALL = {"type": "function", "function": {"name": "zoom", "arguments": '{"bbox": [0, 1]}'}}


def _render(
    template: ChatTemplate, messages: list[Any], tools: list[Any] | None = None, **variables: Any
) -> str:
    plain = conversation(messages, argument_text=template.takes_argument_text(tools=bool(tools)))
    return template.render(plain.messages, tools=tools, **variables)


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_equal_the_goldens(family: str, shared: Path) -> None:
    template = ChatTemplate.from_folder(shared / "tokenizers" / family)
    goldens = json.loads((shared / f"tokenizers/goldens/{family}.json").read_text())["conversations"]
    assert len(goldens) > 20
    for golden in goldens:
        assert _render(template, golden["messages"], **golden["kwargs"]) == golden["prompt"], golden["name"]


@pytest.mark.parametrize("family", FAMILIES)
def test_openai_forms_render_like_plain_ones(family: str, shared: Path) -> None:
    template = ChatTemplate.from_folder(shared / "tokenizers" / family)
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "?"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "zoom", "arguments": {"bbox": [0, 1]}}}],
        },
        {"role": "tool", "content": "done"},
    ]
    openai = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "a"}},
                {"type": "video_url", "video_url": "b"},
                "?",
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    assert _render(template, openai) == _render(template, plain)


def test_parts_are_listed_in_their_order() -> None:
    content = [
        {"image": "a"},
        {"text": "x"},
        {"type": "video_url", "video_url": "v"},
        {"type": "image", "image": "b"},
    ]
    plain = conversation([{"role": "user", "content": content}], argument_text=False)
    assert plain.parts == [content[0], content[2], content[3]]
    assert plain.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "x"},
        {"type": "video"},
        {"type": "image"},
    ]


@pytest.mark.parametrize(
    ("messages", "cure"),
    [
        ([], "at least one message"),
        ("Hello", "at least one message"),
        ([{"content": "x"}], "needs a role"),
        ([{"role": "user", "content": 3}], "give text or a list"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "input_audio"),
        ([{"role": "user", "content": [7]}], "no part of a message"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}], "give its name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "send them whole",
        ),
    ],
)
def test_bad_messages(messages: Any, cure: str) -> None:
    with pytest.raises(PromptError, match=cure):
        conversation(messages, argument_text=False)


def test_where_templates_are_found(tmp_path: Path) -> None:
    def rendered(**content: Any) -> str:
        for name, value in content.items():
            file = {
                "jinja": "chat_template.jinja",
                "json": "chat_template.json",
                "config": "tokenizer_config.json",
            }[name]
            (tmp_path / file).write_text(value if name == "jinja" else json.dumps(value))
        return ChatTemplate.from_folder(tmp_path).render([], tools=None)

    eos = {"content": "<end>"}
    assert rendered(config={"chat_template": "config {{ eos_token }}", "eos_token": eos}) == "config <end>"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    assert rendered(config={"chat_template": named}) == "plain"
    assert ChatTemplate.from_folder(tmp_path).render([], tools=[{"name": "f"}]) == "tools"
    assert rendered(json={"chat_template": "json"}) == "json"
    assert rendered(jinja="jinja") == "jinja"


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"put chat_template\.jinja into its folder"):
        ChatTemplate.from_folder(tmp_path).render([], tools=None)


def test_what_transformers_offers_to_templates() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y')[:2] }}"
    )
    text = ChatTemplate({"default": source}).render([{"a": "<ü>"}, {"b": 1}], tools=None)
    assert text == '{"a": "<ü>"}20'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system messages') }}",
        "{{ messages.__class__.__mro__ }}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{{ 'a' + 1 }}",
        "{{ messages.append(1) }}",
    ],
    ids=["refusal", "escape", "endless", "type error", "mutation"],
)
def test_templates_that_go_wrong_are_an_error_of_the_prompt(source: str) -> None:
    with pytest.raises(PromptError, match="chat template refuses"):
        ChatTemplate({"default": source}).render([], tools=None)


def test_a_damaged_template() -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        ChatTemplate({"default": "{% if %}"})
