"""Pictures are cut for the original Qwen-VL to the reference's very numbers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import reference
from PIL import Image

from qwenvl_mlx.processor.fetch import load_image
from qwenvl_mlx.processor.image import resize, square_image

GOLDENS = "qwen_vl/goldens/preprocess.npz"
SIZES = (112, 224, 448)


def cases() -> list[tuple[str, int]]:
    with np.load(reference(GOLDENS)) as goldens:
        return sorted({(key.rsplit("/", 2)[0], int(key.rsplit("/", 2)[1])) for key in goldens})


def test_every_picture_of_the_goldens_is_checked() -> None:
    assert len({name for name, _ in cases()}) == 16
    assert {size for _, size in cases()} == set(SIZES)


def test_numbers_equal_the_reference() -> None:
    with np.load(reference(GOLDENS)) as goldens:
        for name, size in cases():
            with Image.open(reference(f"qwen_vl/images/{name}")) as image:
                rgb = image.convert("RGB")  # as the reference does: neither upright nor on white
            bytes_, floats = resize(rgb, size), square_image(rgb, size=size, patch=14).patches
            if size == 448:
                np.testing.assert_array_equal(
                    bytes_[1::16, 2::16], goldens[f"{name}/448/u8_sub"], err_msg=name
                )
                floats = floats[:, 3::32, 5::32]
            else:
                np.testing.assert_array_equal(bytes_, goldens[f"{name}/{size}/u8"], err_msg=name)
                floats = floats[:, 1::8, 2::8]
            np.testing.assert_array_equal(floats, goldens[f"{name}/{size}/f32_sub"], err_msg=name)


def test_what_the_media_tells() -> None:
    image = load_image(reference("qwen_vl/images/exif_rot.jpg"))
    media = square_image(image, size=110, patch=14)
    assert media.patches.shape == (3, 110, 110)
    assert media.patches.dtype == np.float32
    assert media.grid == (1, 7, 7)  # the last, incomplete patch is left out
    assert media.source_size == image.size == (54, 90)  # upright: stored as 90x54


@pytest.mark.parametrize("name", ["rgb.png", "rgba.png"])
def test_the_same_picture_has_one_digest_wherever_it_comes_from(name: str) -> None:
    path = reference(f"qwen_vl/images/{name}")
    sources = [path, str(path), path.as_uri(), path.read_bytes(), np.asarray(load_image(path))]
    digests = {square_image(load_image(source), size=56, patch=14).digest for source in sources}
    assert len(digests) == 1
    other = square_image(load_image(path), size=70, patch=14).digest
    assert other not in digests
