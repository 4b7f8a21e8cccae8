"""COCO Captions: one row per training picture, its answer one of the five captions people wrote.

    root/annotations/captions_train2017.json   118,287 pictures; or, where it is missing,
    root/annotations/captions_train2014.json   82,783 pictures
    root/train2017/%012d.jpg                   the pictures; or root/train2014/COCO_train2014_%012d.jpg

How captions are mended and which of them is chosen: `data.prepare.captions`. `license` is the address of the picture's
own licence, one of Flickr's eight; the captions are CC BY 4.0.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from data.prepare.captions import make_row
from data.prepare.fields import stream_fields
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.report import Report

SPLITS = ("train2017", "train2014")


def read(root: Path, options: Options, leaks: Leaks, report: Report) -> Iterator[dict]:
    """Yield the rows in the file's order of pictures.

    Raises: FileNotFoundError without annotations; ValueError for broken ones.
    """
    split, file = _find_annotations(root)
    report.add_input(file)
    report.note(f"pictures are named as in {split}/")
    licenses = dict(stream_fields(file, "licenses", id=int, url=str))
    images = {
        image_id: (f"{split}/{name}", license_id)
        for image_id, name, license_id in stream_fields(file, "images", id=int, file_name=str, license=int)
    }
    report.read = len(images)
    captions = defaultdict(list)
    for image_id, caption in stream_fields(file, "annotations", image_id=int, caption=str):
        if image_id in images:
            captions[image_id].append(caption)
        else:
            report.drop("caption: its picture is not listed")
    for image_id, (image, license_id) in images.items():
        if license_id not in licenses:
            raise ValueError(f"{file}: picture {image_id} has licence {license_id}, listed are {sorted(licenses)}")
        if reason := leaks.find(image, coco_id=image_id):
            report.drop(reason)
        elif row := make_row("coco", image_id, image, captions[image_id], options, report):
            yield row | {"license": licenses[license_id]}


def _find_annotations(root: Path) -> tuple[str, Path]:
    files = {split: root / "annotations" / f"captions_{split}.json" for split in SPLITS}
    for split, file in files.items():
        if file.is_file():
            return split, file
    missing = " nor ".join(map(str, files.values()))
    raise FileNotFoundError(
        f"found neither {missing}: unpack annotations_trainval2017.zip of cocodataset.org in {root}"
    )
