"""Flickr30k: one row per training picture, its answer one of the five captions people wrote.

The captions, from the first of these that is there:

    root/dataset_flickr30k.json      Karpathy's: as typed, and who is train (29,000), val (1,014) and test (1,000)
    root/results_20130124.token      the owners': 31,783 pictures, tokenised, no splits
    root/results.csv                 Kaggle's copy of it

The latter two do not say which pictures are tested on, so they are refused unless a list of excluded pictures does.
Pictures: root/flickr30k-images/, root/images/ or Kaggle's root/flickr30k_images/, whichever is there.

How captions are mended and which of them is chosen: `data.prepare.captions`. The pictures are for non-commercial
research and education, and not to be passed on.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from data.prepare.captions import make_row
from data.prepare.fields import stream_fields, take_fields
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.report import Report

SPLITS_FILE = "dataset_flickr30k.json"
LINE_FILES = {
    "results_20130124.token": re.compile(r"(?P<name>[^#]+)#\d+\t(?P<caption>.*)"),
    "results.csv": re.compile(r"(?P<name>[^|]+?)\s*\|\s*\d+\s*(\||(?P<gap>\s))(?P<caption>.*)"),  # one line has a gap
}
CSV_HEADER = "image_name|"
PICTURE_FOLDERS = ("flickr30k-images", "images", "flickr30k_images")
LICENSE = "Flickr terms, non-commercial research and education"


def read(root: Path, options: Options, leaks: Leaks, report: Report) -> Iterator[dict]:
    """Yield the rows in the file's order of pictures.

    Raises: FileNotFoundError without captions; ValueError for broken ones, or where the splits are unknown.
    """
    folder = next((name for name in PICTURE_FOLDERS if (root / name).is_dir()), PICTURE_FOLDERS[0])
    report.note(f"pictures are named as in {folder}/")
    for name, captions in _read_captions(root, leaks, report):
        image = f"{folder}/{name}"
        if reason := leaks.find(image):
            report.drop(reason)
        elif row := make_row("flickr30k", Path(name).stem, image, captions, options, report):
            yield row | {"license": LICENSE}


def _read_captions(root: Path, leaks: Leaks, report: Report) -> Iterator[tuple[str, list[str]]]:
    """Yield each picture's name and captions, those of other splits left out."""
    file = next((root / name for name in (SPLITS_FILE, *LINE_FILES) if (root / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{root} has none of {', '.join((SPLITS_FILE, *LINE_FILES))}: get the first, "
            "in caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent"
        )
    report.add_input(file)
    if file.name == SPLITS_FILE:
        yield from _read_karpathy(file, report)
        return
    if not (leaks.is_allowed or leaks.has_list):
        raise ValueError(
            f"{file} does not say which pictures Flickr30k is tested on: put {SPLITS_FILE} beside it "
            "(in caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent), or name them with --exclude"
        )
    captions = _read_lines(file, report)
    report.read = len(captions)
    yield from captions.items()


def _read_karpathy(file: Path, report: Report) -> Iterator[tuple[str, list[str]]]:
    for name, split, sentences in stream_fields(file, "images", filename=str, split=str, sentences=list):
        report.read += 1
        if split == "train":
            yield name, [take_fields(item, f"{file}: a sentence of {name}", raw=str)[0] for item in sentences]
        else:
            report.drop(f"picture: in Flickr30k's {split} split")


def _read_lines(file: Path, report: Report) -> Mapping[str, list[str]]:
    captions = defaultdict(list)
    with file.open("rb") as lines:
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            match = LINE_FILES[file.name].fullmatch(text)
            if match and "\N{REPLACEMENT CHARACTER}" not in text:
                captions[match["name"]].append(match["caption"])
                if match.groupdict().get("gap"):
                    report.mend("caption: its line lacks a separator")
            elif text and not text.startswith(CSV_HEADER):
                report.drop("caption: its line cannot be read")
    return captions
