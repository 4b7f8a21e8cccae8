"""What the model looked at as one picture for a report: a view for each word of the answer.

Shapes: A tokens of the answer, L layers, H heads, P patches of the picture, as in `model/inside.py`.
"""

import io
import math
import textwrap
from collections.abc import Sequence

from PIL import Image

from data.fonts import find_chinese_font
from data.image import pad_to_square
from data.tokenizer import Tokenizer
from demo.look_page import group_tokens, show_piece
from demo.look_words import LOOK_TEXTS
from model.inside import Inside

NUM_COLUMNS = 4
SIDE = 336  # pixels of the picture under the colours


def make_look_picture(
    inside: Inside,
    picture: Image.Image,
    input_ids: Sequence[int],
    num_answer_tokens: int,
    tokenizer: Tokenizer,
    question: str,
    language: str = "en",
) -> Image.Image:
    """Return the picture alone and, for each word, under its attention, averaged over all layers and heads.

    Each view has its own scale, from 0 to the most attended patch. A word of several tokens has the first one's,
    and the probability of all.
    Raises: ValueError for Chinese words without a font that has them.
    """
    answer = input_ids[-num_answer_tokens:][: len(inside.chosen_ids)]
    groups = group_tokens(answer, tokenizer)
    texts = {key: pair[language == "zh"] for key, pair in LOOK_TEXTS.items()}
    check_font("".join([question, texts["picture"], *(name for name, _ in groups)]))
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    square = pad_to_square(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    faded = Image.blend(square, square.convert("L").convert("RGB"), 0.6)  # its colours would mix with the heat's
    grid = math.isqrt(inside.attention.shape[-1])
    averages = inside.attention.float().mean(dim=(1, 2)).unflatten(1, (grid, grid)).numpy()  # (A, rows, columns)
    columns = min(1 + len(groups), NUM_COLUMNS)
    rows = math.ceil((1 + len(groups)) / columns)
    width = (13 if is_chinese(question) else 26) * columns  # characters
    title = "\n".join(textwrap.wrap(question, width, max_lines=3, placeholder=" …"))
    with rc_context({"font.sans-serif": [*filter(None, [find_chinese_font()]), "DejaVu Sans"]}):
        figure = Figure(figsize=(2.4 * columns, 2.75 * rows + 0.3), dpi=150, layout="constrained")
        first, *others = figure.subplots(rows, columns, squeeze=False).flat
        figure.suptitle(title, fontsize=11, parse_math=False)
        first.set_title(texts["picture"], fontsize=10, parse_math=False)
        first.imshow(square)
        place = 0
        for axis, (name, count) in zip(others, groups, strict=False):
            axis.imshow(faded)
            axis.imshow(
                averages[place], cmap="inferno", alpha=0.7, vmin=0, interpolation="bicubic", extent=(0, SIDE, SIDE, 0)
            )
            caption = texts["view"].format(
                word=show_piece(name),
                probability=say_chance(math.prod(inside.chosen_probabilities[place : place + count].tolist())),
                share=f"{float(inside.picture_share[place].mean()):.0%}",
            )
            axis.set_title(caption, fontsize=9, parse_math=False)
            place += count
        for axis in (first, *others):
            axis.axis("off")
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return Image.open(file)


def say_chance(probability: float) -> str:
    """Return a probability in per cent; what would read 0.0 % is not impossible."""
    return "<0.1%" if probability < 0.0005 else f"{probability:.1%}"


def check_font(text: str) -> None:
    """Raises: ValueError for Chinese without a font that has it, saying how to get one."""
    if is_chinese(text) and find_chinese_font() is None:
        raise ValueError(
            "the words are Chinese and no font of this system has them: install one, such as fonts-noto-cjk, "
            "or write a page (.html) instead"
        )


def is_chinese(text: str) -> bool:
    """Tell whether there is a Chinese character in the text."""
    return any("\u3400" <= character <= "\u9fff" for character in text)
