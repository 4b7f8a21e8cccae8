"""Pictures that look alike: what the hash survives, what it tells apart, and that the index misses nothing."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.similar import MAX_DISTANCE, MIN_BITS, SimilarPictures, hash_picture, hash_pictures, is_plain


def make_scene(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """Return a picture with large and small shapes in it, another one for each seed."""
    generator = np.random.default_rng(seed)
    scene = np.zeros((height, width, 3))
    for cells, weight in ((4, 1.0), (8, 0.6), (16, 0.3), (48, 0.1)):
        grid = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        scene += weight * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((scene / 2).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return content.getvalue()


def measure_distance(one: bytes, other: bytes) -> int:
    return (hash_picture(one) ^ hash_picture(other)).bit_count()


def add_alpha(scene: Image.Image) -> Image.Image:
    """Return the scene on hidden black, wholly visible."""
    return Image.merge("RGBA", (*scene.split(), Image.new("L", scene.size, 255)))


def turn_by_note(scene: Image.Image) -> bytes:
    """Return a JPEG that lies on its side, and notes that it does."""
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.transpose(Image.Transpose.ROTATE_90).save(content, "JPEG", quality=90, exif=exif)
    return content.getvalue()


@pytest.mark.parametrize(
    "copy",
    [
        lambda scene: encode(scene, quality=30),
        lambda scene: encode(scene, "PNG"),
        lambda scene: encode(scene.convert("L")),
        lambda scene: encode(scene.convert("CMYK")),
        lambda scene: encode(scene.quantize(128), "GIF"),
        lambda scene: encode(scene.resize((131, 97)), quality=70),
        lambda scene: encode(scene.resize((900, 700)), quality=70),
        lambda scene: encode(scene.resize((336, 336))),
        lambda scene: encode(add_alpha(scene), "PNG"),
        turn_by_note,
    ],
    ids=["quality 30", "png", "grey", "cmyk", "gif", "smaller", "larger", "square", "alpha", "turned"],
)
def test_copies_are_recognised(copy: Callable[[Image.Image], bytes]) -> None:
    similar = SimilarPictures(hash_picture(encode(make_scene(seed))) for seed in range(12))
    assert len(similar) == 12
    assert all(similar.contains(hash_picture(copy(make_scene(seed)))) for seed in range(12))


def test_other_pictures_are_told_apart() -> None:
    hashes = [hash_picture(encode(make_scene(seed, 96, 64))) for seed in range(400)]
    similar = SimilarPictures(hashes[:200])
    assert not any(similar.contains(found) for found in hashes[200:])
    mirrored = make_scene(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert measure_distance(encode(mirrored), encode(make_scene(3))) > 3 * MAX_DISTANCE


def test_the_hash_by_hand() -> None:
    """A bit is set where it becomes brighter to the right; the first row has the highest bits."""
    greys = np.full((8, 9), 100, dtype=np.uint8)
    greys[0] = [0, 10, 5, 20, 20, 30, 1, 2, 3]
    greys[7, 8] = 101
    assert hash_picture(encode(Image.fromarray(greys), "PNG")) == 0b10101011 << 56 | 1


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (64, 48), "white"), Image.new("L", (90, 80), 0), Image.linear_gradient("L").rotate(90)],
    ids=["white", "black", "gradient"],
)
def test_plain_pictures_are_like_nothing(image: Image.Image) -> None:
    """Otherwise all white pages would be one."""
    found = hash_picture(encode(image))
    similar = SimilarPictures([found, found])
    assert len(similar) == 0
    assert not similar.contains(found)


def test_the_index_finds_what_a_search_finds() -> None:
    """Hashes with up to ten bits changed, in bands of their own or all in one."""
    draw = random.Random(0)
    known = np.array([draw.getrandbits(64) for _ in range(500)], dtype=np.uint64)
    similar = SimilarPictures(known)
    found = []
    for number in range(2000):
        asked = int(known[number % 500])
        low = draw.randrange(55)
        for bit in draw.sample(range(64) if number % 2 else range(low, low + 10), number % 11):
            asked ^= 1 << bit
        nearest = int(np.bitwise_count(known ^ np.uint64(asked)).min())
        expected = nearest <= MAX_DISTANCE and not is_plain(np.uint64(asked))
        assert similar.contains(asked) == expected
        found.append(expected)
    assert 1000 < sum(found) < 1400
    assert not SimilarPictures([]).contains(int(known[0]))


def test_what_is_plain() -> None:
    lowest, highest = (1 << MIN_BITS) - 1, (1 << 64 - MIN_BITS) - 1
    asked = np.array([lowest >> 1, lowest, highest, highest << 1 | 1], dtype=np.uint64)
    assert is_plain(asked).tolist() == [True, False, False, True]


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", encode(make_scene(0))[:900]])
def test_what_is_no_picture_is_an_error(content: bytes) -> None:
    with pytest.raises(ValueError, match="cannot read the picture"):
        hash_picture(content)


def test_many_pictures_in_order_whatever_the_workers(tmp_path: Path) -> None:
    for seed in range(6):
        make_scene(seed, 60, 40).save(tmp_path / f"{seed}.JPG")
    (tmp_path / "cut.jpg").write_bytes(encode(make_scene(0))[:500])
    names = ["3.jpg", None, "1.jpg", "cut.jpg", "missing.jpg", "../0.jpg", *(f"{seed}.jpg" for seed in range(6))] * 20
    one, two = (list(hash_pictures(tmp_path, names, workers)) for workers in (1, 2))
    assert one == two
    assert [found is None for found in one[:6]] == [False, True, False, True, True, True]
    assert one[6:12] == [hash_picture((tmp_path / f"{seed}.JPG").read_bytes()) for seed in range(6)]
