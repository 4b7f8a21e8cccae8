"""Pictures packed into tar shards, for storage that dislikes a million small files.

    python -m data.shards runs/665k.json --images /data/images --out /data/shards

The shards then stand where the folder stood: the file's rows name the members. They follow WebDataset's convention,
every picture being a sample of its own, in shuffled order. The same inputs give the same bytes. After an interruption
the command goes on with the first shard that is not finished.

`data/pictures.py` reads them. A disk or network gives of its best only when a shard is read from front to back, which
`order_by_shard` arranges for an epoch; it shuffles less than a permutation of all rows, so it is for shards alone.
"""

import argparse
import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from data.pictures import INDEX_NAME, TAR_BLOCK, PictureFolder, clean_name, list_members
from data.rows import RowFile, find_bad_rows

NUM_THREADS = 16  # that read pictures: slow storage answers many at a time
READ_AHEAD = 256  # pictures

Result = TypeVar("Result")


def order_by_shard(
    shard_of_row: np.ndarray, offset_of_row: np.ndarray, epoch: int, seed: int, side_by_side: int = 16
) -> np.ndarray:
    """Return the rows (int64) in the order of one epoch, in which every shard is read from front to back.

    Groups of up to `side_by_side` shards, drawn at random, are read one after the other. Within a group the next shard
    to read from is drawn in proportion to what each has left. Each is entered at a place of its own and ends where it
    was entered, so that epochs differ. Rows without a picture lie evenly among the others.

    Args:
        shard_of_row: the number of each row's shard, -1 for a row without picture.
        offset_of_row: the byte in that shard.
    """
    random = np.random.default_rng((seed, epoch))
    with_picture = np.flatnonzero(shard_of_row >= 0)
    without = random.permutation(np.flatnonzero(shard_of_row < 0))
    _, shards, counts = np.unique(shard_of_row[with_picture], return_inverse=True, return_counts=True)
    num_groups = -(-len(counts) // side_by_side)
    group_of_shard = random.permutation(len(counts)) * num_groups // max(1, len(counts))
    # Which shard is read from, draw by draw.
    drawn = shards[np.lexsort((random.random(len(shards)), group_of_shard[shards]))]

    # What is read there: the shard's rows by offset, from the place of entry on and then those before it.
    rows = np.lexsort((random.random(len(shards)), offset_of_row[with_picture], shards))
    starts = np.cumsum(counts) - counts
    entries = random.integers(0, np.maximum(counts, 1))
    start, entry, count = (np.repeat(of_shard, counts) for of_shard in (starts, entries, counts))
    order = np.empty(len(shards), dtype=np.int64)
    turned = start + (np.arange(len(shards)) - start + entry) % count
    order[np.argsort(drawn, kind="stable")] = with_picture[rows[turned]]

    places = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in (order, without)]
    return np.concatenate([order, without])[np.argsort(np.concatenate(places), kind="stable")]


def write_shards(names: Iterable[str], pictures: PictureFolder, out: Path, shard_bytes: int, seed: int) -> None:
    """Copy the named pictures into `out/00000.tar` and so on, each once, in an order that the seed decides.

    Args:
        shard_bytes: what a shard may hold; a larger picture has one to itself.

    Raises: FileNotFoundError for missing pictures; ValueError for none, or where `out` holds something else.
    """
    ordered = sorted({clean_name(name) for name in names})
    if not ordered:
        raise ValueError("no row has a picture: there is nothing to pack")
    if missing := [name for name in ordered if pictures.find(name) is None]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(ordered)} pictures are missing in {pictures.folder}, the first {missing[:5]}: "
            "`python -m data.check` lists them all, --bad-list leaves them out"
        )
    ordered = [ordered[place] for place in np.random.default_rng(seed).permutation(len(ordered))]
    plan = plan_shards(ordered, pictures, shard_bytes)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{number:05d}.tar" for number in range(len(plan))]
    expected = {INDEX_NAME, *(file.name for file in files)}
    if others := sorted(name for name in os.listdir(out) if name not in expected and not name.endswith(".partial")):
        raise ValueError(f"{out} holds {others[0]}, which is no part of this set: choose an empty folder")
    with tqdm(total=len(ordered), desc="writing shards", unit="picture") as bar:
        for file, members in zip(files, plan, strict=True):
            if not file.exists():
                write_shard(file, [name for name, _ in members], pictures, bar)
                continue
            if [(name, size) for name, _, size in list_members(file)] != members:
                raise ValueError(f"{file} holds other pictures than it should: delete it, or choose an empty folder")
            bar.update(len(members))


def plan_shards(names: Sequence[str], pictures: PictureFolder, shard_bytes: int) -> list[list[tuple[str, int]]]:
    """Divide pictures into shards, as they come; return the names and sizes of each."""
    plan: list[list[tuple[str, int]]] = []
    left = 0
    sizes = tqdm(_map_ahead(pictures.measure, names), "measuring", len(names), unit="picture", leave=False)
    for name, size in zip(names, sizes, strict=True):
        needed = TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
        if not plan or needed > left:
            plan.append([])
            left = shard_bytes
        plan[-1].append((name, size))
        left -= needed
    return plan


def write_shard(file: Path, names: Sequence[str], pictures: PictureFolder, bar: tqdm) -> None:
    """Write one tar; it appears under its name when it is whole."""
    temporary = file.with_name(file.name + ".partial")
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in zip(names, _map_ahead(pictures.read, names), strict=True):
                member = tarfile.TarInfo(name)  # of no time and nobody, unless told
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                bar.update()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _map_ahead(function: Callable[[str], Result], names: Sequence[str]) -> Iterator[Result]:
    """Yield what `function` returns for each name, many at a time but not all at once."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for start in range(0, len(names), READ_AHEAD):
            yield from threads.map(function, names[start : start + READ_AHEAD])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.shards", description="Pack a file's pictures into tars.")
    parser.add_argument("file", type=Path, help="conversation file whose pictures are packed")
    parser.add_argument("--images", type=Path, required=True, help="folder that its image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--bad-list", type=Path, help="bad.jsonl of data.check: pictures to leave out")
    parser.add_argument("--shard-mb", type=float, default=1000, help="size of a shard, in million bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which pictures are packed")
    arguments = parser.parse_args()
    try:
        rows = RowFile(arguments.file)
        is_bad = find_bad_rows(rows, arguments.bad_list) if arguments.bad_list else np.zeros(len(rows), dtype=bool)
        names = (name for name, bad in zip(rows.images, is_bad, strict=True) if name is not None and not bad)
        shard_bytes = int(arguments.shard_mb * 1e6)
        write_shards(names, PictureFolder(arguments.images), arguments.out, shard_bytes, arguments.seed)
        shards = PictureFolder(arguments.out).shards  # opening makes the index
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    assert shards is not None
    print(f"{len(shards.names)} pictures in {len(shards.files)} shards: {arguments.out}")


if __name__ == "__main__":
    main()
