"""Draw test pictures with what the model answered: `python eval/gallery.py runs/tiny/eval/easy_vqa --out answers.png`.

Eight pictures are drawn by lot from all that were asked about, three questions each; wrong answers are marked.
"""

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from data.fonts import find_chinese_font  # noqa: E402
from eval.answers import Result, load_result, reopen_task  # noqa: E402
from eval.task import Task  # noqa: E402

NUM_PICTURES = 8
QUESTIONS_PER_PICTURE = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what eval/main.py wrote, e.g. runs/tiny/eval/easy_vqa")
    parser.add_argument("--data", type=Path, help="where the benchmark is now, if it has moved")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="decides which pictures are shown")
    arguments = parser.parse_args()
    try:
        result = load_result(arguments.folder)
        task = reopen_task(result, arguments.data)
        if task is None:
            raise FileNotFoundError(f"{result.settings['data']} is not here: say with --data where the benchmark is")
        draw(result, task, arguments.out, arguments.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.out}")


def draw(result: Result, task: Task, out: Path, seed: int) -> None:
    """Draw pictures in two rows of four, questions and answers below each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    texts = [*result.predictions, *(one.text + "".join(one.answers) for one in result.questions)]
    if font := find_chinese_font():
        plt.rcParams["font.family"] = ["DejaVu Sans", font]
    elif not all(text.isascii() for text in texts):
        raise ValueError("no font with Chinese characters is installed: apt install fonts-noto-cjk")

    by_image: dict[str, list[int]] = {}
    for number, question in enumerate(result.questions):
        if question.image:
            by_image.setdefault(question.image, []).append(number)
    random_order = random.Random(seed)
    names = random_order.sample(sorted(by_image), min(NUM_PICTURES, len(by_image)))
    figure, axes = plt.subplots(2, NUM_PICTURES // 2, figsize=(13, 8))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.19, hspace=0.65, wspace=0.02)  # room for the text
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        axis.imshow(task.open_picture(name))
        numbers = random_order.sample(by_image[name], min(QUESTIONS_PER_PICTURE, len(by_image[name])))
        lines = []
        for number in numbers:
            question, credit = result.questions[number], result.credits[number]
            right = "" if credit in (1, None) else f"   (wrong: {question.answers[0]})"
            lines += [question.text, f"  {result.predictions[number]}{right}"]
        axis.text(0, -0.05, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=10)
    figure.savefig(out, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
