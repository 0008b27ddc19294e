"""Rules that Qwen2-VL and every later generation share, on tiny random models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import reference
from mlx.utils import tree_flatten, tree_unflatten

from benchmarks.parity_table import DECODER, GENERATIONS, IDS, IMAGE, VIDEO, VISION, prompt, ready, rows
from qwenvl_mlx.api import load_model
from qwenvl_mlx.engine.together import read_together
from qwenvl_mlx.errors import ConfigError, MediaError, PromptError
from qwenvl_mlx.layers.batch import left_pad, text_batch
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.models import model_class
from qwenvl_mlx.models.mrope import MRopeModel


def config(generation: str, **changes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": generation,
        "text_config": {**DECODER[generation], **changes.get("text", {})},
        "vision_config": {**VISION[generation], **changes.get("vision", {})},
        **IDS,
    }


def build(generation: str, *, prepared: bool = True, **changes: Mapping[str, Any]) -> MRopeModel:
    """Random weights, the same for the same generation."""
    mx.random.seed(3)
    settings = config(generation, **changes)
    model = model_class(settings)(settings)
    assert isinstance(model, MRopeModel)
    noise = [
        (name, value + 0.1 * mx.random.normal(value.shape))
        for name, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(noise))
    if prepared:
        model.prepare()
    return model


@pytest.fixture(scope="module", params=GENERATIONS)
def model(request: pytest.FixtureRequest) -> MRopeModel:
    return build(request.param)


@pytest.fixture
def generation(model: MRopeModel) -> str:
    return type(model).__module__.rpartition(".")[2]


def mixed(model: MRopeModel, generation: str) -> Prompt:
    """A picture, a video and text around them."""
    picture, video = rows(generation, (1, 6, 8), "image", 1), rows(generation, (2, 4, 6), "video", 2)
    return prompt(model, [4, picture, 3, video, 6])


def close(ours: mx.array, theirs: mx.array, tolerance: float = 2e-4) -> bool:
    """float32 sums in another order; the random models' logits reach tens."""
    return bool(mx.abs(ours - theirs).max() < tolerance * max(1.0, float(mx.abs(theirs).max())))


def test_chunks_of_a_prompt_are_the_prompt(model: MRopeModel, generation: str) -> None:
    whole = ready(model, mixed(model, generation))
    cache = model.make_cache()
    parts = [model(whole.slice(a, b), cache) for a, b in ((0, 7), (7, 20), (20, len(whole)))]
    assert close(mx.concatenate(parts, axis=1), model(whole))
    assert cache.next_position.item() == len(whole) + whole.rope_delta


def test_last_only_is_the_last_of_all(model: MRopeModel, generation: str) -> None:
    """After what is cached and in padded rows too: where one query is left, masks lose their rows."""
    short, long = ready(model, Prompt([1, 2, 3, 4])), ready(model, mixed(model, generation))
    assert close(model(short, last_only=True), model(short)[:, -1:])
    answers = []
    for last_only in (False, True):
        cache = model.make_cache()
        model(long.slice(0, 7), cache, last_only=last_only)
        rest = model(long.slice(7, len(long)), cache, last_only=last_only)
        answers.append((rest[:, -1:], *cache.arrays))
    assert all(map(close, *answers))
    rows = [model(*left_pad([short, long], model.make_cache()), last_only=only) for only in (False, True)]
    assert rows[1].shape[1] == 1
    assert close(rows[0][:, -1:], rows[1])


def test_joined_sequences_decode_as_alone(model: MRopeModel, generation: str) -> None:
    """Sequences of different lengths and rope deltas, prefilled alone, then decoded together."""
    prompts = [Prompt([1, 2, 3]), mixed(model, generation)]
    caches = [model.make_cache() for _ in prompts]
    for one, cache in zip(prompts, caches, strict=True):
        model(ready(model, one), cache)
    together = Cache.merge(caches)
    tokens = mx.array([[5, 6], [7, 8]])
    batch = [model.decode(tokens[:, step : step + 1], together) for step in (0, 1)]
    for row, cache in enumerate(caches):
        alone = model.decode(tokens[row : row + 1], cache)  # two tokens in one pass
        assert close(mx.concatenate([step[row : row + 1] for step in batch], axis=1), alone)


def test_padding_changes_nothing(model: MRopeModel, generation: str) -> None:
    prompts = [Prompt([1, 2, 3]), mixed(model, generation), Prompt([9] * 11)]
    batch, cache = left_pad([ready(model, one) for one in prompts], model.make_cache())
    logits = model(batch, cache)
    after = model.decode(mx.array([[4], [5], [6]]), cache)
    for row, one in enumerate(prompts):
        state = model.make_cache()
        assert close(logits[row : row + 1, -len(one) :], model(ready(model, one), state))
        assert close(after[row : row + 1], model.decode(mx.array([[4 + row]]), state))


def test_texts_are_read_together_as_alone(model: MRopeModel, generation: str) -> None:
    """Some after what was read before, of different lengths: what is padded follows nothing."""
    if not model.make_cache().trimmable:
        pytest.skip("a recurrent state: such prompts are read alone")
    longer = mixed(model, generation)
    before, ids = [[], longer.input_ids[:3], []], [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [3, 4]]
    caches = [model.make_cache() for _ in ids]
    model(ready(model, longer), caches[1])
    caches[1].trim(len(longer) - 3)  # its rope delta is still that of the pictures
    logits, together = read_together(model, ids, caches)
    for row, (known, new) in enumerate(zip(before, ids, strict=True)):
        single, state = together.extract(row), model.make_cache()
        assert close(logits[row, -1], model(ready(model, Prompt(known + new)), state)[0, -1])
        for token in ([[4 + row]], [[1, 2]]):  # alone, and then together with a picture
            assert close(model.decode(mx.array(token), single), model.decode(mx.array(token), state))
        assert close(model(ready(model, longer), single), model(ready(model, longer), state))
    with pytest.raises(ValueError, match="no padding"):
        text_batch(caches, [0, 1, 0])


def test_frames_and_pictures_never_attend_to_each_other(model: MRopeModel, generation: str) -> None:
    video = rows(generation, (3, 4, 6), "video", 4)
    changed = np.array(video.patches)
    changed[24:48] += 1  # the second frame
    before, after = (model.encode([item])[0] for item in (video, replace(video, patches=changed, digest="")))
    tokens = len(before.embeddings) // 3
    for old, new in zip(
        (before.embeddings, *before.deepstack), (after.embeddings, *after.deepstack), strict=True
    ):
        same = mx.abs(old - new).max(axis=1) < 1e-6
        assert same.tolist() == [True] * tokens + [False] * tokens + [True] * tokens


def test_uint8_rows_and_stills_without_copies(model: MRopeModel, generation: str) -> None:
    patch = VISION[generation].get("patch_size", 14)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3, patch * patch), np.uint8)
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    scaled = (pixels / 255 - np.array(mean)[:, None]) / np.array(std)[:, None]
    full = np.repeat(scaled[:, :, None], 2, axis=2).reshape(24, -1).astype(np.float32)
    wanted = model.encode([Media("image", full, (1, 4, 6))])[0].embeddings
    for given in (pixels.reshape(24, -1), np.repeat(pixels[:, :, None], 2, axis=2).reshape(24, -1)):
        media = Media("image", given, (1, 4, 6), mean=mean, std=std)
        assert close(model.encode([media])[0].embeddings, wanted, 1e-5)


def test_cached_media_need_no_features(model: MRopeModel, generation: str) -> None:
    whole = mixed(model, generation)
    features = model.encode(whole.media)
    full, partly = (
        model.embed(whole.input_ids, each, whole.media) for each in (features, [None, features[1]])
    )
    picture, video = model.media_places(whole.input_ids, whole.media)
    assert not partly.embeddings[0, mx.array(picture)].any()
    assert mx.array_equal(partly.embeddings[0, mx.array(video)], full.embeddings[0, mx.array(video)])
    assert mx.array_equal(partly.positions, full.positions)


def test_placeholders_and_media_must_agree(model: MRopeModel, generation: str) -> None:
    picture = rows(generation, (1, 4, 6), "image", 1)
    with pytest.raises(PromptError, match=r"has 5 image placeholder.*1 image.*need 6"):
        model.embed([1, *[IMAGE] * 5], [None], [picture])
    with pytest.raises(PromptError, match="has 1 video"):
        model.embed([1, VIDEO], [], [])
    with pytest.raises(PromptError, match="text stands between"):
        model.embed([IMAGE, IMAGE, 1, *[IMAGE] * 4], [None], [picture])


def test_ids_beyond_the_vocabulary_are_refused(model: MRopeModel) -> None:
    """MLX would read memory that is none of the embedding's."""
    for ids in ([1, 10**6], [1, -1], [model.vocab_size]):
        with pytest.raises(PromptError, match="no token of this model"):
            model.embed(ids, [], [])


def test_arrays_of_other_libraries_are_as_good_as_lists(model: MRopeModel, generation: str) -> None:
    whole = mixed(model, generation)
    given = Prompt(
        np.array(whole.input_ids),  # type: ignore[arg-type]
        tuple(replace(item, grid=np.array(item.grid), digest="") for item in whole.media),  # type: ignore[arg-type]
    )
    assert given == replace(given, input_ids=whole.input_ids)
    assert [item.digest for item in given.media] == [item.digest for item in whole.media]
    assert mx.array_equal(model.logits(given), model.logits(whole))
    with pytest.raises(PromptError, match="one row"):
        Prompt([whole.input_ids])  # type: ignore[list-item]
    with pytest.raises(MediaError, match="image or video"):
        Media("picture", whole.media[0].patches, (1, 4, 6))  # type: ignore[arg-type]


def test_patches_must_fit_their_grid(model: MRopeModel, generation: str) -> None:
    picture = rows(generation, (1, 4, 6), "image", 1)
    for wrong in (replace(picture, grid=(1, 4, 8)), replace(picture, patches=picture.patches[:, :-1])):
        with pytest.raises(MediaError, match="don't fit grid"):
            model.encode([wrong])
    with pytest.raises(MediaError, match="mean and std"):
        model.encode([replace(picture, patches=np.zeros(picture.patches.shape, np.uint8))])


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("text", {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ("text", {"rope_parameters": {"rope_type": "linear"}}, "linear"),
        ("text", {"hidden_act": "gelu"}, "hidden_act"),
        ("text", {"use_sliding_window": True}, "use_sliding_window"),
        ("vision", {"hidden_act": "relu6"}, "hidden_act"),
    ],
)
def test_unknown_settings_are_errors(
    generation: str, section: str, change: Mapping[str, Any], message: str
) -> None:
    settings = config(generation, **{section: change})
    with pytest.raises(ConfigError, match=message):
        model_class(settings)(settings)


def test_a_text_checkpoint_is_refused(generation: str) -> None:
    settings = config(generation)
    del settings["vision_config"]
    with pytest.raises(ConfigError, match="vision_config"):
        model_class(settings)(settings)


def test_old_and_new_rope_keys_are_the_same(generation: str) -> None:
    rope = dict(DECODER[generation]["rope_parameters"])
    theta = rope.pop("rope_theta")
    old = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": {"type": "mrope", **rope}}
    old["rope_scaling"].pop("rope_type")
    assert build(generation, text=old).rope == build(generation).rope


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("bits", [None, 4, "mixed"])
def test_joining_weights_changes_no_number(generation: str, bits: int | str | None) -> None:
    model = build(generation, prepared=False)
    if bits is not None:

        def settings(path: str, module: nn.Module) -> bool | dict[str, int]:
            eight = bits == "mixed" and path.endswith(("v_proj", "up_proj", "in_proj_b"))
            size = module.weight.shape[-1] if hasattr(module, "to_quantized") else 1
            return size % 32 == 0 and {"group_size": 32, "bits": 8 if eight else 4}

        nn.quantize(model.language_model, class_predicate=settings)
    whole = Prompt([1, 2, 3, 4, 5])
    before = model.logits(whole)
    mx.eval(before)
    model.prepare()
    assert close(model.logits(whole), before, 1e-5)
    model.prepare()  # a second time does nothing
    assert close(model.logits(whole), before, 1e-5)


@pytest.mark.parametrize("checkpoint", ["qwen2_vl/tiny-hub", "qwen3_vl/tiny", "qwen3_5/tiny"])
def test_half_precision_stays_half(checkpoint: str) -> None:
    """Norms that are kept in float32 must not widen the stream, and with it the KV cache."""
    model = load_model(reference(checkpoint), "bfloat16")
    cache = model.make_cache()
    logits = model(model.embed([5, 6, 7], [], []), cache)
    assert logits.dtype == mx.bfloat16
    assert cache.attention.keys.dtype == mx.bfloat16
