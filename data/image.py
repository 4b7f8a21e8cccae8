"""A picture becomes the pixels CLIP was trained on.

Source: CLIP's preprocessing, and LLaVA-1.5's expand-to-square (image_aspect_ratio "pad").
Shapes: S image size in pixels.

Note: from an upright 8-bit RGB picture on, the pixels are those of `CLIPImageProcessor` with the same Pillow, to the
last bit. (Pillow 13 shrinks pictures far taller than wide in another order than 12, and some levels differ by one.)
Before that, official LLaVA calls `convert("RGB")` and nothing else; `open_image` departs from it for
- pictures that note how the camera was held: they are turned upright;
- transparency: it lies on white, where the official code shows whatever colour was hidden;
- 16-bit grey: the high byte is kept, where the official code shows everything above 255 as white;
- numbers without an agreed white (floats, 32 bits): refused, where the official code cuts them off.
Of an animation the first frame is taken, and colour profiles are not applied, as in the official code.
"""

from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(channel * 255) for channel in MEAN)
ASPECTS = ("pad", "square")
# What the web and data sets hold. Pillow knows 40 more, one of which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
# A small file can claim to be far larger than memory: as it is, padded to a square, or its short side stretched to S.
# At these limits and S = 336 the first needs about 2 GB (where there is transparency), the others 1 GB.
MAX_PIXELS = 100_000_000
MAX_SIDE = 16_384  # pixels
MAX_ASPECT = 2000  # long side to short side


def open_image(file: Path | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as RGB, upright.

    Raises: FileNotFoundError, or ValueError for what is no readable picture or is larger than the limits above.
    """
    name = file if isinstance(file, Path) else "the picture"
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError(f"image {name} is missing")
    try:
        with Image.open(file, formats=FORMATS) as image:
            check_size(image.width, image.height, max_pixels)
            ImageOps.exif_transpose(image, in_place=True)
            return convert_to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read {name}: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # a damaged file makes the decoders stumble in all sorts of ways
        raise ValueError(f"cannot read {name}: {error}") from error


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Show the picture as a viewer would, on white.

    Raises: ValueError for values without an agreed white.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(reduce_to_8_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reduce_to_8_bits(image: Image.Image) -> np.ndarray:
    """Keep the high byte of 16-bit grey, which Pillow opens as one of the modes I;16, I;16B and I."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65_535:
        raise ValueError(f"its values lie between {low} and {high}, expected 8 or 16 bits: save it as 8-bit PNG")
    transparent = image.info.get("transparency")  # PNG may name one grey
    return np.where(values == transparent, 255, values >> 8).astype(np.uint8)


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises: ValueError for a picture whose processing would need gigabytes."""
    long, short = max(width, height), max(1, min(width, height))
    if width * height > max_pixels or long > MAX_SIDE or long > MAX_ASPECT * short:
        raise ValueError(
            f"{width} x {height} pixels, the limits are {max_pixels} pixels, {MAX_SIDE} a side and a long side of "
            f"{MAX_ASPECT} times the short one: make it smaller"
        )


def preprocess_image(image: Image.Image, image_size: int, aspect: str = "pad") -> Tensor:
    """Return normalised pixels (3, S, S).

    Args:
        aspect: "pad" keeps the whole picture on a square ground (tuning, answering); "square" cuts out the middle
            (stage 1). Both are official.
    """
    if aspect == "pad":
        image = _pad_and_resize(image, image_size)
    elif aspect == "square":
        image = _resize_and_crop(image, image_size)
    else:
        raise ValueError(f"aspect {aspect!r} is unknown, expected one of {', '.join(ASPECTS)}")
    pixels = np.empty((3, image_size, image_size), dtype=np.float32)
    # CLIPImageProcessor rescales in double precision; for all 256 values the rounded result is the same.
    np.divide(np.asarray(image).transpose(2, 0, 1), np.float32(255), out=pixels)
    pixels -= np.array(MEAN, dtype=np.float32)[:, None, None]
    pixels /= np.array(STD, dtype=np.float32)[:, None, None]
    return torch.from_numpy(pixels)


def _pad_and_resize(image: Image.Image, image_size: int) -> Image.Image:
    """Do `pad_to_square` and then resize to S.

    Pillow resizes along the width, then along the height, and a row of one colour stays that to the last bit. So a
    wide picture is made narrow before its ground is laid: a quarter less to do for a photo of 4 to 3.
    """
    side = width = max(image.size)
    if image.height < side:
        width = image_size
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return _lay_on_ground(image, width, side).resize((image_size, image_size), Image.Resampling.BICUBIC)


def _resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    short = min(image.size)
    width, height = (int(image_size * side / short) for side in image.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + image_size, top + image_size))


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centre the picture on a square of CLIP's mean colour."""
    side = max(image.size)
    return _lay_on_ground(image, side, side)


def _lay_on_ground(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    ground = Image.new("RGB", (width, height), PAD_COLOUR)
    ground.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return ground
