"""``python -m qwenvl_mlx.generate``: every option does what it says, on real tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from PIL import Image

from qwenvl_mlx.engine.events import Reply, Timings, Usage
from qwenvl_mlx.generate import _draw, _pictures, main, read_messages
from qwenvl_mlx.processor.base import Box

RAW = "<|vision_start|><|image_pad|><|vision_end|>what is this?"


@pytest.fixture(scope="module")
def model() -> str:
    return str(reference("qwen2_vl/tiny-hub"))


@pytest.fixture
def photo() -> str:
    return str(reference("images/photo_333x217.jpg"))


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main([*options, "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    code, out, err = run(capsys, *options, "--json")
    assert code == 0, err
    value: dict[str, Any] = json.loads(out)
    return value


def test_text_goes_to_stdout_and_statistics_to_stderr(
    capsys: pytest.CaptureFixture[str], model: str, photo: str
) -> None:
    options = [
        "--model",
        model,
        "--raw",
        "--image",
        photo,
        "--prompt",
        RAW,
        "--max-tokens",
        "6",
        "--temp",
        "0",
    ]
    code, out, err = run(capsys, *options)
    assert code == 0
    assert out.endswith("\n")
    assert "tokens/s" in err
    assert "pictures" in err
    value = run_json(capsys, *options)
    assert value["text"] + "\n" == out
    assert len(value["tokens"]) == value["completion_tokens"] <= 6
    assert value["prompt_tokens"] == len(value["prompt_token_ids"])
    assert value["finish_reason"] in ("length", "stop")
    assert value["boxes"] == []
    assert value["timings"]["vision"] > 0


def test_sampling_options_reach_the_sampler(capsys: pytest.CaptureFixture[str], model: str) -> None:
    common = ["--model", model, "--raw", "--prompt", "hello", "--max-tokens", "16", "--ignore-eos"]
    common += ["--dtype", "float32"]  # in bfloat16 the best logits may tie
    hot = [*common, "--temperature", "1.5", "--top-p", "0.99", "--top-k", "100"]
    tokens = [run_json(capsys, *hot, "--seed", seed)["tokens"] for seed in ("1", "1", "2")]
    assert tokens[0] == tokens[1] != tokens[2]
    greedy = run_json(capsys, *common, "--temp", "0")["tokens"]
    assert run_json(capsys, *hot, "--seed", "3", "--min-p", "1")["tokens"] == greedy
    penalised = run_json(capsys, *common, "--temp", "0", "--repetition-penalty", "1000")["tokens"]
    assert len(set(penalised)) == len(penalised)


def test_ignore_eos_max_tokens_and_stop(capsys: pytest.CaptureFixture[str], model: str) -> None:
    common = ["--model", model, "--raw", "--prompt", "hello there", "--temp", "0", "--ignore-eos"]
    value = run_json(capsys, *common, "--max-tokens", "40")
    assert len(value["tokens"]) == 40
    stop = value["text"][3:5]
    stopped = run_json(capsys, *common, "--max-tokens", "40", "--stop", stop)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == value["text"][: value["text"].index(stop)]


def test_picture_limits_reach_the_processor(
    capsys: pytest.CaptureFixture[str], model: str, photo: str
) -> None:
    common = ["--model", model, "--raw", "--image", photo, "--prompt", RAW, "--max-tokens", "1"]
    small = run_json(capsys, *common, "--max-pixels", "8000")["prompt_tokens"]
    large = run_json(capsys, *common, "--min-pixels", "60000", "--max-pixels", "80000")["prompt_tokens"]
    assert small < large


def test_type_and_kv_bits(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(reference("qwen3_vl/tiny"))
    common = [
        "--model",
        folder,
        "--raw",
        "--prompt",
        "hello",
        "--max-tokens",
        "3",
        "--ignore-eos",
        "--temp",
        "0",
    ]
    assert len(run_json(capsys, *common, "--dtype", "bfloat16")["tokens"]) == 3
    value = run_json(capsys, *common, "--max-kv-size", "7", "--max-tokens", "9")
    assert value["prompt_tokens"] + len(value["tokens"]) == 7


def test_a_conversation_from_a_file(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    path = tmp_path / "talk.json"
    for content in (messages, {"messages": messages}):
        path.write_text(json.dumps(content))
        assert read_messages(path) == messages


def test_chat_template_and_system(capsys: pytest.CaptureFixture[str], shared: Path, photo: str) -> None:
    folder = str(shared / "qwen2_5_vl" / "tiny-hub")
    common = ["--model", folder, "--max-tokens", "2", "--prompt", "hi"]
    plain = run_json(capsys, *common)["prompt_tokens"]
    assert (
        run_json(capsys, *common, "--system", "a much longer instruction than usual")["prompt_tokens"] > plain
    )
    assert run_json(capsys, *common, "--image", photo, "--image", photo)["prompt_tokens"] > plain + 8


@pytest.mark.parametrize(
    ("content", "sources"),
    [
        ("plain", []),
        ("<img>a.png</img>what? <img>b c.png</img>", ["a.png", "b c.png"]),
        ([{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}], ["a.png"]),
        ([{"type": "image_url", "image_url": {"url": "http://x/a.png"}}], ["http://x/a.png"]),
        ([{"type": "video", "video": "v.mp4"}], []),
        ([{"image": "a.png"}, {"text": "what?"}], ["a.png"]),
        (None, []),
    ],
)
def test_pictures_of_a_message_in_order(content: Any, sources: list[str]) -> None:
    assert _pictures(content) == sources


def test_boxes_are_drawn_on_the_source_picture(tmp_path: Path) -> None:
    source = tmp_path / "in.png"
    Image.new("RGB", (100, 60), "white").save(source)
    reply = Reply("", [], "stop", Usage(1, 1), Timings(), [Box(((20, 10), (70, 40)), "dog")])
    _draw(reply, str(source), tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (100, 60)
        changed = np.argwhere((np.asarray(drawn) != 255).any(-1))
    assert changed.min(0)[0] <= 10 <= changed.max(0)[0]
    assert abs(changed.max(0) - (40, 70)).max() <= 3
