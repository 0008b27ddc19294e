"""Messages and media become the reference's ids, rows and grids, for every later generation."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from PIL import Image, ImageOps

from qwenvl_mlx.errors import CheckpointError, ConfigError, MediaError, PromptError
from qwenvl_mlx.media import Media
from qwenvl_mlx.processor import hf
from qwenvl_mlx.processor.base import Box, MediaOptions
from qwenvl_mlx.processor.hf import HFProcessor
from qwenvl_mlx.processor.load import load_processor
from qwenvl_mlx.processor.patches import normalised_rows

FOLDERS = {
    "qwen2_vl": "tiny-hub",
    "qwen2_5_vl": "tiny-hub",
    "qwen3_vl": "tiny",
    "qwen3_vl_moe": "tiny",
    "qwen3_5": "tiny",
    "qwen3_5_moe": "tiny-hub",
}
CASES = (
    "text",
    "image1",
    "image3",
    "video",
    "video_flat",
    "image_video",
    "video_image_video",
    "batch_mixed",
    "batch_text",
)
LACKING = {  # cases that the reference did not compute for a generation
    "qwen2_vl": ["video_flat"],
    "qwen2_5_vl": ["video_flat"],
    "qwen3_vl": [],
    "qwen3_vl_moe": ["video_image_video"],
    "qwen3_5": ["video_image_video"],
    "qwen3_5_moe": ["video", "video_flat", "image_video", "video_image_video", "batch_text"],
}
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
RED = Image.new("RGB", (64, 64), "red")


def _processor(folder: Path, **options: Any) -> HFProcessor:
    return HFProcessor.from_folder(folder, json.loads((folder / "config.json").read_text()), **options)


@pytest.fixture
def qwen3() -> HFProcessor:
    return _processor(reference("qwen3_vl/tiny"))


@pytest.fixture
def chat(shared: Path) -> HFProcessor:
    """With its chat template."""
    return _processor(shared / "qwen3_vl/tiny")


@pytest.mark.parametrize(
    ("generation", "case"),
    [(generation, case) for generation in FOLDERS for case in CASES if case not in LACKING[generation]],
)
def test_prompts_equal_the_goldens(generation: str, case: str) -> None:
    golden = json.loads(reference(f"{generation}/goldens/cases.json").read_text())[case]
    arrays = np.load(reference(f"{generation}/goldens/{case}.npz"))
    processor = _processor(
        reference(f"{generation}/{FOLDERS[generation]}"), nested_timestamps=case != "video_flat"
    )
    media: list[Media] = []
    empty: list[list[str]] = [[]] * len(golden["prompts"])
    rows = zip(golden["prompts"], golden["images"], golden.get("videos", empty), strict=True)
    for row, (text, images, videos) in enumerate(rows):
        prompt = processor.raw(text, _parts(text, iter(images), iter(videos)))
        assert prompt.input_ids == arrays["input_ids"][row][arrays["attention_mask"][row] > 0].tolist()
        media += prompt.media
    _same(
        arrays, "pixel_values", "image_grid_thw", [item for item in media if item.kind == "image"], atol=4e-7
    )
    videos = [item for item in media if item.kind == "video"]
    if (
        case != "video_flat"
    ):  # stored once, in the case video; torchvision's resize differs from Pillow's by 1 level
        _same(arrays, "pixel_values_videos", "video_grid_thw", videos, atol=0.0151)
    if "second_per_grid_ts" in arrays:
        assert [item.seconds_per_grid for item in videos] == pytest.approx(
            arrays["second_per_grid_ts"].tolist()
        )


def _parts(text: str, images: Any, videos: Any) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for kind in re.findall(r"<\|(image|video)_pad\|>", text):
        if kind == "image":
            with Image.open(reference(f"images/{next(images)}")) as image:
                parts.append({"type": "image", "image": ImageOps.exif_transpose(image).convert("RGB")})
        else:
            stored = np.load(reference(f"images/{next(videos)}.npz"))
            parts.append({"type": "video", "video": stored["frames"], "fps": float(stored["fps"])})
    return parts


def _same(arrays: Any, pixels: str, grids: str, media: list[Media], *, atol: float) -> None:
    assert [list(item.grid) for item in media] == (arrays[grids].tolist() if grids in arrays else [])
    if media:
        ours = np.concatenate([normalised_rows(item) for item in media])
        np.testing.assert_allclose(ours, arrays[pixels], rtol=0, atol=atol)


def test_messages_with_every_form_of_a_picture(chat: HFProcessor, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    RED.save(path)
    forms = [
        {"type": "image", "image": str(path)},
        {"type": "image", "image": RED},
        {"type": "image", "image": np.asarray(RED)},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"image": str(path)},
    ]
    prompts = [chat([{"role": "user", "content": [form, {"type": "text", "text": "?"}]}]) for form in forms]
    assert len({tuple(prompt.input_ids) for prompt in prompts}) == 1
    assert len({prompt.media[0].digest for prompt in prompts}) == 1
    assert prompts[0].input_ids.count(chat.tokenizer.id("<|image_pad|>")) == 4


def test_template_variables_and_tools(chat: HFProcessor) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": RED}]}]
    text = chat.tokenizer.decode(
        chat(messages, template={"add_vision_id": True}).input_ids, skip_special=False
    )
    assert "Picture 1: <|vision_start|>" in text
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {}}}]
    assert '{"name": "zoom", "parameters": {}}' in chat.tokenizer.decode(
        chat(messages, tools=tools).input_ids
    )
    closed = chat(messages, template={"add_generation_prompt": False})
    assert chat.tokenizer.decode(closed.input_ids, skip_special=False).endswith("<|im_end|>\n")


def test_times_of_a_video_flat_and_nested(chat: HFProcessor) -> None:
    part = {"type": "video", "video": np.zeros((3, 64, 64, 3), np.uint8), "fps": 2.0}
    group = f"<|vision_start|>{'<|video_pad|>' * 4}<|vision_end|>"
    flat, nested = (
        chat.tokenizer.decode(
            chat(
                [{"role": "user", "content": [part, "?"]}], template={"nested_timestamps": nested}
            ).input_ids,
            skip_special=False,
        )
        for nested in (False, True)
    )
    assert f"user\n<0.2 seconds>{group}<1.0 seconds>{group}?" in flat
    assert f"user\n<|vision_start|><0.2 seconds>{group}<1.0 seconds>{group}<|vision_end|>?" in nested


def test_request_and_part_limits(qwen3: HFProcessor) -> None:
    photo = {"type": "image", "image": Image.new("RGB", (640, 480))}
    few = qwen3.raw(IMAGE, [photo], options=MediaOptions(max_pixels=8192)).media[0]
    assert few.grid[1] * few.grid[2] * 256 <= 8192
    own = qwen3.raw(IMAGE, [{**photo, "max_pixels": 16384}], options=MediaOptions(max_pixels=8192)).media[0]
    assert 8192 < own.grid[1] * own.grid[2] * 256 <= 16384


def test_frames_a_second_of_a_request(qwen3: HFProcessor) -> None:
    part = {"type": "video", "video": str(reference("images/clip_96x64_16fps.mp4"))}
    assert qwen3.raw(VIDEO, [part]).media[0].grid[0] == 3
    assert qwen3.raw(VIDEO, [part], options=MediaOptions(fps=4)).media[0].grid[0] == 6
    assert qwen3.raw(VIDEO, [{**part, "fps": 4, "max_frames": 8}]).media[0].grid[0] == 4
    assert qwen3.raw(VIDEO, [{**part, "nframes": 10}]).media[0].grid[0] == 5


def test_ready_media_pass_through(qwen3: HFProcessor) -> None:
    ready = qwen3.raw(IMAGE, [{"type": "image", "image": RED}]).media[0]
    assert qwen3.raw(f"{IMAGE}{IMAGE}", [ready, {"type": "image", "image": RED}]).media[0] is ready


def test_pictures_are_decoded_side_by_side(qwen3: HFProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures wait for each other: one after the other they would wait for ever."""
    both = threading.Barrier(2, timeout=20)

    def load(source: Any, **_: Any) -> Image.Image:
        both.wait()
        return source

    monkeypatch.setattr(hf, "load_image", load)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    other = Image.new("RGB", (96, 64), "blue")
    prompt = qwen3.raw(f"{IMAGE}{IMAGE}", [{"image": RED}, {"image": other}])
    assert [item.source_size for item in prompt.media] == [(64, 64), (96, 64)]


def test_one_lazy_image_given_twice(qwen3: HFProcessor) -> None:
    with Image.open(reference("images/big_1600x1200.jpg")) as image:
        prompt = qwen3.raw(IMAGE * 6, [{"image": image}] * 6)
    assert len({item.digest for item in prompt.media}) == 1


@pytest.mark.parametrize(
    ("text", "parts", "cure"),
    [
        ("no place", [{"image": RED}], "no media but 1 media"),
        (f"{IMAGE}{IMAGE}", [{"image": RED}], "2 media"),
        (VIDEO, [{"image": RED}], r"\(video\) but 1 media \(image\)"),
        (IMAGE, [{"type": "image"}], 'give it as "image"'),
        (IMAGE, [{"type": "audio"}], "not known"),
        (IMAGE, [{"image": RED, "max_pixels": -1}], "above 0"),
        (IMAGE, [{"image": RED, "max_pixels": 10, "min_pixels": 20}], "swap them"),
        (IMAGE, [{"image": Image.new("RGB", (2001, 10))}], "crop it"),
        (
            VIDEO,
            [{"video": str(reference("images/clip_96x64_16fps.mp4")), "nframes": 10**9}],
            "1 to max_frames",
        ),
    ],
)
def test_what_does_not_fit(qwen3: HFProcessor, text: str, parts: list[Any], cure: str) -> None:
    with pytest.raises(PromptError, match=cure):
        qwen3.raw(text, parts)


def test_a_typed_placeholder_is_told(chat: HFProcessor) -> None:
    with pytest.raises(PromptError, match="in the same order"):
        chat([{"role": "user", "content": "what is <|image_pad|>?"}])


def test_too_much_for_the_context(qwen3: HFProcessor) -> None:
    small = replace(qwen3, context_length=40)
    with pytest.raises(PromptError, match="takes 40: send fewer"):
        small.raw(IMAGE * 30, [{"image": RED}] * 30)
    with pytest.raises(PromptError, match="takes 40"):
        small.raw("a" * 41)
    with pytest.raises(MediaError, match="takes 40: lower fps"):
        small.raw(VIDEO, [{"type": "video", "video": np.zeros((200, 64, 64, 3), np.uint8)}])
    small.raw("a" * 40)


def test_where_an_answer_ends() -> None:
    qwen2, qwen35 = (_processor(reference(name)) for name in ("qwen2_vl/tiny-hub", "qwen3_5/tiny"))
    assert qwen2.defaults.eos_token_ids == {256, 258}
    assert qwen35.defaults.eos_token_ids == {256, 258}  # config.json has only the first
    assert (qwen2.defaults.temperature, qwen2.defaults.top_k) == (0.01, 1)
    assert qwen2.context_length == 32768


def test_boxes_are_in_pixels_of_the_source() -> None:
    picture = {"image": Image.new("RGB", (200, 100))}
    answer = '```json\n[{"bbox_2d": [50, 25, 100, 50], "label": "cat"}]\n```'
    qwen3 = _processor(reference("qwen3_vl/tiny"))
    assert qwen3.boxes(answer, qwen3.raw(IMAGE, [picture])) == [Box(((10, 2), (20, 5)), "cat", 0)]
    qwen25 = replace(_processor(reference("qwen2_vl/tiny-hub")), generation="qwen2_5_vl")
    prompt = qwen25.raw(f"{IMAGE}{IMAGE}", [{"image": RED}, picture])
    assert prompt.media[1].grid == (1, 8, 14)  # 196x112: what the coordinates count in
    assert qwen25.boxes(answer, prompt) == [Box(((51, 22), (102, 44)), "cat", 1)]
    assert qwen25.boxes(answer, qwen25.raw("no picture")) == []
    qwen2 = replace(qwen25, generation="qwen2_vl")
    assert qwen2.boxes("<|box_start|>(500,500),(750,1000)<|box_end|>", prompt) == [
        Box(((100, 50), (150, 100)), None, 1)
    ]


def test_an_answer_that_starts_inside_a_thought(qwen3: HFProcessor) -> None:
    thinking = qwen3.splitter(qwen3.raw("<|im_start|>assistant\n<think>\n"))
    assert [piece.kind for piece in thinking.add("because</think>\n\nso")] == ["reasoning", "content"]
    plain = qwen3.splitter(qwen3.raw("<|im_start|>assistant\n<think>\n\n</think>\n\n"))
    assert [piece.kind for piece in plain.add("so")] == ["content"]


def test_unknown_and_unfit_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llava"):
        load_processor(tmp_path, {"model_type": "llava"})
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"lacks <\|vision_start\|>"):
        load_processor(tmp_path, {"model_type": "qwen2_vl"})


def test_ready_made_mlx_folders_load(shared: Path) -> None:
    """Their processor_config.json names Qwen3-VL's classes for every generation: config.json decides."""
    for folder in sorted((shared / "mlx_folders").iterdir()):
        if folder.is_dir():
            processor = _processor(folder)
            assert processor.video_rules.timed == folder.name.startswith(("q3-", "q3moe", "q35"))
            assert processor([{"role": "user", "content": [{"image": RED}, "?"]}]).media
