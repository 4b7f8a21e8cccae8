"""Pixels against Hugging Face's CLIP processor, to the last bit, and files that are not what they claim to be."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

import data.image
from data.image import PAD_COLOUR, convert_to_rgb, open_image, pad_to_square, preprocess_image

SIZES = [(37, 23), (23, 37), (28, 28), (56, 28), (1, 1), (1, 5), (5, 1), (1, 40), (2, 33), (3, 7), (113, 340)]
SIZES += [(1, 2000), (2000, 1), (3, 1400), (1400, 3)]  # as far as the limits reach
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


def test_pixel_limit() -> None:
    """A small file can claim to be larger than memory; it is refused before it is decoded."""
    assert open_image(encode_image(make_noise(13, 7), "PNG"), max_pixels=91).size == (13, 7)
    content = encode_image(make_noise(23, 4), "PNG").getvalue()
    with pytest.raises(ValueError, match="cannot read the picture: 23 x 4 pixels, the limits are 91 pixels"):
        open_image(io.BytesIO(content[:60]), max_pixels=91)
    size = struct.pack(">II", 23, 4)
    assert content.count(size) == 1
    huge = content.replace(size, struct.pack(">II", 10_001, 10_000))
    head, checksum = huge[:29], struct.pack(">I", zlib.crc32(huge[12:29]))
    with pytest.raises(ValueError, match=f"10001 x 10000 pixels, the limits are {data.image.MAX_PIXELS} pixels"):
        open_image(io.BytesIO(head + checksum + huge[33:]))


def test_pillows_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses still larger ones with an error of its own, which must not escape."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match="cannot read the picture: Image size"):
        open_image(encode_image(make_noise(13, 7), "PNG"))


def encode_levels(kind: str) -> io.BytesIO:
    """16-bit grey in the formats that hold it; Pillow opens them as I;16, I;16, I;16B and I."""
    levels = np.array([[0, 256, 33280, 65535]], dtype=np.uint16)
    big_endian = levels.astype(">u2").tobytes()
    if kind == "PGM":
        return io.BytesIO(b"P5 4 1 65535 " + big_endian)
    if kind == "TIFF big-endian":
        return encode_image(Image.frombytes("I;16B", (4, 1), big_endian), "TIFF")
    return encode_image(Image.fromarray(levels), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big-endian", "PGM"])
def test_sixteen_bits_keep_their_high_byte(kind: str) -> None:
    """A plain conversion to RGB cuts off at 255: almost every 16-bit picture would be white."""
    picture = open_image(encode_levels(kind))
    assert picture.mode == "RGB"
    assert np.asarray(picture)[0].tolist() == [[level] * 3 for level in (0, 1, 130, 255)]


def test_transparent_level_of_sixteen_bits() -> None:
    """PNG can name one of the 65,536 levels transparent."""
    levels = Image.fromarray(np.array([[0, 256, 33280]], dtype=np.uint16))
    assert np.asarray(open_image(encode_image(levels, "PNG", transparency=256)))[0, :, 0].tolist() == [0, 255, 130]


def test_sixteen_bits_are_upright() -> None:
    """Two of Pillow's rarer features at once."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = open_image(encode_image(Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), "PNG", exif=exif))
    assert np.asarray(picture)[:, :, 0].tolist() == [[0], [255]]


@pytest.mark.parametrize(
    "levels", [np.array([[0, 0.5]], "float32"), np.array([[0, 70000]], "int32"), np.array([[-1, 5]], "int32")]
)
def test_levels_without_an_agreed_white(levels: np.ndarray) -> None:
    """Depth maps and the like: whatever were made of them would be a guess."""
    low, high = levels.min(), levels.max()
    with pytest.raises(
        ValueError, match=rf"the picture: its values lie between {low} and {high}, expected 8 or 16 bits"
    ):
        open_image(encode_image(Image.fromarray(levels), "TIFF"))


KINDS = {
    "RGB": ("RGB", "PNG"),
    "grey": ("L", "PNG"),
    "black and white": ("1", "PNG"),
    "palette": ("P", "PNG"),
    "GIF": ("P", "GIF"),
    "JPEG": ("RGB", "JPEG"),
    "grey JPEG": ("L", "JPEG"),
    "CMYK JPEG": ("CMYK", "JPEG"),
    "CMYK": ("CMYK", "TIFF"),
    "LAB": ("LAB", "TIFF"),
    "WebP": ("RGB", "WEBP"),
    "BMP": ("RGB", "BMP"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_become_what_clips_processor_makes_of_them(kind: str) -> None:
    """From the file on, wherever `convert("RGB")` shows what a viewer shows, tall and wide."""
    mode, file_format = KINDS[kind]
    for size in ((61, 37), (19, 57)):
        noise = make_noise(*size)
        image = Image.frombytes("LAB", size, noise.tobytes()) if mode == "LAB" else noise.convert(mode)
        file = encode_image(image, file_format)
        opened = Image.open(io.BytesIO(file.getvalue()))
        assert opened.mode in (mode, "RGB")
        assert torch.equal(preprocess_image(open_image(file), 28, "square"), process_with_transformers(opened, 28))
        file.seek(0)
        expected = process_with_transformers(expand_to_square(opened.convert("RGB")), 28)
        assert torch.equal(preprocess_image(open_image(file), 28, "pad"), expected)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("LAB", (136, 208, 195), (255, 0, 0)),  # L 53 %, a +80, b +67; Pillow stores a and b from -128 on
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("RGBX", (*RED, 0), RED),
        ("PA", (0, 0), (255, 255, 255)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_rare_modes(mode: str, colour: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """None of them is read as if its numbers were red, green and blue."""
    found = convert_to_rgb(Image.new(mode, (2, 1), colour)).getpixel((1, 0))
    assert np.abs(np.subtract(found, expected)).max() <= 12, found  # type: ignore[arg-type]


def test_palette_with_degrees_of_transparency() -> None:
    """PNG gives each colour of a palette its own opacity."""
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, 0, 0, 0])
    image.putdata([0, 1, 2])
    opened = open_image(encode_image(image, "PNG", transparency=bytes([255, 0, 51])))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [RED, (255, 255, 255), (204, 204, 204)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    """What a page shows at first."""
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encode_image(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        assert opened.n_frames == 3  # type: ignore[attr-defined]
    assert open_image(file).getpixel((4, 3)) == RED


def test_contents_decide_not_the_name(tmp_path: Path) -> None:
    """Data sets hold GIF files called .jpg."""
    file = tmp_path / "x.jpg"
    file.write_bytes(encode_image(Image.new("RGB", (5, 4), RED), "GIF").getvalue())
    assert open_image(file).getpixel((2, 2)) == RED


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1" + bytes(30)])
def test_formats_that_are_not_read(content: bytes) -> None:
    """Pillow would start another program for the first of them."""
    with pytest.raises(ValueError, match="cannot read the picture: it is none of JPEG, PNG, GIF, WEBP, BMP, TIFF, PPM"):
        open_image(io.BytesIO(content))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files() -> None:
    """Whatever a decoder raises, the user sees one kind of error."""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = make_noise(19, 13)
    files = [encode_image(image, kind, exif=exif).getvalue() for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")]
    files += [encode_image(image, kind).getvalue() for kind in ("GIF", "BMP", "PPM")]
    num_refused = 0
    for content in files * 40:
        damaged = np.frombuffer(content, dtype=np.uint8).copy()
        damaged[random.integers(0, min(len(damaged), 300), 5)] = random.integers(0, 256, 5)
        try:
            assert open_image(io.BytesIO(damaged.tobytes())).mode == "RGB"
        except ValueError:
            num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize("size", [(1, 2001), (20000, 100), (1, 60000), (4002, 2)])
def test_shapes_that_would_fill_the_memory(size: tuple[int, int]) -> None:
    """Padded to a square or stretched, a few bytes of picture would become gigabytes."""
    with pytest.raises(ValueError, match=r"cannot read the picture: .* the limits are"):
        open_image(encode_image(Image.new("RGB", size), "PNG"))
    assert open_image(encode_image(Image.new("RGB", (1, 2000)), "PNG")).size == (1, 2000)
