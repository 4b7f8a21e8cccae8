"""A picture becomes the pixels CLIP was trained on.

Source: CLIP's preprocessing, and LLaVA-1.5's expand-to-square (image_aspect_ratio "pad").
Shapes: S image size in pixels.
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
# A small file can claim to be far larger than memory: as it is, padded to a square, or its short side stretched to S.
MAX_PIXELS = 100_000_000
MAX_SIDE = 16_384  # pixels
MAX_ASPECT = 300  # long side to short side


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Read a picture as RGB, upright.

    Raises: FileNotFoundError, or ValueError for what is no readable picture or is larger than the limits above.
    """
    name = file if isinstance(file, Path) else "the picture"
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError(f"image {name} is missing")
    try:
        with Image.open(file) as image:
            check_size(image.width, image.height)
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                # Converting straight to RGB would show colours that transparency hides.
                upright = upright.convert("RGBA")
                ground = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(ground, upright)
            if upright.mode.startswith("I;16"):
                # Converting straight to RGB would cut 16 bits off at 255, which turns almost everything white.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {name}: {error}") from error


def check_size(width: int, height: int) -> None:
    """Raises: ValueError for a picture whose processing would need gigabytes."""
    long, short = max(width, height), max(1, min(width, height))
    if width * height > MAX_PIXELS or long > MAX_SIDE or long > MAX_ASPECT * short:
        raise ValueError(
            f"{width} x {height} pixels, the limits are {MAX_PIXELS} pixels, {MAX_SIDE} a side and a long side of "
            f"{MAX_ASPECT} times the short one: make it smaller"
        )


def preprocess_image(image: Image.Image, image_size: int, aspect: str = "pad") -> Tensor:
    """Return normalised pixels (3, S, S).

    Args:
        aspect: "pad" keeps the whole picture on a square ground (tuning, answering); "square" cuts out the middle
            (stage 1). Both are official.
    """
    if aspect == "pad":
        image = pad_to_square(image)
    elif aspect != "square":
        raise ValueError(f"aspect {aspect!r} is unknown, expected one of {', '.join(ASPECTS)}")
    short = min(image.size)
    width, height = (int(image_size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    image = image.crop((left, top, left + image_size, top + image_size))
    # Rescaled in double precision and normalised in single, as CLIPImageProcessor does, to the last bit.
    scaled = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    normalised = (scaled - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centre the picture on a square of CLIP's mean colour."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
