"""Pictures that look alike, whatever their names, sizes and formats: a 64-bit hash each, compared bit by bit.

A difference hash (dHash): the picture is shrunk to 9 x 8 greys, and each bit says whether a grey is brighter than its
left neighbour. Scaling, compression and loss of colour hardly change it; cutting, turning and mirroring do.

Measured on 1,919 cuttings from 19 photographs, of which 5 % are too plain to be compared: the others are recognised in
JPEG of quality 30 (98.7 %), at half the size (99.8 %) or 1.7 times the size (99.6 %), and in grey (100 %); none of 1.6
million unrelated pairs look alike. Of 200 million pairs of random scenes with the spectrum of photographs two do: of
118 thousand pictures beside 40 thousand, about fifty would be taken for another.
"""

import io
import itertools
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.image import FORMATS, check_size, convert_to_rgb
from data.pictures import PictureFolder
from data.processes import run_chunks

DRAFT_SIZE = (72, 64)  # pixels; JPEG is decoded at 1/8 where that leaves more than this
HASH_SIZE = (9, 8)
HASH_BITS = 64
MAX_DISTANCE = 6  # bits
NUM_BANDS = MAX_DISTANCE + 1
MIN_BITS = 12  # set, and as many unset; with fewer a picture is too plain to be compared
CHUNK_SIZE = 64  # pictures sent to a process at once


def hash_picture(content: bytes) -> int:
    """Return the 64-bit difference hash of a picture file.

    Raises: ValueError for what is no readable picture.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_size(image.width, image.height)
            image.draft("L", DRAFT_SIZE)
            grey = convert_to_rgb(ImageOps.exif_transpose(image)).convert("L")
    except Exception as error:  # a damaged file makes the decoders stumble in all sorts of ways
        raise ValueError(f"cannot read the picture: {error}") from error
    greys = np.asarray(grey.resize(HASH_SIZE, Image.Resampling.LANCZOS)).astype(np.int16)
    return int.from_bytes(np.packbits(greys[:, 1:] > greys[:, :-1]).tobytes(), "big")


def hash_pictures(folder: Path, names: Iterable[str | None], num_workers: int) -> Iterator[int | None]:
    """Yield the hash of each picture, in order; None for None and for what cannot be read."""
    for _, hashes in run_chunks(partial(_hash_name, folder), names, CHUNK_SIZE, num_workers):
        yield from hashes


def _hash_name(folder: Path, name: str | None) -> int | None:
    try:
        return None if name is None else hash_picture(_open_folder(folder).read(name))
    except (ValueError, OSError):
        return None


@cache
def _open_folder(folder: Path) -> PictureFolder:
    return PictureFolder(folder)


class SimilarPictures:
    """Many hashes, asked whether one lies within MAX_DISTANCE bits.

    Hashes are cut into more bands than bits may differ, so one band at least is the same in both: only hashes that
    share a band are compared. A picture too plain, evenly bright (paper, a drawing) or in one gradient, has no like.
    """

    def __init__(self, hashes: Iterable[int]) -> None:
        every = np.fromiter(hashes, dtype=np.uint64)
        self.hashes = every[~is_plain(every)]
        self.bands = []  # shift, mask, where in the last the hashes with each value start, and those hashes' numbers
        for low, high in itertools.pairwise(HASH_BITS * band // NUM_BANDS for band in range(NUM_BANDS + 1)):
            mask = (1 << high - low) - 1
            values = (self.hashes >> np.uint64(low) & np.uint64(mask)).astype(np.uint16)
            order = values.argsort(kind="stable")
            starts = values[order].searchsorted(np.arange(mask + 2, dtype=np.uint16))
            self.bands.append((low, mask, starts, order.astype(np.uint32)))

    def __len__(self) -> int:
        return len(self.hashes)

    def contains(self, found: int) -> bool:
        """Tell whether a picture looks like one of these."""
        one = np.uint64(found)
        if is_plain(one):
            return False
        for low, mask, starts, order in self.bands:
            value = found >> low & mask
            near = self.hashes[order[starts[value] : starts[value + 1]]]
            if (np.bitwise_count(near ^ one) <= MAX_DISTANCE).any():
                return True
        return False


def is_plain(hashes: np.ndarray | np.uint64) -> np.ndarray:
    """Tell which hashes say too little to be compared: nearly all of their bits are the same."""
    num_set = np.bitwise_count(hashes)
    return (num_set < MIN_BITS) | (num_set > HASH_BITS - MIN_BITS)
