"""Pictures and videos in requests, boxes in answers."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from openai import OpenAI
from serving import (
    IMAGES,
    chat,
    data_uri,
    file_server,
)


def prompt_tokens(client: OpenAI, *parts: dict[str, Any], **fields: Any) -> int:
    content = [*parts, {"type": "text", "text": "?"}]
    tokens = chat(
        client, messages=[{"role": "user", "content": content}], max_tokens=1, **fields
    ).usage.prompt_tokens
    return int(tokens)


def test_all_forms_of_a_picture_are_one(client: OpenAI) -> None:
    uri = data_uri("photo_333x217.jpg")
    with file_server(IMAGES) as pictures:
        forms: list[dict[str, Any]] = [
            {"type": "image", "image": uri},
            {"type": "image_url", "image_url": uri},
            {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
            {"type": "image_url", "image_url": {"url": f"{pictures}/photo_333x217.jpg"}},
        ]
        counts = {prompt_tokens(client, form) for form in forms}
    assert len(counts) == 1
    assert counts.pop() > prompt_tokens(client) + 50


def test_low_detail_and_pixel_limits_make_pictures_smaller(client: OpenAI) -> None:
    def picture(**more: Any) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": data_uri("big_1600x1200.jpg"), **more}}

    large = {"extra_body": {"max_pixels": 600_000}}
    whole = prompt_tokens(client, picture(), **large)
    assert prompt_tokens(client, picture(detail="low"), **large) < whole
    assert prompt_tokens(client, picture(), extra_body={"max_pixels": 100_000}) < whole
    assert prompt_tokens(client, picture(detail="low")) == prompt_tokens(
        client, picture()
    )  # small by default
    small = {"type": "image", "image": data_uri("tiny_5x7.png")}
    larger = prompt_tokens(client, small, extra_body={"min_pixels": 100_000})
    assert larger > prompt_tokens(client, small)
    assert prompt_tokens(client, {**small, "min_pixels": 100_000}) == larger


def test_several_pictures_over_several_turns(client: OpenAI) -> None:
    picture = {"type": "image", "image": data_uri("rgb_97x61.png")}
    one = prompt_tokens(client, picture)
    turns = [
        {"role": "user", "content": [picture, picture]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [picture, {"type": "text", "text": "?"}]},
    ]
    text = prompt_tokens(client)
    many = chat(client, messages=turns, max_tokens=1).usage.prompt_tokens
    assert many > text + 3 * (one - text)


def test_videos_as_frames_and_as_a_file(client: OpenAI) -> None:
    pytest.importorskip("av", reason="videos need the extra 'video'")
    frame = data_uri("rgb_97x61.png")
    two = prompt_tokens(client, {"type": "video", "video": [frame] * 2})
    six = prompt_tokens(client, {"type": "video", "video": [frame] * 6})
    assert six > two
    clip = base64.b64encode((IMAGES / "clip_96x64_16fps.mp4").read_bytes()).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}}
    few = prompt_tokens(client, part, extra_body={"fps": 2})
    assert prompt_tokens(client, part, extra_body={"fps": 8}) > few


def test_boxes_come_in_source_pixels(told: OpenAI) -> None:
    picture = {"type": "image", "image": data_uri("rgb_97x61.png")}
    text = "say:<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,200),(500,1000)<|box_end|>"
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]
    expected = [{"points": [[9, 12], [48, 61]], "label": "dog", "image": 0}]
    message = chat(told, messages=messages, max_tokens=99).choices[0].message
    assert message.model_extra["boxes"] == expected
    *_, last = chat(told, messages=messages, max_tokens=99, stream=True)
    assert last.choices[0].delta.model_extra["boxes"] == expected
