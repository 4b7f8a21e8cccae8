"""Pixels against Hugging Face's CLIP processor, to the last bit, and files that are not what they claim to be."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

import data.image
from data.image import PAD_COLOUR, open_image, pad_to_square, preprocess_image

SIZES = [(37, 23), (23, 37), (28, 28), (56, 28), (1, 1), (1, 5), (5, 1), (1, 40), (2, 33), (3, 7), (113, 340)]
RED, GREEN, BLUE = (250, 10, 20), (20, 240, 30), (10, 20, 230)


def make_noise(width: int, height: int) -> Image.Image:
    """Noise shows every error of a resampler or an offset."""
    random = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def process_with_transformers(image: Image.Image, image_size: int) -> Tensor:
    """Resize, crop and normalise as the official code does: with PIL, not with torchvision's other resampler."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))


def expand_to_square(image: Image.Image) -> Image.Image:
    """Do what llava.mm_utils.expand2square does, pixel by pixel."""
    side = max(image.size)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = (122, 116, 104)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(square)


def encode_image(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    """Return the picture as a file in memory."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("image_size", [14, 28])
@pytest.mark.parametrize("size", SIZES)
def test_square_is_clips_processor(size: tuple[int, int], image_size: int) -> None:
    """The frozen tower saw these very numbers in training."""
    image = make_noise(*size)
    pixels = preprocess_image(image, image_size, "square")
    assert pixels.shape == (3, image_size, image_size)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, process_with_transformers(image, image_size))


@pytest.mark.parametrize("image_size", [14, 28])
@pytest.mark.parametrize("size", SIZES)
def test_pad_is_llavas_expand_to_square(size: tuple[int, int], image_size: int) -> None:
    """Tuning and answering keep the whole picture."""
    image = make_noise(*size)
    expected = process_with_transformers(expand_to_square(image), image_size)
    assert torch.equal(preprocess_image(image, image_size, "pad"), expected)
    assert torch.equal(preprocess_image(image, image_size), expected)
    assert pad_to_square(image).tobytes() == expand_to_square(image).tobytes()


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (336, 336)])
def test_full_size(size: tuple[int, int]) -> None:
    """The same at the size of the official tower, 336."""
    image = make_noise(*size)
    assert torch.equal(preprocess_image(image, 336, "square"), process_with_transformers(image, 336))
    assert torch.equal(preprocess_image(image, 336, "pad"), process_with_transformers(expand_to_square(image), 336))


def test_aspects_differ_and_unknown_ones_are_errors() -> None:
    """A silent fall-back would train on other pictures than the configuration says."""
    image = make_noise(30, 20)
    assert not torch.equal(preprocess_image(image, 14, "square"), preprocess_image(image, 14, "pad"))
    with pytest.raises(ValueError, match="'anyres' is unknown, expected one of pad, square"):
        preprocess_image(image, 14, "anyres")


def test_pad_colour_is_the_official_one() -> None:
    """int(mean * 255), which lies close to zero once normalised."""
    assert PAD_COLOUR == (122, 116, 104)
    pixels = preprocess_image(Image.new("RGB", (9, 2)), 14)
    assert pixels[:, 0, 0].abs().max() < 0.012


def test_rgb_is_returned_as_it_is() -> None:
    """Lossless in, the same out."""
    image = make_noise(13, 7)
    opened = open_image(encode_image(image, "PNG"))
    assert opened.mode == "RGB"
    assert opened.tobytes() == image.tobytes()


def test_picture_from_a_file(tmp_path: Path) -> None:
    """A path and an open file (an upload) give the same."""
    image = make_noise(13, 7)
    image.save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_on_white(kind: str) -> None:
    """A viewer shows a transparent pixel as its ground; its hidden colour is often black or garbage."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(*RED, 255), (*RED, 0), (0, 0, 0, 51)])
    opened = open_image(encode_image(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [RED, (255, 255, 255), (204, 204, 204)]


def test_transparent_grey() -> None:
    """Grey with alpha: PNG's mode LA."""
    image = Image.new("LA", (2, 1))
    image.putdata([(7, 255), (7, 0)])
    opened = open_image(encode_image(image, "PNG"))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(7, 7, 7), (255, 255, 255)]


@pytest.mark.parametrize("transparent", [None, 1])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette(kind: str, transparent: int | None) -> None:
    """Indices are not colours, and one of them may be transparent."""
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    opened = open_image(encode_image(image, kind, **({} if transparent is None else {"transparency": transparent})))
    expected = [RED, GREEN if transparent is None else (255, 255, 255), BLUE]
    assert [opened.getpixel((x, 0)) for x in range(3)] == expected


def test_transparent_colour_of_an_rgb_file() -> None:
    """PNG can name one colour of an RGB picture transparent."""
    image = Image.new("RGB", (2, 1))
    image.putdata([RED, GREEN])
    opened = open_image(encode_image(image, "PNG", transparency=GREEN))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [RED, (255, 255, 255)]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(mode: str) -> None:
    """Three equal channels."""
    image = Image.new(mode, (2, 1))
    image.putdata([0, 255])
    opened = open_image(encode_image(image, "PNG"))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_cmyk() -> None:
    """Print shops' JPEG: four channels of ink."""
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = open_image(encode_image(image, "JPEG", quality=100)).getpixel((4, 4))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    ("orientation", "corners"),  # where the stored corners (top left, top right, bottom left, bottom right) come to lie
    [(1, "RGBW"), (2, "GRWB"), (3, "WBGR"), (4, "BWRG"), (5, "RBGW"), (6, "BRWG"), (7, "WGBR"), (8, "GWRB")],
)
def test_phone_pictures_are_upright(orientation: int, corners: str) -> None:
    """A phone stores the sensor's picture and notes how it was held: `is it left of ...` depends on it."""
    colours = {"R": RED, "G": GREEN, "B": BLUE, "W": (255, 255, 255)}
    stored = Image.new("RGB", (4, 2))
    for place, letter in zip([(0, 0), (2, 0), (0, 1), (2, 1)], "RGBW", strict=True):
        stored.paste(colours[letter], (*place, place[0] + 2, place[1] + 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encode_image(stored, "PNG", exif=exif))
    right, bottom = opened.width - 1, opened.height - 1
    assert opened.size == ((4, 2) if orientation < 5 else (2, 4))
    found = [opened.getpixel(place) for place in [(0, 0), (right, 0), (0, bottom), (right, bottom)]]
    assert found == [colours[letter] for letter in corners]


def test_missing_file(tmp_path: Path) -> None:
    """Missing and unreadable are different mistakes, so different errors."""
    for file in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"image {file} is missing")):
            open_image(file)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_file_that_is_no_picture(tmp_path: Path, content: bytes) -> None:
    """A failed download is often a web page named .jpg."""
    file = tmp_path / "x.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"cannot read {file}: ")):
        open_image(file)
    with pytest.raises(ValueError, match="cannot read the picture: "):
        open_image(io.BytesIO(content))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_truncated_file(kind: str) -> None:
    """Half a picture, filled with grey, would be learned as if it were whole."""
    content = encode_image(make_noise(40, 30), kind).getvalue()
    assert open_image(io.BytesIO(content)).size == (40, 30)
    for length in (len(content) // 4, len(content) // 2, len(content) * 3 // 4):
        with pytest.raises(ValueError, match="cannot read the picture: "):
            open_image(io.BytesIO(content[:length]))


def test_pixel_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file can claim to be larger than memory; it is refused before it is decoded."""
    monkeypatch.setattr(data.image, "MAX_PIXELS", 91)
    assert open_image(encode_image(make_noise(13, 7), "PNG")).size == (13, 7)
    content = encode_image(make_noise(23, 4), "PNG").getvalue()
    with pytest.raises(ValueError, match="cannot read the picture: 23 x 4 pixels, the limits are 91 pixels"):
        open_image(io.BytesIO(content[:60]))


def test_pillows_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses still larger ones with an error of its own, which must not escape."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match="cannot read the picture: Image size"):
        open_image(encode_image(make_noise(13, 7), "PNG"))


def test_sixteen_bits_keep_their_high_byte() -> None:
    """A plain conversion to RGB cuts off at 255: almost every 16-bit picture would be white."""
    levels = np.array([[0, 256, 33280, 65535]], dtype=np.uint16)
    picture = open_image(encode_image(Image.fromarray(levels), "PNG"))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 1, 130, 255]


@pytest.mark.parametrize("size", [(1, 60000), (20000, 100), (1, 400)])
def test_shapes_that_would_fill_the_memory(size: tuple[int, int]) -> None:
    """Padded to a square or stretched, a few bytes of picture would become gigabytes."""
    with pytest.raises(ValueError, match=r"cannot read the picture: .* the limits are"):
        open_image(encode_image(Image.new("RGB", size), "PNG"))
