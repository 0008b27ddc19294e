"""Text becomes the ids of transformers, from every kind of tokenizer files, and ids the text, streamed or whole."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import reference

from qwenvl_mlx.errors import CheckpointError
from qwenvl_mlx.processor.hf_tokenizer import HFTokenizer

FAMILIES = {
    "qwen2_vl": "qwen2_bpe",
    "qwen2_5_vl": "qwen2_bpe",
    "qwen3_vl_instruct": "qwen2_bpe",
    "qwen3_vl_thinking": "qwen2_bpe",
    "qwen3_5": "qwen3_5_tiktoken",
}


@pytest.fixture(scope="module", params=FAMILIES)
def real(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real vocabulary as a checkpoint carries it, and its goldens."""
    folder = tmp_path_factory.mktemp(request.param)
    for source in (shared / "tokenizers" / request.param, shared / "tokenizers" / FAMILIES[request.param]):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    goldens = json.loads((shared / f"tokenizers/goldens/{request.param}.json").read_text())
    return HFTokenizer.from_folder(folder), goldens


def test_ids_and_text_equal_the_goldens(real: Any) -> None:
    tokenizer, goldens = real
    for golden in goldens["raw_text"]:
        assert tokenizer.encode(golden["text"]) == golden["ids"], golden["text"]
        assert tokenizer.decode(golden["ids"], skip_special=False) == golden["decoded"]
        assert tokenizer.decode(golden["ids"]) == golden["decoded_skip_special"]


def test_conversations_equal_the_goldens(real: Any) -> None:
    tokenizer, goldens = real
    for golden in goldens["conversations"]:
        assert tokenizer.encode(golden["prompt"]) == golden["ids"], golden["name"]


def test_streamed_text_is_the_whole_text(real: Any) -> None:
    tokenizer, goldens = real
    for golden in goldens["raw_text"]:
        for skip, key in ((True, "decoded_skip_special"), (False, "decoded")):
            streamed = tokenizer.detokenizer(skip_special=skip)
            pieces = [streamed.add(token) for token in golden["ids"]] + [streamed.finish()]
            assert "".join(pieces) == golden[key]


@pytest.fixture
def tiny() -> Path:
    """ids 0-255 are the bytes, special tokens follow."""
    return reference("qwen3_vl/tiny")


def test_vocabulary_and_merges_give_the_same_as_tokenizer_json(tiny: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path)
    text = "<|im_start|>naïve ﬁ 你好 <think>x</think><|im_end|>"
    assert HFTokenizer.from_folder(tmp_path).encode(text) == HFTokenizer.from_folder(tiny).encode(text)


def test_older_added_tokens_file(tiny: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text(
        '{"<|endoftext|>": 256, "<|im_start|>": 257, "<tool_call>": 258}'
    )
    tokenizer = HFTokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|im_start|>a<tool_call>") == [257, 97, 258]
    assert tokenizer.decode([257, 97, 258]) == "a<tool_call>"


def test_other_threads_run_while_a_long_text_is_cut(tiny: Path) -> None:
    tokenizer = HFTokenizer.from_folder(tiny)
    worker = threading.Thread(target=tokenizer.encode, args=["日" * 300_000])
    began = last = time.perf_counter()
    longest = 0.0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert longest < (last - began) / 2


def test_places_stay_in_a_streamed_answer(tiny: Path) -> None:
    tokenizer = HFTokenizer.from_folder(tiny)
    ids = tokenizer.encode(
        "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|im_end|>"
    )
    streamed = tokenizer.detokenizer()
    text = "".join(map(streamed.add, ids)) + streamed.finish()
    assert text == "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    assert tokenizer.decode(ids) == "a cat(1,2),(3,4)"


def test_half_a_character_is_held_back(tiny: Path) -> None:
    tokenizer = HFTokenizer.from_folder(tiny)
    streamed = tokenizer.detokenizer()
    pieces = [streamed.add(token) for token in tokenizer.encode("é😀")]
    assert [piece for piece in pieces if piece] == ["é", "😀"]
    assert streamed.add(tokenizer.encode("é")[0]) == ""
    assert streamed.finish() == "\N{REPLACEMENT CHARACTER}"


def test_nothing_that_a_model_may_sample_raises(tiny: Path) -> None:
    tokenizer = HFTokenizer.from_folder(tiny)
    assert tokenizer.decode([97, 287, 10**6, 98]) == "ab"
    streamed = tokenizer.detokenizer()
    assert [streamed.add(token) for token in (287, 10**6, 97)] == ["", "", "a"]


def test_lone_surrogates_do_not_raise(tiny: Path) -> None:
    tokenizer = HFTokenizer.from_folder(tiny)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"


def test_damaged_files(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        HFTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(CheckpointError, match="fetch it again"):
        HFTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no vocabulary"):
        HFTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    shutil.copy(tiny / "vocab.json", tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such\n")
    with pytest.raises(CheckpointError, match=r"does not fit vocab\.json"):
        HFTokenizer.from_folder(tmp_path)


def test_added_tokens_that_do_not_fit_the_vocabulary(tiny: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 400}')
    with pytest.raises(CheckpointError, match="should be token 400"):
        HFTokenizer.from_folder(tmp_path)
