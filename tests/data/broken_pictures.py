"""Files as data sets really hold them: cut off, misnamed, or in modes that few programs write. Each is made whole."""

import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

RED, GREEN, BLUE = (250, 10, 20), (20, 240, 30), (10, 20, 230)
WIDTH, HEIGHT = 60, 40
ORIENTATION = 0x0112


def draw_scene(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Coloured blocks with a little noise: every seed looks different, to a hash too."""
    random = np.random.default_rng(seed)
    blocks = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    picture = np.asarray(blocks.resize((width, height), Image.Resampling.NEAREST)).astype(int)
    noisy = picture + random.integers(-4, 5, picture.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the picture as a file's content."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@dataclass(frozen=True)
class Case:
    """A file, what `data.check` is to say of it, and what training is to see."""

    name: str
    content: bytes
    problem: str = ""  # pattern of why it cannot be used
    mode: str = "RGB"
    odd_format: str = ""
    is_turned: bool = False
    pixels: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)  # colours, within 3


def make_cases() -> list[Case]:
    """Return one file of each kind."""
    white = (255, 255, 255)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was held upright: columns become rows
    turned = Image.new("RGB", (60, 40), RED)
    turned.paste(BLUE, (0, 0, 60, 20))  # above; on the right once turned
    truncated = encode(draw_scene(1, 640, 480), "JPEG", quality=90)
    page = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>gone</body></html>\n"
    grey = np.full((40, 60), 128 * 256 + 7, dtype=np.uint16)
    palette = Image.new("P", (60, 40))
    palette.putpalette([*RED, *GREEN])
    palette.paste(1, (30, 0, 60, 40))
    return [
        Case("whole.jpg", encode(draw_scene(0), "JPEG", quality=95)),
        Case("truncated.jpg", truncated[: len(truncated) // 2], r"image file is truncated"),
        Case("page.jpg", page, "a page of HTML or XML, not a picture"),
        Case("empty.jpg", b"", "empty file"),
        Case("garbage.jpg", bytes(range(7, 200)), "it is none of JPEG, PNG, GIF"),
        Case(
            "animation.jpg",
            encode(Image.new("P", (60, 40)), "GIF"),
            mode="P",
            odd_format="GIF named .jpg",
            pixels={(5, 5): (0, 0, 0)},
        ),
        Case("web.jpg", encode(draw_scene(2), "WEBP", quality=90), odd_format="WEBP named .jpg"),
        Case("nameless", encode(draw_scene(3), "PNG"), odd_format="PNG without its ending"),
        Case("grey.jpg", encode(Image.new("L", (60, 40), 77), "JPEG"), mode="L", pixels={(9, 9): (77, 77, 77)}),
        Case(
            "print.jpg",
            encode(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "JPEG", quality=95),
            mode="CMYK",
            pixels={(9, 9): (255, 0, 0)},
        ),
        Case("deep.png", encode(Image.fromarray(grey), "PNG"), mode="I;16", pixels={(9, 9): (128, 128, 128)}),
        Case(
            "glass.png",
            encode(Image.new("RGBA", (60, 40), (*RED, 0)), "PNG"),
            mode="RGBA",
            pixels={(9, 9): white},
        ),
        Case("fog.png", encode(Image.new("LA", (60, 40), (7, 0)), "PNG"), mode="LA", pixels={(9, 9): white}),
        Case(
            "stencil.png",
            encode(palette, "PNG", transparency=1),
            mode="P",
            pixels={(5, 5): RED, (50, 5): white},
        ),
        Case(
            "phone.jpg",
            encode(turned, "JPEG", exif=exif, quality=95, subsampling=0),
            is_turned=True,
            pixels={(5, 30): RED, (35, 30): BLUE},
        ),
        Case("bomb.png", make_bomb(30_000, 30_000), r"30000 x 30000 pixels, the limits are|decompression bomb"),
        Case("wide.png", make_bomb(12_000, 9_000), r"12000 x 9000 pixels, the limits are 100000000"),
        Case("novel.png", make_novel(), "Decompressed data too large|text chunk|too large"),
        Case("floats.tiff", encode(Image.new("F", (60, 40), 0.5), "TIFF"), "expected 8 or 16 bits"),
    ]


def make_bomb(width: int, height: int) -> bytes:
    """Return a PNG of some bytes whose header claims hundreds of millions of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _make_chunk(kind, content) for kind, content in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


def _make_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_novel() -> bytes:
    """Return a PNG with a compressed text that unpacks to more than Pillow allows."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", "all work and no play " * 200_000, zip=True)
    return encode(draw_scene(5), "PNG", pnginfo=about)
