"""What users get wrong costs them one line on stderr and a telling exit code, never a traceback."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from helpers import heed_interrupts, reference

from qwenvl_mlx import chat, cli
from qwenvl_mlx.errors import QwenVLError
from qwenvl_mlx.generate import main
from qwenvl_mlx.server import __main__ as server

RAW = "<|vision_start|><|image_pad|><|vision_end|>what is this?"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model() -> str:
    return str(reference("qwen2_vl/tiny-hub"))


def fails(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line that a failing command prints."""
    code = main([*options, "--device", "cpu"])
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def fails_with_picture(capsys: pytest.CaptureFixture[str], model: str, picture: Path) -> str:
    return fails(capsys, "--model", model, "--raw", "--prompt", RAW, "--image", str(picture))


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few bytes whose header announces side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")))
    return path


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_missing_picture(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    assert "nowhere.png does not exist" in fails_with_picture(capsys, model, tmp_path / "nowhere.png")


def test_unreadable_picture(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("this is no picture")
    assert "text.png" in fails_with_picture(capsys, model, path)


def test_truncated_picture(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    path.write_bytes(reference("images/photo_333x217.jpg").read_bytes()[:2000])
    assert "half.jpg" in fails_with_picture(capsys, model, path)


def test_zero_byte_picture(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert "empty.png" in fails_with_picture(capsys, model, path)


def test_picture_bomb_is_refused_by_its_header(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    begin = time.perf_counter()
    message = fails_with_picture(capsys, model, bomb(tmp_path / "bomb.png", 60_000))
    assert "bomb.png" in message
    assert "pixels" in message
    assert time.perf_counter() - begin < 5


def test_missing_model_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/such/folder" in fails(capsys, "--model", "./no/such/folder", "--prompt", "hi")


def test_wrong_generation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "llama" in fails(capsys, "--model", str(tmp_path), "--prompt", "hi")


def test_text_only_qwen_is_sent_to_mlx_lm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen"}))
    assert "mlx-lm" in fails(capsys, "--model", str(tmp_path), "--prompt", "hi")


def test_half_a_checkpoint(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    copy = tmp_path / "half"
    shutil.copytree(model, copy)
    for file in copy.glob("*.safetensors"):
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "safetensors" in fails(capsys, "--model", str(copy), "--raw", "--prompt", "hi")


def test_folder_without_weights(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    copy = tmp_path / "bare"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "bare" in fails(capsys, "--model", str(copy), "--raw", "--prompt", "hi")


def test_prompt_longer_than_the_limit(capsys: pytest.CaptureFixture[str], model: str) -> None:
    message = fails(capsys, "--model", model, "--raw", "--prompt", "a" * 100, "--max-kv-size", "50")
    assert "limit is 50" in message


def test_placeholders_and_pictures_that_differ(capsys: pytest.CaptureFixture[str], model: str) -> None:
    photo = str(reference("images/photo_333x217.jpg"))
    message = fails(capsys, "--model", model, "--raw", "--prompt", "no place", "--image", photo)
    assert "placeholder" in message


def test_options_out_of_range(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert "top_p" in fails(capsys, "--model", model, "--prompt", "hi", "--top-p", "3")


@pytest.mark.parametrize(
    "content", ["{not json", '"text"', "[1, 2]", "{}", b"\xff\xfe\x00"], ids=lambda value: repr(value)
)
def test_messages_file_that_is_none(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, content: str | bytes
) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "talk.json" in fails(capsys, "--model", model, "--messages", str(path))


def test_missing_messages_file(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    assert "does not exist" in fails(capsys, "--model", model, "--messages", str(tmp_path / "no.json"))


def test_boxes_into_a_missing_folder(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    options = ["--model", model, "--prompt", "hi", "--image", "x.png"]
    assert "not a folder" in fails(capsys, *options, "--boxes", str(tmp_path / "none" / "out.png"))
    assert "out.txt" in fails(capsys, *options, "--boxes", str(tmp_path / "out.txt"))
    assert "--image" in fails(
        capsys, "--model", model, "--prompt", "hi", "--boxes", str(tmp_path / "out.png")
    )


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--model", "m"],
        ["--model", "m", "--prompt", "x", "--messages", "y"],
        ["--model", "m", "--messages", "y", "--image", "z"],
        ["--model", "m", "--prompt", "x", "--raw", "--system", "y"],
        ["--model", "m", "--prompt", "x", "--max-tokens", "0"],
        ["--model", "m", "--prompt", "x", "--no-such-option"],
        ["--model", "m", "--prompt", "x", "--device", "tpu"],
    ],
)
def test_wrong_usage_is_2(options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2


def test_interrupt_is_130(model: str) -> None:
    command = [sys.executable, "-m", "qwenvl_mlx.generate", "--model", model, "--raw", "--prompt", "go"]
    command += ["--ignore-eos", "--max-tokens", "30000", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_interrupts, **pipes) as running:
        assert running.stdout is not None
        running.stdout.read(1)  # it is answering
        running.send_signal(signal.SIGINT)
        try:
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130
    assert b"Traceback" not in err


def test_no_space_and_no_permission(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "out.png")

    assert cli.run(full) == 1
    assert "no space" in capsys.readouterr().err

    def bug() -> None:
        raise OSError(9, "Bad file descriptor")

    with pytest.raises(OSError, match="descriptor"):
        cli.run(bug)


def test_a_message_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise QwenVLError("two\nlines")

    assert cli.run(fail) == 1
    assert capsys.readouterr().err == "error: two lines\n"


def test_commands_that_machines_cannot_share_say_so(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}')
    batch = ["--batch", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert "without mlx.launch" in fails(capsys, "--model", model, *batch)
    assert chat.main(["--model", model]) == 1
    assert server.main(["--model", model]) == 1
    assert capsys.readouterr().err.count("without mlx.launch") == 2
