"""A model cut over two processes gives the tokens that one process gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import reference

from qwenvl_mlx.generate import main

ROOT = Path(__file__).resolve().parent.parent
RAW = "<|vision_start|><|image_pad|><|vision_end|>what is this?"


def options(folder: str) -> list[str]:
    common = ["--model", str(reference(folder)), "--raw", "--dtype", "float32", "--device", "cpu", "--json"]
    common += ["--max-tokens", "12", "--ignore-eos", "--temp", "0"]
    return [*common, "--prompt", RAW, "--image", str(reference("images/tiny_5x7.png"))]


def launched(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launch = str(Path(sys.executable).with_name("mlx.launch"))
    command = [launch, "-n", "2", "--backend", "ring", "--", sys.executable, "-m", "qwenvl_mlx.generate"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


# One head of keys for two machines; gates beside heads and recurrent layers that every machine has whole.
@pytest.mark.parametrize("folder", ["qwen2_vl/tiny-hub", "qwen3_5/tiny"])
def test_two_processes_say_what_one_says(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(folder)) == 0
    alone: dict[str, Any] = json.loads(capsys.readouterr().out)
    done = launched(options(folder))
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stdout + done.stderr  # only the first process speaks
    assert json.loads(lines[0])["tokens"] == alone["tokens"]
