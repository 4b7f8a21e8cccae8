"""The official LLaVA-1.5 files, their known faults mended or left out.

    root/llava_v1_5_mix665k.json          665,298 rows; pictures: root/{coco/train2017,gqa/images,ocr_vqa/images,
                                          textvqa/train_images,vg/VG_100K,vg/VG_100K_2}/
    root/blip_laion_cc_sbu_558k.json      558,128 rows; pictures: root/images/00000/ and so on, as images.zip holds them
    root/vg/image_data.json               Visual Genome's, or root/image_data.json: by it the pictures of vg/ and gqa/
                                          (which have the same numbers) that are COCO's are recognised

The root may also be the file itself, of any name. Rows keep their keys; `source` is added. Ids repeat in the official
file, and nothing depends on them: they are left as they are. Many pictures of the official mixture are COCO's val2014,
so without `--allow-leaks` fewer rows are left than officially.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.conversation import IMAGE_MARKER, parse_turns
from data.pictures import PictureFolder, clean_name
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.report import Report
from data.prepare.visual_genome import read_pictures
from data.rows import stream_rows

FILES = ("llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json")
ENDINGS = (".jpg", ".gif", ".png", ".jpeg")  # OCR-VQA's pictures have the endings of their addresses, or all .jpg
VG_NAME = re.compile(r"(?:vg/VG_100K(?:_2)?|gqa/images)/(\d+)\.\w+", re.IGNORECASE)


def read(root: Path, options: Options, leaks: Leaks, report: Report) -> Iterator[dict]:
    """Yield the rows in the file's order. `options` has no part in them.

    Raises: FileNotFoundError without the file; ValueError for a broken one, or where both are there.
    """
    file = report.add_input(_find_file(root))
    folder = find_image_folder(file.parent)
    finder = _Finder(folder)
    coco_ids = _read_coco_ids(file.parent, leaks, report)
    seen: set[object] = set()
    num_text = num_repeated = 0
    for row in stream_rows(file):
        report.read += 1
        try:
            for fault in mend_row(row):
                report.mend(fault)
            source = row.get("source") or _name_source(row.get("image"), file)
            finder.find(row, source, report)
        except ValueError as error:
            report.drop(str(error))
            continue
        image = row.get("image")
        coco_id = None
        if image is not None and (match := VG_NAME.fullmatch(image)):
            coco_id = coco_ids.get(int(match[1]))
        if image is not None and (reason := leaks.find(image, coco_id)):
            report.drop(reason)
            continue
        num_text += image is None
        num_repeated += (key := str(row.get("id"))) in seen
        seen.add(key)
        yield row | {"source": source}
    report.note(f"{num_text} rows have no picture: kept as text; {num_repeated} ids are not the first of their kind")
    finder.write_notes(report)
    if any(reason.startswith("in COCO") for reason in report.dropped):
        report.note("the official mixture has the rows whose pictures are in COCO val2014: --allow-leaks keeps them")


def find_image_folder(root: Path) -> Path:
    """Return where the rows' paths start: LLaVA-Pretrain has its pictures one folder deeper than the mixture."""
    return root / "images" if (root / "images").is_dir() else root


def _find_file(root: Path) -> Path:
    if root.is_file():
        return root
    there = [name for name in FILES if (root / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{root} has neither of {', '.join(FILES)}: fetch it, or name a file with --root")
    if len(there) > 1:
        raise ValueError(f"{root} has both {' and '.join(there)}: name one of the files with --root")
    return root / there[0]


def _read_coco_ids(root: Path, leaks: Leaks, report: Report) -> Mapping[int, int]:
    """Return the COCO ids of Visual Genome's pictures."""
    files = [file for folder in (root / "vg", root) if (file := folder / "image_data.json").is_file()]
    if files:
        pictures = read_pictures(report.add_input(files[0]))
        return {image_id: coco_id for image_id, (_, coco_id) in pictures.items() if coco_id is not None}
    if not leaks.is_allowed:
        report.note("vg/image_data.json is missing: pictures of vg/ and gqa/ that are COCO's were NOT recognised")
    return {}


def mend_row(row: Any) -> list[str]:
    """Correct a row in place; return what was wrong.

    Note: a marker behind its question is no fault; reading the row moves it to the front.
    Raises: ValueError saying why it cannot be corrected.
    """
    faults = []
    try:
        turns = row["conversations"]
        has_image = row.get("image") is not None
        num_markers = sum(turn["value"].count(IMAGE_MARKER) for turn in turns)
        if num_markers and not has_image:
            raise ValueError(f"row: {IMAGE_MARKER} without a picture")
        if turns and turns[0]["from"] == "gpt":
            del turns[0]
            faults.append("row: leading answer removed")
        if turns and turns[-1]["from"] == "human":
            del turns[-1]
            faults.append("row: last question, without an answer, removed")
        if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("row: questions and answers do not alternate")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("row: not a conversation") from error
    if has_image and (num_markers != 1 or IMAGE_MARKER not in turns[0]["value"]):
        for turn in turns:
            turn["value"] = turn["value"].replace(IMAGE_MARKER, "").strip()
        turns[0]["value"] = f"{IMAGE_MARKER}\n{turns[0]['value']}"
        fault = f"several {IMAGE_MARKER}" if num_markers > 1 else f"{IMAGE_MARKER} missing or in a later turn"
        faults.append(f"row: {fault}, now one in front")
    if not has_image:
        row.pop("image", None)
    try:
        parse_turns(row)
    except ValueError as error:
        raise ValueError("row: not a conversation") from error
    return faults


class _Finder:
    """Looks for the rows' pictures, as far as their folders are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = PictureFolder(folder)
        self.is_there: dict[str, bool] = {}  # by folder
        self.num_not_looked_for: Counter[str] = Counter()

    def find(self, row: dict, source: str, report: Report) -> None:
        """Put the stored name of its picture into a row. Raises: ValueError saying why that cannot be."""
        image = row.get("image")
        if image is None:
            return
        try:
            image = clean_name(image)
        except ValueError as error:
            raise ValueError("picture: its path leads out of the image folder") from error
        parent = image.rpartition("/")[0]
        if parent not in self.is_there:
            self.is_there[parent] = self.pictures.shards is not None or (self.folder / parent).is_dir()
        if not self.is_there[parent]:
            self.num_not_looked_for[parent] += 1
            return
        stored = self.pictures.find(image)
        if stored is None:
            stem, _, ending = image.rpartition(".")
            stored = next((found for other in ENDINGS if (found := self.pictures.find(stem + other))), None)
            if stored is None:
                raise ValueError(f"picture: missing, of {source}")
            report.mend(f"picture: named .{ending}, is {stored[len(stem) :]}, of {source}")
        elif stored != image:
            report.mend("picture: other letter case or Unicode form")
        row["image"] = stored

    def write_notes(self, report: Report) -> None:
        """Say what was not looked for."""
        if folders := sorted(self.num_not_looked_for):
            named = ", ".join(f"{name}/" for name in folders[:5]) + (" and others" if len(folders) > 5 else "")
            total = self.num_not_looked_for.total()
            report.note(f"{total} pictures were not looked for: {named} missing in the image folder")


def _name_source(image: str | None, file: Path) -> str:
    if image is None:
        return "text"
    first = image.partition("/")[0]
    return file.stem if first.isdecimal() or "/" not in image else first
