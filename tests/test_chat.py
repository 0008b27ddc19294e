"""The terminal chat: what a line means, what is remembered, and what Ctrl-C stops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeModel, FakeProcessor

from qwenvl_mlx.chat import Chat, clean_path, split_media
from qwenvl_mlx.engine import Engine, GenerationOptions
from qwenvl_mlx.errors import MediaError
from qwenvl_mlx.processor.base import MediaOptions


@pytest.fixture
def chat() -> Iterator[Chat]:
    with Engine(FakeModel(), FakeProcessor()) as engine:
        yield Chat(engine, GenerationOptions(max_tokens=4, ignore_eos=True), MediaOptions())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "my photo (1).JPG"
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize("style", ["{}", "'{}'", '"{}"', "escaped", "uri", "  {}  "])
def test_a_pasted_path_is_a_picture_in_every_spelling(photo: Path, style: str) -> None:
    text = {
        "escaped": str(photo).replace(" ", "\\ ").replace("(", "\\(").replace(")", "\\)"),
        "uri": photo.as_uri(),
    }.get(style, style.format(photo))
    assert split_media(text) == ([{"type": "image", "image": str(photo)}], "")


def test_an_apostrophe_in_a_quoted_path(tmp_path: Path) -> None:
    path = tmp_path / "it's a dog.png"
    path.write_bytes(b"x")
    for written in (str(path).replace("'", "'\\''").join("''"), f'"{path}"'):
        assert split_media(f"what is {written} ?") == ([{"type": "image", "image": str(path)}], "what is ?")


def test_paths_within_a_question(photo: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"x")
    escaped = str(photo).replace(" ", "\\ ")
    media, text = split_media(f"what is in {escaped} and in {clip} ?")
    assert media == [{"type": "image", "image": str(photo)}, {"type": "video", "video": str(clip)}]
    assert text == "what is in and in ?"


@pytest.mark.parametrize("line", ["what is 3.png?", "it's a dog, isn't it", "no/such/file.jpg", "C:\\temp"])
def test_ordinary_text_stays_as_it_is(line: str) -> None:
    assert split_media(line) == ([], line)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert clean_path("~/a b.png") == str(tmp_path / "a b.png")


def test_a_conversation_is_remembered(chat: Chat) -> None:
    chat.take("hello")
    chat.take("and now?")
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    chat.take("/reset")
    assert chat.messages == []


def test_regenerate_replaces_the_last_answer(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("/regenerate")
    assert "nothing" in capsys.readouterr().out
    chat.take("hello")
    chat.take("/regenerate")
    assert len(chat.messages) == 2


def test_a_failed_question_is_forgotten(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("x" * 1000)  # longer than the model's limit
    assert chat.messages == []
    assert "limit" in capsys.readouterr().err


def test_a_picture_that_fails_does_not_spoil_the_next_question(
    chat: Chat, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MediaError("my photo (1).JPG is not a picture that can be read")

    with monkeypatch.context() as patched:
        patched.setattr(FakeProcessor, "__call__", refuse)
        chat.take(f"'{photo}' what is it?")
    said = capsys.readouterr()
    assert "not a picture" in said.err
    assert "left out" in said.out
    chat.take("and now?")
    assert chat.messages[0]["content"] == "and now?"


def test_commands(chat: Chat, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("/help")
    chat.take("/image no such file.png")
    chat.take("/nonsense")
    chat.take("/no/such.png what is it?")
    out = capsys.readouterr().out
    assert "Ctrl-C" in out
    assert "is not a file" in out
    assert "no command /nonsense" in out
    assert "/no/such.png is not a file" in out
    chat.take(f"/image {photo}")
    assert photo.name in capsys.readouterr().out


def test_input_ends_the_chat(chat: Chat) -> None:
    lines = iter(["hello", "", "/exit", "never asked"])
    chat.run(lambda: next(lines))
    assert len(chat.messages) == 2


def test_ctrl_c_at_the_prompt_goes_on(chat: Chat) -> None:
    steps = iter([KeyboardInterrupt(), "hello", EOFError()])

    def read() -> str:
        step = next(steps)
        if isinstance(step, BaseException):
            raise step
        return step

    chat.run(read)
    assert len(chat.messages) == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat._options = GenerationOptions(max_tokens=400, ignore_eos=True)
    shown = []

    def show(*values: object, **_: object) -> None:
        shown.append(values)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", show)
    chat.take("hello")
    answer = chat.messages[-1]
    assert answer["role"] == "assistant"
    assert answer["content"].startswith("".join(str(values[0]) for values in shown[:3]))
    assert len(answer["content"].encode()) < 400
