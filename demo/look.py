"""Answer a question about a picture, and write down what happened inside the model:

    python demo/look.py --image PATH_OR_URL --prompt "What is this?" --out look.html [--adapter DIR] [--load-4bit]

look.html is a page that needs nothing else: choose a word to see where the model looked, and what it nearly said.
look.png is a picture for a report: one view of the picture for each word.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from PIL.Image import Image  # noqa: E402

from data.conversation import Turn  # noqa: E402
from demo.look_page import make_look_page  # noqa: E402
from demo.look_picture import make_look_picture  # noqa: E402
from demo.pictures import open_picture  # noqa: E402
from demo.voice import Voice, add_model_arguments, choose_adapters, load_voice, look_into  # noqa: E402
from model.generate import generate  # noqa: E402

KINDS = (".html", ".png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, default="runs/tiny/final")
    parser.add_argument("--image", help="picture the question is about: a file or a URL; without, text only")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--answer", help="look at this answer instead of the model's own")
    parser.add_argument("--out", type=Path, required=True, help="what to write: a name that ends in .html or .png")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of the model's own answer")
    parser.add_argument("--max-tokens", type=int, default=64, help="look at the first so many tokens of the answer")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the page")
    arguments = parser.parse_args()
    for name in ("max_new_tokens", "max_tokens"):
        if vars(arguments)[name] < 1:
            parser.error(f"--{name.replace('_', '-')} {vars(arguments)[name]}: at least 1")
    try:
        look(arguments)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def look(arguments: argparse.Namespace) -> None:
    """Do what the command says. Raises: ValueError or OSError for what cannot be read, answered or written."""
    out: Path = arguments.out
    if out.suffix.lower() not in KINDS:
        raise ValueError(f"--out {out}: its name should end in {' or '.join(KINDS)}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    if out.suffix.lower() == ".png" and arguments.image is None:
        raise ValueError(f"--out {out}: without --image there is no picture to draw on; a page (.html) is possible")
    # The picture first: a wrong name should not cost the minute that loading takes.
    picture = None if arguments.image is None else open_picture(arguments.image)
    voice = load_voice(arguments)
    turns = [Turn("human", arguments.prompt, has_image=picture is not None)]
    input_ids, num_answer = complete(voice, turns, picture, arguments.answer, arguments.max_new_tokens)
    print(voice.tokenizer.decode(input_ids[-num_answer:]))
    inside = look_into(voice, input_ids, picture, num_answer, arguments.max_tokens)
    if out.suffix.lower() == ".html":
        page = make_look_page(
            inside, picture, input_ids, num_answer, voice.tokenizer, arguments.prompt, arguments.language
        )
        out.write_text(page, encoding="utf-8")
    else:
        assert picture is not None
        make_look_picture(
            inside, picture, input_ids, num_answer, voice.tokenizer, arguments.prompt, arguments.language
        ).save(out)
    print(f"{out}: {out.stat().st_size / 1000:,.0f} kB", file=sys.stderr)
    if num_answer > len(inside.chosen_ids):
        print(f"the first {len(inside.chosen_ids)} of the answer's {num_answer} tokens were looked at", file=sys.stderr)


def complete(
    voice: Voice, turns: list[Turn], picture: Image | None, answer: str | None, max_new_tokens: int
) -> tuple[list[int], int]:
    """Return the conversation's tokens with the answer, and how many are the answer's, its end among them.

    Args:
        answer: given, or None for the model's likeliest.
    Raises: ValueError when the two do not fit the model's positions, or the model has nothing to say.
    """
    prompt = voice.render(turns).input_ids
    if answer is not None:
        whole = voice.render([*turns, Turn("gpt", answer)]).input_ids
        return whole, len(whole) - len(prompt)
    room = voice.model.config.text.max_position_embeddings - len(prompt)
    if room < 1:
        raise ValueError(f"the question has {len(prompt)} tokens, no room is left for an answer: shorten it")
    limit, eos = min(max_new_tokens, room), voice.tokenizer.eos_token_id
    with choose_adapters([voice]):
        (tokens,) = generate(voice.model, [torch.tensor(prompt)], voice.see(picture), eos, limit)
    tokens += [eos] * (len(tokens) < limit)
    return prompt + tokens, len(tokens)


if __name__ == "__main__":
    main()
