"""Function calls for the original Qwen-VL, which knows them only as text: Thought, Action, Action Input, Observation.

The wording is the one that its API server was published with; another one is answered less well.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_mlx.errors import PromptError

STOP = "Observation:"
"""Where the model's turn ends: what follows would be its own invention of the function's result."""

CALL = "\nAction:"
ARGUMENTS = "\nAction Input:"
OBSERVATION = "\nObservation:"
FINAL = "\nFinal Answer: "

DEFAULT_SYSTEM = "You are a helpful assistant."

_FUNCTION = (
    "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? "
    "{description} Parameters: {parameters}"
)
_INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

{functions}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""

_CHINESE = re.compile("[\u4e00-\u9fff]")
_ANSWERING = {
    True: "\nThought: 我会作答了。\nFinal answer: ",
    False: "\nThought: I now know the final answer.\nFinal answer: ",
}
_CALLING = {True: "Thought: 我可以使用 {} API。", False: "Thought: I can use {}."}

Content = str | list[dict[str, Any]]
Turn = dict[str, Any]


def write(
    messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]
) -> tuple[list[Turn], Content | None]:
    """Messages with calls, results and functions -> turns of user and assistant, and the answer to be continued.

    ``messages``: OpenAI's, calls as ``tool_calls``, results with role "tool". ``functions``: OpenAI's descriptions,
    or the older form with names for model and human. The second value is None when a new answer begins; else it is
    the content of a last turn that the model goes on with. The system's text and the functions go before a user's
    question: before the last one that was answered already, else the query.
    """
    messages, system = _without_system(messages)
    if not any(message["role"] == "user" for message in messages):
        raise PromptError("the conversation has no message of a user: add one")
    turns: list[Turn] = []
    for place, message in enumerate(messages):
        _add(turns, message, last=place == len(messages) - 1, with_functions=bool(functions))
    if not _alternating(turns):
        raise PromptError(
            "users and assistant must take turns, beginning with a user: mend the order of the messages"
        )
    preface = "\n\n".join(text for text in (system, instruction(functions) if functions else "") if text)
    if preface:
        _before_question(turns, preface)
    if turns[-1]["role"] == "user":
        return turns, None
    return turns[:-1], turns[-1]["content"]


def instruction(functions: Sequence[Mapping[str, Any]]) -> str:
    """How the model is told what it may call."""
    described, names = [], []
    for function in functions:
        name = function.get("name_for_model") or function.get("name") or ""
        human = function.get("name_for_human") or function.get("name") or ""
        description = function.get("description_for_model") or function.get("description") or ""
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        described.append(
            _FUNCTION.format(name=name, human=human, description=description, parameters=parameters)
        )
        names.append(name)
    return _INSTRUCTION.format(functions="\n\n".join(described), names=", ".join(names))


def parse(text: str) -> tuple[str, tuple[str, str] | None]:
    """An answer -> its content, and the name and arguments of the function that it calls, or None."""
    call, arguments, observation = text.rfind(CALL), text.rfind(ARGUMENTS), text.rfind(OBSERVATION)
    if 0 <= call < arguments:
        if observation < arguments:
            text = text.rstrip() + OBSERVATION
            observation = text.rfind(OBSERVATION)
        name = text[call + len(CALL) : arguments].strip()
        if name:
            return text[:call], (name, text[arguments + len(ARGUMENTS) : observation].strip())
    final = text.rfind(FINAL)
    return text[final + len(FINAL) :] if final >= 0 else text, None


def _without_system(messages: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], str]:
    if any(message["role"] == "system" for message in messages[1:]):
        raise PromptError("a system message is only possible as the first one: move it there")
    if not messages or messages[0]["role"] != "system":
        return messages, ""
    system = _text(_stripped(messages[0]["content"]))
    return messages[1:], "" if system == DEFAULT_SYSTEM else system


def _add(turns: list[Turn], message: Mapping[str, Any], *, last: bool, with_functions: bool) -> None:
    content = _stripped(message["content"])
    if message["role"] == "user":
        turns.append({"role": "user", "content": content})
        return
    if message["role"] == "tool":
        if not turns or turns[-1]["role"] != "assistant":
            raise PromptError(
                "a function's result must follow the assistant's call: mend the order of the messages"
            )
        _append(turns[-1], "\nObservation: ", content, "\nThought:" if last else "")
        return
    if not turns:
        raise PromptError("the first message must be a user's")
    said = _said(message, content, turns[-1]["content"], with_functions=with_functions)
    if turns[-1]["role"] == "user":
        turns.append({"role": "assistant", "content": _stripped(said)})
    else:
        _append(turns[-1], said)


def _said(message: Mapping[str, Any], content: Content, before: Content, *, with_functions: bool) -> Content:
    """A turn of the assistant as the model would have written it."""
    chinese = bool(_CHINESE.search(_text(before)))
    calls = [call["function"] for call in message.get("tool_calls") or []]
    if not calls:
        return _joined(_ANSWERING[chinese], content) if with_functions else content
    said: Content = ""
    for call in calls:
        thought = content or _CALLING[chinese].format(call["name"])
        arguments = call["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        said = _joined(said, "\n", thought, f"{CALL} {call['name']}{ARGUMENTS} {arguments}")
        content = ""
    return said


def _before_question(turns: list[Turn], preface: str) -> None:
    """The last user's turn that has an answer, else the query."""
    answered = [turn for turn, following in itertools.pairwise(turns) if following["role"] == "assistant"]
    turn = answered[-1] if answered else turns[-1]
    turn["content"] = _joined(f"{preface}\n\nQuestion: ", turn["content"])


def _alternating(turns: Sequence[Turn]) -> bool:
    return all(turn["role"] == ("user", "assistant")[place % 2] for place, turn in enumerate(turns))


def _append(turn: Turn, *more: Content) -> None:
    turn["content"] = _joined(turn["content"], *more)


def _joined(*contents: Content) -> Content:
    """Texts as one text; with a picture among them, as parts."""
    if all(isinstance(content, str) for content in contents):
        return "".join(str(content) for content in contents)
    parts = [_parts(content) for content in contents]
    return [part for some in parts for part in some]


def _parts(content: Content) -> list[dict[str, Any]]:
    return ([{"type": "text", "text": content}] if content else []) if isinstance(content, str) else content


def _stripped(content: Content) -> Content:
    """Without newlines before and blanks after the text."""
    if isinstance(content, str):
        return content.lstrip("\n").rstrip()
    if all(part["type"] == "text" for part in content):
        return _text(content).lstrip("\n").rstrip()
    return content


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
