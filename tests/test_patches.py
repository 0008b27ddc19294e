"""Pictures become exactly the rows that the reference processors make, quickly and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
from helpers import reference
from PIL import Image, ImageOps

from qwenvl_mlx.errors import ConfigError, MediaError
from qwenvl_mlx.processor.patches import image_media, normalised_rows, smart_resize
from qwenvl_mlx.processor.resample import strips
from qwenvl_mlx.processor.rules import CLIP_MEAN, CLIP_STD, HALF, PatchRules, read_rules

CLIP14 = PatchRules(14, 2, 2, 3136, 12845056, CLIP_MEAN, CLIP_STD)
STD16 = PatchRules(16, 2, 2, 65536, 16777216, HALF, HALF)
LIMITS = {  # factor, least and most pixels, frames
    "qwen2_5_hub": (28, 3136, 12845056, None),
    "qwen2_default": (28, 3136, 1003520, None),
    "qwen2_5_small": (28, 256 * 784, 768 * 784, None),
    "qwen3_hub": (32, 65536, 16777216, None),
    **{f"qwen3_video_{n}f": (32, 4096, 25165824, n) for n in (2, 5, 16, 400)},
}


@pytest.mark.parametrize("rule", LIMITS)
def test_smart_resize_of_97_sizes(rule: str) -> None:
    factor, least, most, frames = LIMITS[rule]
    for row in json.loads(reference("preprocess/tables.json").read_text())["smart_resize"]:
        limits = {"factor": factor, "min_pixels": least, "max_pixels": most, "frames": frames}
        if row[rule] == "error":
            with pytest.raises(MediaError, match="crop it"):
                smart_resize(row["h"], row["w"], **limits)
        else:
            assert list(smart_resize(row["h"], row["w"], **limits)) == row[rule], (row["h"], row["w"])


def test_half_is_rounded_to_even() -> None:
    limits = {"factor": 28, "min_pixels": 1, "max_pixels": 10**9}
    assert smart_resize(42, 70, **limits) == (56, 56)


def test_a_single_frame_counts_as_the_pair_it_becomes() -> None:
    limits = {"factor": 32, "min_pixels": 4096, "max_pixels": 25165824}
    assert (
        smart_resize(480, 640, frames=1, **limits) == smart_resize(480, 640, frames=2, **limits) == (480, 640)
    )


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="older Pillow orders its passes otherwise"
)
def test_strips_equal_pillow() -> None:
    """Enlarging, shrinking and both, in either direction, on noise that saturates."""
    random = np.random.default_rng(0)
    for _ in range(60):
        (width, height), (across, down) = (
            random.integers(1, 300, 2).tolist(),
            (random.integers(1, 10, 2) * 28).tolist(),
        )
        noise = random.integers(0, 2, (height, width, 3)) * random.integers(0, 256, (height, width, 3))
        picture = Image.fromarray(noise.astype(np.uint8))
        ours = np.concatenate(list(strips(picture, across, down, 14)))
        assert (ours == np.asarray(picture.resize((across, down), Image.Resampling.BICUBIC))).all()


def test_order_of_passes_is_the_same_with_every_pillow() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    bicubic = Image.Resampling.BICUBIC
    tall_first = picture.resize((128, 56), bicubic).resize((140, 56), bicubic)
    assert (np.concatenate(list(strips(picture, 140, 56, 14))) == np.asarray(tall_first)).all()
    wide_first = picture.resize((112, 64), bicubic).resize((112, 56), bicubic)
    assert (np.concatenate(list(strips(picture, 112, 56, 14))) == np.asarray(wide_first)).all()


@pytest.mark.parametrize(("golden", "rules"), [("images_clip14", CLIP14), ("images_std16", STD16)])
def test_rows_equal_the_goldens(golden: str, rules: PatchRules) -> None:
    arrays = np.load(reference(f"preprocess/{golden}.npz"))
    names = sorted({key.split("/")[0] for key in arrays})
    assert len(names) > 10
    for name in names:
        media = image_media(_rgb(reference(f"images/{name}")), rules)
        if f"{name}/pil_resized_u8" in arrays:
            assert (_pixels(media.patches, media.grid, rules) == arrays[f"{name}/pil_resized_u8"]).all(), name
        rows = normalised_rows(media)[arrays[f"{name}/pil_row_index"]]
        np.testing.assert_allclose(rows, arrays[f"{name}/pil_rows"], rtol=0, atol=4e-7, err_msg=name)


@pytest.mark.parametrize("folder", ["qwen2_vl/tiny-hub", "qwen3_vl/tiny"])
def test_rows_equal_transformers_on_odd_sizes(folder: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = reference(folder)
    theirs = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    config = json.loads((path / "config.json").read_text())
    rules, _ = read_rules(path, config, timed="qwen3" in folder)
    random = np.random.default_rng(2)
    for size in [(1, 1), (3, 300), (199, 1), (57, 91), (640, 33), (225, 224), (500, 333)]:
        picture = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        ours, expected = image_media(picture, rules), theirs(picture, return_tensors="np")
        assert [list(ours.grid)] == expected["image_grid_thw"].tolist()
        np.testing.assert_allclose(normalised_rows(ours), expected["pixel_values"], rtol=0, atol=4e-7)


def test_a_photo_of_12_megapixels_needs_less_than_40_megabytes() -> None:
    """Beyond the decoded picture, with the rows themselves (36 MB): measured in a process of its own."""
    script = """
import resource, sys
import numpy as np
from PIL import Image
from qwenvl_mlx.processor.patches import image_media
from qwenvl_mlx.processor.rules import CLIP_MEAN, CLIP_STD, PatchRules
rules = PatchRules(14, 2, 2, 3136, 12845056, CLIP_MEAN, CLIP_STD)
image_media(Image.new("RGB", (400, 300)), rules)  # what is loaded on first use is not the photo's
photo = Image.fromarray(np.zeros((3000, 4000, 3), np.uint8))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
media = image_media(photo, rules)
assert media.grid == (1, 214, 286), media.grid
print((peak() - before) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40


def test_request_limits() -> None:
    assert CLIP14.limited(max_pixels=1000).min_pixels == 1000  # a lone limit moves the other
    assert STD16.limited(min_pixels=20_000_000).max_pixels == 20_000_000
    picture = Image.new("RGB", (640, 480))
    small = image_media(picture, CLIP14.limited(max_pixels=50176))
    assert small.grid[1] * small.grid[2] * 14 * 14 <= 50176
    assert small.source_size == (640, 480)


def test_digest_names_what_the_model_sees() -> None:
    picture = Image.fromarray(np.arange(120 * 90 * 3, dtype=np.uint32).astype(np.uint8).reshape(90, 120, 3))
    digest = image_media(picture, CLIP14).digest
    assert digest == image_media(picture.copy(), CLIP14).digest
    assert digest != image_media(picture, CLIP14.limited(min_pixels=50176)).digest
    assert digest != image_media(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), CLIP14).digest


def test_files_decide_the_rules(tmp_path: Path) -> None:
    vision = {"vision_config": {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}}
    picture, video = read_rules(tmp_path, vision, timed=True)
    assert (picture.min_pixels, picture.max_pixels, picture.mean) == (65536, 16777216, HALF)
    assert (video.cut.min_pixels, video.cut.max_pixels, video.fps) == (4096, 25165824, 2.0)
    _write(tmp_path / "preprocessor_config.json", {"size": {"shortest_edge": 1024, "longest_edge": 2048}})
    picture, video = read_rules(tmp_path, vision, timed=True)
    assert (picture.max_pixels, video.cut.max_pixels) == (
        2048,
        2048,
    )  # the picture's file stands in for the video's
    _write(tmp_path / "video_preprocessor_config.json", {"max_pixels": 4096, "fps": 1, "max_frames": 8})
    _, video = read_rules(tmp_path, vision, timed=True)
    assert (video.cut.max_pixels, video.fps, video.max_frames) == (4096, 1, 8)
    _write(tmp_path / "processor_config.json", {"image_processor": {"min_pixels": 64, "max_pixels": 128}})
    assert read_rules(tmp_path, vision, timed=True)[0].max_pixels == 128  # the nested form comes first


def test_rules_that_would_change_the_numbers_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "preprocessor_config.json", {"resample": 2})
    with pytest.raises(ConfigError, match="resample"):
        read_rules(tmp_path, {}, timed=False)
    _write(tmp_path / "preprocessor_config.json", {"patch_size": 14})
    with pytest.raises(ConfigError, match="patch_size"):
        read_rules(tmp_path, {"vision_config": {"patch_size": 16}}, timed=True)


def _rgb(path: Path) -> Image.Image:
    """As the reference loads pictures: transparency dropped, not laid on white."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _pixels(rows: np.ndarray, grid: tuple[int, int, int], rules: PatchRules) -> np.ndarray:
    """Rows back to ``[height, width, 3]``."""
    (_, down, across), patch = grid, rules.patch_size
    blocks = rows.reshape(down // 2, across // 2, 2, 2, 3, patch, patch)
    return blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(down * patch, across * patch, 3)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))
