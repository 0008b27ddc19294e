"""Videos of every kind become the reference's frames, times and rows, and bad ones a clear error."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from PIL import Image

from qwenvl_mlx.errors import MediaError
from qwenvl_mlx.media import Media
from qwenvl_mlx.processor.frames import ShortVideo, open_frames
from qwenvl_mlx.processor.patches import image_media, normalised_rows
from qwenvl_mlx.processor.policy import FetchPolicy
from qwenvl_mlx.processor.rules import CLIP_MEAN, CLIP_STD, HALF, PatchRules, VideoRules
from qwenvl_mlx.processor.video import sample, video_media, with_request

CLIP14 = VideoRules(PatchRules(14, 2, 2, 3136, 12845056, CLIP_MEAN, CLIP_STD), timed=False)
STD16 = VideoRules(PatchRules(16, 2, 2, 4096, 25165824, HALF, HALF), timed=True)
GENERATIONS = {"qwen2": CLIP14, "qwen3": STD16}


@pytest.fixture
def clip() -> Path:
    """48 frames of 96x64 at 16 a second."""
    return reference("images/clip_96x64_16fps.mp4")


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("wish", [{"fps": 2}, {"fps": 1}, {"num_frames": 6}], ids=str)
def test_frames_that_are_sampled(generation: str, wish: dict[str, int]) -> None:
    rules = replace(GENERATIONS[generation], fps=wish.get("fps", 2))
    for row in json.loads(reference("preprocess/tables.json").read_text())["sample_frames"]:
        expected, count = row[f"{generation}/{wish}"], wish.get("num_frames")
        if isinstance(expected, str) and count is not None:
            with pytest.raises(MediaError, match="ask for fewer"):
                sample(row["total"], row["fps"], rules, count=count)
            continue
        indices = sample(row["total"], row["fps"], rules, count=count)
        if isinstance(
            expected, str
        ):  # where the reference divides by zero there is one frame, and we take it
            assert indices == [0]
        elif isinstance(expected, dict):
            assert (len(indices), indices[:8], indices[-8:]) == (
                expected["n"],
                expected["first"],
                expected["last"],
            )
        else:
            assert indices == expected


def test_decoded_frames_are_pyavs(clip: Path) -> None:
    golden = np.load(reference("images/clip_96x64_16fps_six_decoded_frames_pyav.npz"))
    frames = open_frames(clip, fps=None)
    assert (frames.total, frames.fps) == (48, 16.0)
    taken = frames.take(golden["frame_indices"].tolist())
    for ours, theirs in zip(taken, golden["frames"], strict=True):
        assert (np.asarray(ours) == theirs).all()


@pytest.mark.parametrize(("golden", "rules"), [("videos_clip14", CLIP14), ("videos_std16", STD16)])
def test_frames_equal_the_goldens(golden: str, rules: VideoRules, clip: Path) -> None:
    """The goldens' resize is torchvision's; Pillow's differs by a level or two in half a percent of the values."""
    arrays = np.load(reference(f"preprocess/{golden}.npz"))
    for key in arrays:
        name, how = key.rsplit("/", 1)
        if name.startswith("clip"):
            frames = open_frames(str(clip), fps=None)
        else:
            stored = np.load(reference(f"images/{name}"))
            frames = open_frames(stored["frames"], fps=float(stored["fps"]))
        media = video_media(replace(frames, sampled=how == "all_resized_u8"), rules)
        difference = np.abs(_pixels(media, rules)[: len(arrays[key])].astype(int) - arrays[key])
        assert difference.max() <= 2, key
        assert (difference > 0).mean() < 0.005, key


def test_seconds_of_a_grid_and_times() -> None:
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    assert video_media(open_frames(frames, fps=1.5), CLIP14).seconds_per_grid == pytest.approx(2 / 1.5)
    assert video_media(open_frames(frames, fps=None), CLIP14).seconds_per_grid == pytest.approx(2 / 24)
    timed = video_media(open_frames(frames, fps=4), STD16)
    assert timed.timestamps == pytest.approx((0.125, 0.625, 1.0))  # the last frame is repeated
    assert timed.seconds_per_grid is None
    assert timed.grid == (3, 4, 4)


def test_a_sampled_file_tells_how_fast_it_was_sampled(clip: Path) -> None:
    assert video_media(open_frames(clip, fps=None), CLIP14).seconds_per_grid == pytest.approx(1.0)
    faster = video_media(open_frames(clip, fps=None), with_request(CLIP14, fps=4))
    assert (faster.grid[0], faster.seconds_per_grid) == (6, pytest.approx(0.5))
    fewest = video_media(open_frames(clip, fps=None), with_request(CLIP14, max_frames=2))
    assert fewest.grid[0] == 1


def test_rows_hold_two_frames_channel_by_channel() -> None:
    """The order inside a row is (channel, frame, y, x): a video of one repeated picture is that picture twice."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    still = image_media(Image.fromarray(picture), STD16.cut)
    moving = video_media(open_frames(np.stack([picture, picture]), fps=2), STD16)
    np.testing.assert_array_equal(normalised_rows(still), normalised_rows(moving))


def test_lists_arrays_and_bytes_are_the_same_video(clip: Path, tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for frame, path in zip(array, paths, strict=True):
        Image.fromarray(frame).save(path)
    digests = {
        video_media(open_frames(source, fps=2.0), STD16).digest
        for source in (
            array,
            list(array),
            [Image.fromarray(frame) for frame in array],
            [str(path) for path in paths],
        )
    }
    assert len(digests) == 1
    from_bytes = video_media(open_frames(clip.read_bytes(), fps=None), STD16)
    assert from_bytes.digest == video_media(open_frames(clip, fps=None), STD16).digest


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"moving.{form.lower()}"
    pictures = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(0, 240, 20)]
    pictures[0].save(path, format=form, save_all=True, append_images=pictures[1:], duration=250)
    frames = open_frames(path, fps=None)
    assert (frames.total, frames.fps) == (12, 4.0)
    media = video_media(frames, STD16)
    assert media.grid[0] == 3  # 2 of 4 frames a second
    assert media.timestamps[0] == pytest.approx((0 / 4 + 2 / 4) / 2)


def test_a_phones_upright_video_stands_upright(clip: Path) -> None:
    """The display matrix of an MP4 that turns by 90 degrees clockwise."""
    plain = bytearray(clip.read_bytes())
    matrix = plain.index(b"tkhd") + 4 + 40
    turn = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    plain[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    upright = next(open_frames(clip, fps=None).take([0]))
    turned = next(open_frames(bytes(plain), fps=None).take([0]))
    assert (np.asarray(turned) == np.rot90(np.asarray(upright), -1)).all()


def test_a_video_that_breaks_off_gives_what_it_has(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_frames(clip, fps=None)
    announced = replace(whole, total=400)
    with pytest.raises(ShortVideo):
        list(announced.take([0, 399]))
    assert video_media(announced, STD16).digest == video_media(whole, STD16).digest


def test_only_the_frames_that_are_needed_are_held(clip: Path) -> None:
    """Frames come one at a time: nothing is decoded past the last one that is wanted."""
    taken = open_frames(clip, fps=None).take([0, 3])
    assert next(taken).size == (96, 64)
    assert len(list(taken)) == 1


@pytest.mark.parametrize(
    ("source", "cure"),
    [
        (b"not a video at all" * 10, "convert it to MP4"),
        (np.zeros((4, 4, 3), np.uint8), "give \\[frames, height, width, 3\\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
        ([], "no frames"),
        ("missing.mp4", "check the path"),
        (b"GIF89a broken", "convert it to MP4"),
    ],
    ids=["noise", "picture", "empty array", "empty list", "missing", "broken GIF"],
)
def test_bad_videos(source: Any, cure: str) -> None:
    with pytest.raises(MediaError, match=cure):
        video_media(open_frames(source, fps=None), STD16)


def test_a_cut_off_file(clip: Path) -> None:
    with pytest.raises(MediaError, match="check that it is whole"):
        video_media(open_frames(clip.read_bytes()[:2000], fps=None), STD16)


def test_a_playlist_opens_nothing_else(clip: Path, tmp_path: Path) -> None:
    entry = f"#EXTINF:3,\nfile://{clip}\n"
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n{entry}#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError):
        open_frames(tmp_path / "list.m3u8", fps=None)


def test_frames_larger_than_the_policy_allows(clip: Path, tmp_path: Path) -> None:
    for source in (clip, tmp_path / "a.gif"):
        Image.new("RGB", (96, 64)).save(tmp_path / "a.gif")
        with pytest.raises(MediaError, match="make it smaller"):
            open_frames(source, fps=None, policy=FetchPolicy(max_pixels=1000))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage
def test_damage_is_told_or_survived(clip: Path) -> None:
    """Bytes overwritten, ends cut off: a video or a MediaError, nothing else."""
    gif = io.BytesIO()
    noise = [Image.effect_noise((64, 64), 30) for _ in range(6)]
    noise[0].save(gif, "GIF", save_all=True, append_images=noise[1:], duration=100)
    random = np.random.default_rng(3)
    small = with_request(STD16, max_pixels=98304)
    for turn in range(60):
        data = bytearray(clip.read_bytes() if turn % 2 else gif.getvalue())
        for place in random.integers(0, len(data), 5):
            data[place] = random.integers(0, 256)
        if turn % 3 == 0:
            del data[random.integers(1, len(data)) :]
        with contextlib.suppress(MediaError):
            video_media(open_frames(bytes(data), fps=None), small)


def test_sound_without_a_picture() -> None:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no video track"):
        open_frames(file.getvalue(), fps=None)


def test_without_the_extra(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r'pip install "qwenvl-mlx\[video\]"'):
        open_frames(clip, fps=None)


def test_too_many_frames_are_refused_before_they_are_cut() -> None:
    frames = np.zeros((100, 280, 280, 3), np.uint8)
    with pytest.raises(MediaError, match="5000 tokens but the model takes 4000: lower fps"):
        video_media(open_frames(frames, fps=1), CLIP14, max_tokens=4000)


def _pixels(media: Media, rules: VideoRules) -> np.ndarray:
    """Rows back to frames ``[T, height, width, 3]``."""
    (groups, down, across), patch = media.grid, rules.cut.patch_size
    blocks = np.asarray(media.patches).reshape(groups, down // 2, across // 2, 2, 2, 3, 2, patch, patch)
    frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return frames.reshape(groups * 2, down * patch, across * patch, 3)
