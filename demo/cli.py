"""Talk to a model in the terminal: `python demo/cli.py --model-path runs/tiny/final --image-file PICTURE`.

An empty line or Ctrl-D ends the chat, Ctrl-C the answer. `--prompt TEXT` answers once and exits.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from data.conversation import Turn, render_conversation  # noqa: E402
from data.image import open_image, preprocess_image  # noqa: E402
from data.tokenizer import StreamDecoder, Tokenizer  # noqa: E402
from model.generate import Sampling, generate_stream  # noqa: E402
from model.llava import Llava  # noqa: E402
from model.weights import TOKENIZER_FILE, load_llava  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="model folder, e.g. runs/tiny/final")
    parser.add_argument("--image-file", type=Path, help="picture the first question is about; without it, text only")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest word")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much of the probability")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {arguments.max_new_tokens}: at least 1")
    try:
        model = load_llava(arguments.model_path, device=arguments.device)
        tokenizer = Tokenizer(arguments.model_path / TOKENIZER_FILE)
        pixels = None
        if arguments.image_file:
            pixels = preprocess_image(open_image(arguments.image_file), model.config.vision.image_size)[None]
        sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
        chat(model, tokenizer, pixels, arguments.prompt, arguments.max_new_tokens, sampling)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def chat(
    model: Llava,
    tokenizer: Tokenizer,
    pixel_values: Tensor | None,
    prompt: str | None,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Answer `prompt`, or question after question from the terminal, each with all that was said before."""
    turns: list[Turn] = []
    while question := prompt or ask():
        asked = [*turns, Turn("human", question, has_image=pixel_values is not None and not turns)]
        answer = ""
        try:
            if not prompt:
                print("ASSISTANT: ", end="", flush=True)
            for piece in stream_answer(model, tokenizer, asked, pixel_values, max_new_tokens, sampling):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print()
        if prompt:
            return
        turns = [*asked, Turn("gpt", answer)]


def ask() -> str:
    """Read a question; an empty one ends the chat."""
    try:
        return input("USER: ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def stream_answer(
    model: Llava,
    tokenizer: Tokenizer,
    turns: list[Turn],
    pixel_values: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[str]:
    """Yield the answer to the last of `turns` in pieces of whole characters.

    Raises: ValueError when the conversation no longer fits the model's positions.
    """
    rendered = render_conversation(turns, tokenizer, model.config.vision.num_patches)
    room = model.config.text.max_position_embeddings - len(rendered)
    if room < 1:
        raise ValueError(f"the conversation has {len(rendered)} tokens, no room is left for an answer: start a new one")
    decoder = StreamDecoder(tokenizer)
    prompt = torch.tensor(rendered.input_ids)
    steps = generate_stream(model, [prompt], pixel_values, tokenizer.eos_token_id, min(max_new_tokens, room), sampling)
    for token in steps:
        if token.item() != tokenizer.eos_token_id:
            yield decoder.push(int(token))
    yield decoder.finish()


if __name__ == "__main__":
    main()
