"""The public functions on real tiny checkpoints: greedy answers are the reference's, alone and in a crowd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden import CLEAR, Case
from helpers import reference

from qwenvl_mlx import Engine, Prompt, generate, load, load_model, stream
from qwenvl_mlx.engine import EngineOptions, FinishEvent, GenerationOptions
from qwenvl_mlx.errors import GenerationError, PromptError

FOLDERS = {"qwen2_vl": "tiny-hub", "qwen3_vl": "tiny", "qwen3_5": "tiny"}
CASES = ["text", "image1", "image_video", "batch_mixed"]


@pytest.fixture(scope="module", params=FOLDERS)
def loaded(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    model, processor = load(reference(f"{request.param}/{FOLDERS[request.param]}"), dtype="float32")
    return request.param, model, processor


def goldens(generation: str, model: Any) -> list[tuple[Prompt, list[int]]]:
    """Prompts with the reference's greedy tokens, as far as its choices are clear."""
    found = []
    for name in CASES:
        case = Case.load(generation, name)
        for row, prompt in enumerate(case.prompts(model)):
            unclear = (case["greedy_gap"][row] < CLEAR).nonzero()[0]
            count = int(unclear[0]) if len(unclear) else len(case["greedy"][row])
            found.append((prompt, case["greedy"][row][:count].tolist()))
    return found


def test_generate_gives_the_references_tokens(loaded: tuple[str, Any, Any]) -> None:
    generation, model, processor = loaded
    for prompt, wanted in goldens(generation, model):
        reply = generate(model, processor, prompt, max_tokens=len(wanted), temperature=0.0, ignore_eos=True)
        assert reply.tokens == wanted


@pytest.mark.parametrize("kind", ["cold", "remembered"])
def test_together_they_are_the_same(loaded: tuple[str, Any, Any], kind: str) -> None:
    generation, model, processor = loaded
    work = goldens(generation, model)
    options = EngineOptions(prefill_chunk=24, cache_bytes=0 if kind == "cold" else 10**9)
    with Engine(model, processor, options) as engine:
        for turn in range(2):
            requests = [
                engine.submit(
                    prompt, GenerationOptions(max_tokens=len(wanted), temperature=0.0, ignore_eos=True)
                )
                for prompt, wanted in work
            ]
            replies = [request.result() for request in requests]
            assert [reply.tokens for reply in replies] == [wanted for _, wanted in work]
            if turn and kind == "remembered":
                assert sum(reply.usage.cached_tokens for reply in replies) > 0


def test_stream_ends_with_the_reply(loaded: tuple[str, Any, Any]) -> None:
    _, model, processor = loaded
    question = processor.raw("hello")
    *_, last = stream(model, processor, question, max_tokens=4, ignore_eos=True)
    assert isinstance(last, FinishEvent)
    assert last.reply.tokens == generate(model, processor, question, max_tokens=4, ignore_eos=True).tokens


def test_unknown_options_are_named(loaded: tuple[str, Any, Any]) -> None:
    _, model, processor = loaded
    with pytest.raises(GenerationError, match="topp"):
        generate(model, processor, processor.raw("hello"), topp=0.3)


def test_load_model_needs_no_tokenizer() -> None:
    model = load_model(reference("qwen3_vl/tiny"), dtype="bfloat16")
    assert model.context_length > 0


def test_a_prompt_needs_no_processor() -> None:
    folder = reference("qwen_vl/ckpt/tiny_hd128")  # has no tokenizer
    golden = np.load(reference("qwen_vl/goldens/model_tiny_hd128.npz"))
    model = load_model(folder, dtype="float32")
    ids = golden["text/ids"][0].tolist()
    reply = generate(model, None, Prompt(ids), max_tokens=32)
    assert reply.tokens == golden["text/greedy_ids"][0].tolist()
    assert reply.text == ""
    with pytest.raises(PromptError, match="no tokenizer"):
        generate(model, None, "Hello")
