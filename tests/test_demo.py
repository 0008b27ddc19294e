"""The demo answers rightly: stored, converted to 8 and 4 bits, batched, chatted, served, remembered, drawn."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image, ImageDraw
from serving import Kept, serving

from qwenvl_mlx import Engine, convert, hub, info, load
from qwenvl_mlx.engine import EngineOptions, GenerationOptions
from qwenvl_mlx.generate import main as generate
from qwenvl_mlx.processor.base import Box
from qwenvl_mlx.server.shelf import Offer, Shelf

SAMPLES = hub.resolve("demo") / "samples"
ANSWERS = json.loads((SAMPLES / "answers.json").read_text(encoding="utf-8"))
GREEDY = GenerationOptions(max_tokens=64, temperature=0.0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(*load("demo", "float32"), EngineOptions(prefill_chunk=64)) as engine:
        yield engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo as it is stored and as it is converted."""
    made = {"stored": "demo"}
    for bits in (8, 4):
        target = tmp_path_factory.mktemp("demo") / f"{bits}bit"
        options = ["-q", "--q-bits", str(bits), "--q-group-size", "32"]
        assert convert.main(["--hf-path", "demo", "--mlx-path", str(target), *options]) == 0
        made[f"{bits} bits"] = str(target)
    return made


def message(question: str, *pictures: str) -> dict[str, Any]:
    parts = [{"type": "image", "image": str(SAMPLES / name)} for name in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def overlap(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    inner = [max(0.0, min(first[n + 2], second[n + 2]) - max(first[n], second[n])) for n in (0, 1)]
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return inner[0] * inner[1] / (areas - inner[0] * inner[1])


def corners(box: Box) -> tuple[float, ...]:
    return tuple(float(v) for point in box.points for v in point)


def true_box(picture: str, question: str) -> tuple[float, ...]:
    """Where the card says that it is, in pixels."""
    told = next(row["answer"] for row in ANSWERS if (row["image"], row["question"]) == (picture, question))
    with Image.open(SAMPLES / picture) as opened:
        size = opened.size
    return tuple(v * size[n % 2] / 1000 for n, v in enumerate(json.loads(told)[0]["bbox_2d"]))


@pytest.mark.parametrize("form", ["stored", "8 bits", "4 bits"])
def test_every_question_about_the_samples_batched(folders: dict[str, str], form: str) -> None:
    with Engine(*load(folders[form], "float32")) as engine:
        requests = [engine.submit([message(row["question"], row["image"])], GREEDY) for row in ANSWERS]
        for row, request in zip(ANSWERS, requests, strict=True):
            reply = request.result()
            if row["answer"].startswith("["):
                (box,) = reply.boxes
                assert box.label == json.loads(row["answer"])[0]["label"]
                assert overlap(corners(box), true_box(row["image"], row["question"])) > 0.5
            else:
                assert reply.text == row["answer"], row


@pytest.mark.parametrize("form", ["8 bits", "4 bits"])
def test_conversion_reports_how_well_the_answers_are_known(folders: dict[str, str], form: str) -> None:
    report = json.loads((Path(folders[form]) / "quality.json").read_text(encoding="utf-8"))["behaviour"]
    before, after = report["before"], report["after"]
    assert after["accuracy"] > 0.9  # coordinates of boxes may be one step beside the true ones
    assert after["likelihood"] == pytest.approx(before["likelihood"], abs=0.05)
    assert after["likelihood"] != before["likelihood"]
    assert f"(source {before['likelihood']:.4f})" in (Path(folders[form]) / "README.md").read_text(
        encoding="utf-8"
    )


def test_generate_answers_and_draws_the_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, question, drawn = SAMPLES / "shapes-3.png", "Where is the red star?", tmp_path / "drawn.png"
    options = ["--prompt", question, "--boxes", str(drawn), "--dtype", "float32", "--device", "cpu"]
    assert generate(["--model", "demo", "--image", str(picture), *options]) == 0
    assert '"label": "red star"' in capsys.readouterr().out
    with Image.open(picture) as plain, Image.open(drawn) as marked:
        before, after = (np.asarray(opened.convert("RGB"), int) for opened in (plain, marked))
    changed = np.argwhere(np.abs(after - before).sum(-1) > 60)
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    assert overlap((left, top, right, bottom), true_box("shapes-3.png", question)) > 0.5


def test_a_second_question_uses_what_was_read(engine: Engine) -> None:
    messages = [message("How many shapes are there?", "shapes-4.png")]
    first = engine.generate(messages, GREEDY)
    messages += [{"role": "assistant", "content": first.text}, message("What are they?")]
    second = engine.generate(messages, GREEDY)
    assert first.text == "There are three shapes."
    assert second.text == "A blue square, a green square and a green circle."
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    other = engine.generate([message("What colour is the circle?", "shapes-4.png")], GREEDY)
    assert other.text == "The circle is green."
    assert other.usage.cached_tokens > 16  # the picture


@pytest.mark.parametrize(
    ("pictures", "question", "answer"),
    [
        (("shapes-2.png", "shapes-3.png"), "Which picture has more shapes?", "The first picture."),
        (("shapes-3.png", "shapes-1.png"), "Which picture has more shapes?", "The second picture."),
        (("shapes-1.png", "shapes-4.png"), "哪张图片的形状更多？", "一样多。"),
        (("shapes-1.png", "shapes-3.png"), "Which picture shows a red star?", "The second picture."),
        (("shapes-3.png", "shapes-1.png"), "哪张图片有红色星形？", "第一张图片。"),
        (
            ("shapes-3.png", "shapes-2.png"),
            "How many shapes are in the second picture?",
            "There are four shapes.",
        ),
    ],
)
def test_two_pictures(engine: Engine, pictures: tuple[str, str], question: str, answer: str) -> None:
    assert engine.generate([message(question, *pictures)], GREEDY).text == answer


@pytest.mark.parametrize(
    ("step", "question", "answer"),
    [
        ((20, 0), "Which way did the shape move?", "It moved right."),
        ((-20, 0), "形状往哪个方向移动？", "向左。"),
        ((0, 20), "Which way did the shape move?", "It moved down."),
        ((0, -20), "形状往哪个方向移动？", "向上。"),
    ],
)
def test_a_video(engine: Engine, step: tuple[int, int], question: str, answer: str) -> None:
    frames = []
    for n in range(4):
        frames.append(Image.new("RGB", (160, 160), (245, 245, 250)))
        x, y = 65 + step[0] * (n - 1.5), 65 + step[1] * (n - 1.5)
        ImageDraw.Draw(frames[-1]).ellipse((x, y, x + 40, y + 40), fill=(212, 42, 42))
    parts = [{"type": "video", "video": frames, "fps": 2}, {"type": "text", "text": question}]
    assert engine.generate([{"role": "user", "content": parts}], GREEDY).text == answer


@pytest.mark.parametrize("question", ["Who are you?", "你是谁？"])
def test_it_never_claims_to_be_a_release(engine: Engine, question: str) -> None:
    told = engine.generate([message(question)], GREEDY).text
    assert "qwenvl-mlx" in told
    assert "not a Qwen release" in told or "不是Qwen的正式版本" in told
    assert "not a Qwen release" in (SAMPLES.parent / "README.md").read_text(encoding="utf-8").replace("*", "")


def test_the_terminal_chat() -> None:
    lines = f"{SAMPLES / 'shapes-3.png'} 图中有什么？\n圆形是什么颜色？\n"
    command = [sys.executable, "-m", "qwenvl_mlx.chat", "--model", "demo", "--device", "cpu", "--temp", "0"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "红色星形和绿色圆形。" in done.stdout
    assert "圆形是绿色的。" in done.stdout


def test_the_server_with_the_openai_client(engine: Engine) -> None:
    shelf = Shelf([Offer("demo", "demo")], lambda source: Kept(engine))
    shelf.preload()
    picture = base64.b64encode((SAMPLES / "number-2.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "What number is shown?"},
    ]
    with serving(shelf) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        messages: list[Any] = [{"role": "user", "content": parts}]
        done = client.chat.completions.create(model="demo", messages=messages, temperature=0)
        assert done.choices[0].message.content == "The number is 863."
        pieces = client.chat.completions.create(model="demo", messages=messages, temperature=0, stream=True)
        told = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert told == "The number is 863."


def test_info_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    assert "--model demo" in capsys.readouterr().out


def test_the_checkpoint_is_small() -> None:
    files = [path for path in SAMPLES.parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert len(list(SAMPLES.glob("*.png"))) == 6
