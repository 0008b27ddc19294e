"""A picture that can't be had ends the command with exit code 1 and one line that names it and the cure."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from helpers import reference
from test_fetch import bomb

TINY = "qwen_vl/ckpt/tiny_chat/safetensors_fp32"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("zero.png", b"", "is empty"),
        ("noise.png", b"\x00\x01\x02 no picture", "convert it to PNG or JPEG"),
        ("page.jpg", b"<!doctype html><html>not found</html>", "is a web page"),
        ("bomb.png", bomb(20_000, 20_000), "more than 100 megapixels"),
        ("half.png", bomb(100, 100), "check that it is whole"),
        ("missing.png", None, "does not exist"),
    ],
)
def test_the_command_names_picture_and_cure(
    name: str, content: bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    command = importlib.import_module("qwenvl_mlx.generate")
    arguments = [
        "--model",
        str(reference(TINY)),
        "--image",
        str(path),
        "--prompt",
        "What?",
        "--max-tokens",
        "1",
    ]
    assert command.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    [line] = [line for line in err.splitlines() if line]
    assert name in line
    assert says in line
