"""The original Qwen-VL's tokenizer gives the reference's ids and texts, with the real vocabulary and with tiny ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import reference

from qwenvl_mlx.errors import CheckpointError, PromptError
from qwenvl_mlx.processor.qwen_tokenizer import CONTROLS, IMAGE_TAGS, SPECIALS, QwenTokenizer, tokenizer_json

RANKS = 151643


def golden(name: str) -> Any:
    return json.loads(reference(f"qwen_vl/goldens/{name}.json").read_text(encoding="utf-8"))


def spread(ids: list[int | list[int]]) -> list[int]:
    """Run-length pairs [id, n] written out."""
    return [one for item in ids for one in ([item[0]] * item[1] if isinstance(item, list) else [item])]


def real_vocabulary() -> Path:
    """qwen.tiktoken beside the checkout, or the copy that the package dashscope carries."""
    try:
        return reference("qwen_vl/tokenizer/qwen.tiktoken")
    except pytest.skip.Exception:
        resources = pytest.importorskip("dashscope.resources", reason="needs Qwen's vocabulary")
        return Path(resources.__path__[0]) / "qwen.tiktoken"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> QwenTokenizer:
    """From a tokenizer.json as ``convert`` stores it."""
    folder = tmp_path_factory.mktemp("mlx")
    (folder / "tokenizer.json").write_text(tokenizer_json(real_vocabulary()), encoding="utf-8")
    return QwenTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def tiny() -> QwenTokenizer:
    """From a PyTorch folder: the first 420 ranks."""
    return QwenTokenizer.from_folder(reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32"))


def test_every_text_encodes_as_in_the_reference(real: QwenTokenizer) -> None:
    for case in golden("tokenizer_encode"):
        if "error" in case:
            for encode in (real.encode, real.encode_content):
                with pytest.raises(PromptError):
                    encode(case["text"])
            continue
        ids = spread(case["ids"])
        assert real.encode(case["text"]) == ids, case["text"]
        assert real.encode_content(case["text"]) == spread(case.get("ids_content", case["ids"])), case["text"]
        for skip, error, text in (
            (False, "decode_error", "decoded"),
            (True, "decode_skip_error", "decoded_skip_special"),
        ):
            if error in case:
                with pytest.raises(PromptError):
                    real.decode(ids, skip_special=skip)
            else:
                assert real.decode(ids, skip_special=skip) == case.get(text, case["text"])


def test_every_list_of_ids_decodes_as_in_the_reference(real: QwenTokenizer) -> None:
    for case in golden("tokenizer_decode"):
        given = case["kwargs"]
        options = {
            "skip_special": given.get("skip_special_tokens", False),
            "keep_tags": given.get("keep_image_special", False),
            "errors": given.get("errors", "replace"),
        }
        if "error" in case:
            with pytest.raises(PromptError):
                real.decode(spread(case["ids"]), **options)
        else:
            assert real.decode(spread(case["ids"]), **options) == case["text"], case


def test_special_ids_follow_the_ranks(real: QwenTokenizer, tiny: QwenTokenizer) -> None:
    names = golden("special_tokens")
    assert list(names) == list(SPECIALS)
    assert {name: real.id(name) for name in SPECIALS} == names
    assert {name: tiny.id(name) for name in SPECIALS} == {name: n - RANKS + 420 for name, n in names.items()}
    assert [tiny.id(name) for name in ("<|im_start|>", "<img>", "<imgpad>")] == [421, 634, 636]
    assert tiny.id("word") is None


def test_streamed_text_grows_as_in_the_reference(real: QwenTokenizer) -> None:
    for case in golden("chat_stream_decode"):
        detokenizer, text = real.detokenizer(), ""
        for token, expected in zip(case["ids"], case["texts"], strict=True):
            text += detokenizer.add(token)
            assert text == expected
        assert detokenizer.finish() == ""


def test_a_stream_of_any_tokens_equals_the_whole(tiny: QwenTokenizer) -> None:
    rng = random.Random(0)
    controls = {tiny.id(name) for name in CONTROLS}
    images = {tiny.id(name) for name in ("<img>", "</img>", "<imgpad>")}
    for skipped, skip_special in ((controls, True), (images, False)):
        for _ in range(100):
            ids = [rng.randrange(637) for _ in range(40)]
            whole = tiny.decode([n for n in ids if n not in skipped], skip_special=False)
            detokenizer = tiny.detokenizer(skip_special=skip_special)
            fed = ids if skip_special else [n for n in ids if n not in images]
            assert "".join(map(detokenizer.add, fed)) + detokenizer.finish() == whole


def test_streamed_answers_equal_those_of_the_references_chat(tiny: QwenTokenizer) -> None:
    """The reference drops the last token of an answer that did not end by itself, and strips."""
    for case in golden("chat_tiny_chat"):
        if "error" in case:
            continue
        ids = case["generated_ids"]
        ended = tiny.im_end in ids
        detokenizer = tiny.detokenizer()
        text = "".join(map(detokenizer.add, ids if ended else ids[:-1])) + detokenizer.finish()
        assert text.strip() == case["response"]


def test_nothing_that_a_model_may_sample_breaks_a_stream(tiny: QwenTokenizer) -> None:
    detokenizer = tiny.detokenizer(skip_special=False)
    ids = [
        tiny.id("<img>"),
        639,
        10**6,
        tiny.id("<imgpad>"),
        -1,
        64,
    ]  # unclosed, padding rows, no token at all
    assert "".join(map(detokenizer.add, ids)) == "<img><imgpad>a"


def test_typed_control_tokens_are_plain_text_in_contents(tiny: QwenTokenizer) -> None:
    controls = [name for name in SPECIALS if name not in IMAGE_TAGS]
    for name in controls:
        ids = tiny.encode_content(f"a{name}b")
        assert max(ids) < tiny.end_of_text
        assert tiny.decode(ids) == f"a{name}b"
        assert tiny.encode(f"a{name}b")[1] == tiny.id(name)


def test_lone_surrogates_become_replacement_characters(tiny: QwenTokenizer) -> None:
    assert tiny.encode("a\ud83d b") == tiny.encode("a\ufffd b")
    assert tiny.encode("\ud83d\ude00") == tiny.encode("😀")


@pytest.mark.parametrize("slots", [16, 256])
def test_slots_of_a_picture(slots: int) -> None:
    tokenizer = QwenTokenizer.from_folder(
        reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32"), image_slots=slots
    )
    start, end, pad = (tokenizer.id(name) for name in ("<img>", "</img>", "<imgpad>"))
    assert tokenizer.encode("<img>图</img>") == [start, *"图".encode(), *[pad] * (slots - 3), end]
    assert len(tokenizer.encode(f"<img>{'x' * slots}</img>")) == slots + 2
    with pytest.raises(PromptError, match="bytes"):
        tokenizer.encode(f"<img>{'x' * (slots + 1)}</img>")


def test_stored_and_derived_tokenizers_are_one(tmp_path: Path, tiny: QwenTokenizer) -> None:
    ranks = reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32/qwen.tiktoken")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(ranks), encoding="utf-8")
    stored = QwenTokenizer.from_folder(tmp_path)
    for text in ("The history of the world 图片 <ref>a</ref>", "<|im_start|>user\n  x\r\n\n"):
        assert stored.encode(text) == tiny.encode(text)
        assert stored.decode(stored.encode(text), skip_special=False) == text


def damaged() -> Iterator[Any]:
    ranks = reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32/qwen.tiktoken").read_bytes()
    lines = ranks.splitlines()
    yield pytest.param("qwen.tiktoken", ranks[:900], "qwen.tiktoken", id="truncated")
    yield pytest.param("qwen.tiktoken", b"\n".join(lines[:300] + lines[301:]), "gaps", id="line missing")
    yield pytest.param("qwen.tiktoken", b"<html>", "qwen.tiktoken", id="web page")
    yield pytest.param("tokenizer.json", b'{"version": ', "tokenizer.json", id="half json")
    yield pytest.param("other", b"", "qwen.tiktoken is missing", id="missing")


@pytest.mark.parametrize(("name", "content", "says"), damaged())
def test_a_damaged_vocabulary_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        QwenTokenizer.from_folder(tmp_path)
