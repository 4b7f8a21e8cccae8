"""Pictures that benchmarks ask about are kept out of training: by COCO's ids, by lists of names, by their looks.

COCO's val2014 (VQA-v2's validation) and val2017 (in MME) are told by their ids, read from COCO's own annotations. Most
of val2014 lies inside train2017, and half of Visual Genome, which GQA shares, is COCO under other names.
A name on a list (`--exclude`) means every picture whose path ends with it; of COCO's names only the id counts.
Looks: `data.similar`.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data.prepare.fields import stream_fields
from data.prepare.report import Report
from data.rows import stream_rows
from data.similar import SimilarPictures, hash_pictures

SPLITS = ("val2014", "val2017")
ID_FILES = (  # of a split: any will do
    ("captions_{}.json", "images", "id"),
    ("instances_{}.json", "images", "id"),
    ("person_keypoints_{}.json", "images", "id"),
    ("v2_OpenEnded_mscoco_{}_questions.json", "questions", "image_id"),
)
COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d{12})\.\w+")
PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


class Leaks:
    """What must not be trained on, by id or name.

    COCO's ids are read when the first picture of COCO's comes along: who has none needs no list of them.

    Args:
        folders: where COCO's annotations may lie.
        splits: of COCO's, whose pictures are excluded.
        lists: files of names or COCO ids, one a line, or conversation files, whose pictures are meant.
        is_allowed: COCO's splits are not excluded; the lists are.
    """

    def __init__(
        self,
        folders: Iterable[Path] = (),
        splits: Sequence[str] = SPLITS,
        lists: Sequence[Path] = (),
        is_allowed: bool = False,
    ) -> None:
        """Raises: FileNotFoundError or ValueError for lists that are missing or empty."""
        self.folders = [place for folder in folders for place in (folder, folder / "annotations")]
        self.splits = () if is_allowed else tuple(splits)
        self.is_allowed = is_allowed
        self.has_list = bool(lists)
        self.files = list(lists)
        self.notes = ["evaluation pictures were NOT excluded: --allow-leaks"] if is_allowed else []
        self.split_ids: dict[int, str] | None = None
        self.listed_ids: dict[int, str] = {}
        self.listed_names: dict[str, list[tuple[str, str]]] = {}  # by file name: path and reason
        for file in lists:
            self._read_list(file)

    def find(self, name: str, coco_id: int | None = None) -> str | None:
        """Return why the picture is excluded, or None.

        Args:
            name: its path in the rows.
            coco_id: where the name does not tell.

        Raises: FileNotFoundError for a picture of COCO's when the ids to exclude are nowhere.
        """
        last = name.rpartition("/")[2]
        if coco_id is None and (match := COCO_NAME.fullmatch(last)):
            coco_id = int(match[1])
        if coco_id is not None:
            if self.split_ids is None:
                self.split_ids = self._read_splits()
            if reason := self.split_ids.get(coco_id) or self.listed_ids.get(coco_id):
                return reason
        for path, reason in self.listed_names.get(last, ()):
            if f"/{name}".endswith(f"/{path}") or f"/{path}".endswith(f"/{name}"):
                return reason
        return None

    def write_notes(self, report: Report) -> None:
        """Say which lists were used, when all rows are read."""
        for file in self.files:
            report.add_input(file)
        for text in self.notes:
            report.note(text)
        if self.split_ids is None and self.splits:
            report.note("no picture is known to be COCO's: the ids to exclude were not needed")

    def _read_list(self, file: Path) -> None:
        reason = f"named in {file.name}"
        if file.suffix in {".json", ".jsonl"}:
            names = {image for row in stream_rows(file) if isinstance(row, dict) and (image := row.get("image"))}
        elif file.is_file():
            names = {line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()} - {""}
        else:
            raise FileNotFoundError(f"{file}, a list of excluded pictures, is missing")
        if not names:
            raise ValueError(f"{file} names no pictures, expected a name or COCO id a line, or rows with 'image'")
        for name in names:
            last = name.rpartition("/")[2]
            if match := COCO_NAME.fullmatch(last):
                self.listed_ids.setdefault(int(match[1]), reason)
            elif name.isdecimal():
                self.listed_ids.setdefault(int(name), reason)
            else:
                self.listed_names.setdefault(last, []).append((name, reason))
        self.notes.append(f"{file.name} names {len(names)} pictures to exclude")

    def _read_splits(self) -> dict[int, str]:
        ids: dict[int, str] = {}
        for split in self.splits:
            file, key, field = self._find_split(split)
            of_split = {image_id for (image_id,) in stream_fields(file, key, **{field: int})}
            self.files.append(file)
            self.notes.append(f"{file.name} names {len(of_split)} pictures of COCO {split} to exclude")
            ids = dict.fromkeys(of_split, f"in COCO {split}") | ids
        return ids

    def _find_split(self, split: str) -> tuple[Path, str, str]:
        for folder in self.folders:
            for name, key, field in ID_FILES:
                if (folder / name.format(split)).is_file():
                    return folder / name.format(split), key, field
        names = ", ".join(name.format(split) for name, _, _ in ID_FILES)
        raise FileNotFoundError(
            f"pictures of COCO {split} must not be trained on, but which they are is unknown: none of {names} lies in "
            f"{', '.join(map(str, self.folders))}: unpack annotations_train{split}.zip of cocodataset.org and name its "
            "folder with --coco; or train on them, as the official mixture does, with --allow-leaks"
        )


class LookAlikes:
    """Pictures that benchmarks ask about, and whose likes are not trained on, whatever their names."""

    def __init__(self, folders: Iterable[Path], num_workers: int, report: Report) -> None:
        """Hash every picture below the folders. Raises: FileNotFoundError for a folder without pictures."""
        self.num_workers = num_workers
        self.known: list[tuple[str, SimilarPictures]] = []
        for folder in folders:
            files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_ENDINGS)
            if not files:
                raise FileNotFoundError(f"no pictures lie below {folder}, whose likes are to be excluded")
            name = folder.resolve().name
            names = tqdm([str(file.relative_to(folder)) for file in files], f"pictures of {name}", leave=False)
            hashes = [found for found in hash_pictures(folder, names, num_workers) if found is not None]
            similar = SimilarPictures(hashes)
            report.note(
                f"{name}: {len(similar)} pictures compared by their looks, {len(hashes) - len(similar)} too plain "
                f"for that, {len(files) - len(hashes)} unreadable"
            )
            self.known.append((f"looks like a picture of {name}", similar))

    def leave_out(self, rows: Iterable[dict], images: Path, report: Report) -> Iterator[dict]:
        """Yield the rows whose picture, below `images`, looks like none of those; the others are counted.

        A picture that cannot be read stays: `data.check` finds it.
        Raises: FileNotFoundError where none can be read, which is no check at all.
        """
        waiting: deque[dict] = deque()
        reasons: dict[str, str | None] = {}  # by picture

        def list_new_pictures() -> Iterator[str | None]:
            asked = set()
            for row in rows:
                waiting.append(row)
                name = row.get("image")
                yield None if name in asked else name
                asked.add(name)

        num_unreadable = 0
        for found in hash_pictures(images, list_new_pictures(), self.num_workers):
            row = waiting.popleft()
            name = row.get("image")
            if name is not None and name not in reasons:
                num_unreadable += found is None
                reasons[name] = None if found is None else self._find(found)
            if name is not None and (reason := reasons[name]):
                report.drop(reason)
            else:
                yield row
        if reasons and num_unreadable == len(reasons):
            raise FileNotFoundError(
                f"none of the rows' {len(reasons)} pictures can be read in {images}, so none was compared with those "
                "to exclude: name their folder with --images"
            )
        report.note(f"pictures in {images.resolve().name}/ were compared by their looks; {num_unreadable} unreadable")

    def _find(self, found: int) -> str | None:
        return next((reason for reason, similar in self.known if similar.contains(found)), None)
