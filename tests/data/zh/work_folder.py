"""A work folder as `collect`, `generate` and `clean` leave it, small and with pictures of coloured noise."""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data.zh.record import DIALOGUES, RECORDS, REPLIES, Record, Reply, as_row

KINDS = ("short", "description", "conversation", "reasoning", "text", "counting", "yes_no")
LICENSES = (("CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/"), ("Public domain", ""))
TURNS = {
    "short": (("图中的桥是什么颜色？", "红色"),),
    "description": (("请描述这张图片。", "一座红色的桥横跨河面，桥下停着两艘小船，远处是山。"),),
    "conversation": (("图中有什么？", "有一座红色的桥。"), ("桥下有什么？", "桥下停着两艘小船。")),
    "reasoning": (("这里现在适合划船吗？", "适合：水面平静，船也已经停在岸边。"),),
    "text": (("桥头的牌子上写着什么？", "写着“红桥”。"),),
    "counting": (("图中有几艘船？", "2"),),
    "yes_no": (("图中有船吗？", "有"), ("图中有飞机吗？", "没有")),
}


def write_work(work: Path, num_pictures: int = 40, pictures_per_page: int = 1) -> tuple[list[Record], list[Reply]]:
    """Write records, their pictures and a dialogue of two kinds about each; return both."""
    records, replies = [], []
    random = np.random.default_rng(0)
    for number in range(num_pictures):
        page = f"第{number // pictures_per_page}座桥"
        name, url = LICENSES[number % 2]
        record = write_picture(work, random.integers(0, 256, (20 + number % 5, 31, 3), dtype=np.uint8))
        record = replace(
            record, title=page, page_url=f"https://zh.wikipedia.org/wiki/{page}", topic=f"桥梁{number % 3}"
        )
        record = replace(record, license=name, license_url=url)
        records.append(record)
        replies += [make_reply(record.sha256, KINDS[kind % 7]) for kind in (number, number + 3)]
    write_rows(work / RECORDS, records)
    write_rows(work / REPLIES, replies)
    write_rows(work / DIALOGUES, replies)
    return records, replies


def write_picture(work: Path, pixels: np.ndarray) -> Record:
    """Write a picture where `collect` would, and return its record."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    image = f"images/{digest[:2]}/{digest}.png"
    (work / image).parent.mkdir(parents=True, exist_ok=True)
    (work / image).write_bytes(file.getvalue())
    return Record(
        image=image,
        sha256=digest,
        title="红桥",
        section="",
        text="红桥是一座红色的桥。\n它横跨河面。",
        topic="桥梁",
        page_url="https://zh.wikipedia.org/wiki/红桥",
        revision=7,
        author="某人",
        license="CC BY-SA 4.0",
        license_url="https://creativecommons.org/licenses/by-sa/4.0/",
        image_url=f"https://commons.wikimedia.org/wiki/File:{digest[:8]}.png",
        source="wikipedia",
    )


def make_reply(sha256: str, kind: str) -> Reply:
    return Reply(
        sha256=sha256,
        kind=kind,
        prompt_version="1",
        model="writer-1",
        turns=TURNS[kind],
        model_snapshot="writer-1-2026-01-01",
        input_tokens=900,
        output_tokens=80,
        cost=0.002,
    )


def write_rows(file: Path, rows: Iterable[Record | Reply]) -> None:
    lines = [json.dumps(as_row(row), ensure_ascii=False) + "\n" for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
