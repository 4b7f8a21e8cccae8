"""Talk to a LLaVA in the terminal:

    python demo/cli.py --model-path liuhaotian/llava-v1.5-7b --image-file PATH_OR_URL [--load-4bit] [--adapter DIR]

A model is a folder (runs/tiny/final, an official or llava-hf checkpoint) or a repository of the Hugging Face hub, which
is downloaded once. An empty line or Ctrl-D ends the chat, Ctrl-C the answer. `--prompt TEXT` answers once and exits.
"""

import argparse
import mmap
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from PIL.Image import Image  # noqa: E402

from data.conversation import IMAGE_MARKER, Turn  # noqa: E402
from demo.pictures import open_picture  # noqa: E402
from demo.voice import Answer, Settings, Voice, add_model_arguments, load_voice, speak  # noqa: E402
from model.sampling import Sampling  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--image-file", help="picture the first question is about: a file or a URL; without, text only")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest word")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much of the probability")
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many words; 0 from all")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes repeating less likely")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step: faster after about a minute")
    parser.add_argument("--stats", action="store_true", help="after each answer: tokens, times and memory, on stderr")
    parser.add_argument("--debug", action="store_true", help="before each answer: the prompt as the model gets it")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {arguments.max_new_tokens}: at least 1")
    try:
        sampling = Sampling(
            arguments.temperature, arguments.top_p, arguments.seed, arguments.top_k, arguments.repetition_penalty
        )
        # The picture first: a wrong name should not cost the minute that loading takes.
        picture = None if arguments.image_file is None else open_picture(arguments.image_file)
        settings = Settings(arguments.max_new_tokens, sampling, tuple(arguments.stop), arguments.compile)
        chat(load_voice(arguments), picture, settings, arguments.prompt, arguments.stats, arguments.debug)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def chat(
    voice: Voice, picture: Image | None, settings: Settings, prompt: str | None, show_stats: bool, debug: bool
) -> None:
    """Answer `prompt`, or question after question from the terminal, each with all that was said before."""
    turns: list[Turn] = []
    while question := prompt or ask():
        asked = [*turns, Turn("human", question, has_image=picture is not None and not turns)]
        if debug:
            print_prompt(voice, asked)
        answer = Answer()
        try:
            if not prompt:
                print("ASSISTANT: ", end="", flush=True)
            for (later,) in speak([voice], asked, picture, settings):
                print(later.text[len(answer.text) :], end="", flush=True)
                answer = later
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        if show_stats:
            print_stats(answer, voice.device)
        if prompt:
            return
        turns = [*asked, Turn("gpt", answer.text)]


def ask() -> str:
    """Read a question; an empty one ends the chat."""
    try:
        return input("USER: ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def print_prompt(voice: Voice, turns: list[Turn]) -> None:
    """Show what the model gets, control tokens and the picture's place included."""
    pieces = [voice.tokenizer.pieces[token] if token >= 0 else IMAGE_MARKER for token in voice.render(turns).input_ids]
    num_patches = voice.model.config.vision.num_patches
    text = "".join(pieces).replace(IMAGE_MARKER * num_patches, f"<image x {num_patches}>")
    print(f"prompt: {text}", file=sys.stderr)


def print_stats(answer: Answer, device: torch.device) -> None:
    """Show what an answer cost: the first token has the prompt and the picture in it, the others are decoding."""
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU memory at most"
    elif (status := Path("/proc/self/statm")).is_file():
        memory = f"{int(status.read_text(encoding='ascii').split()[1]) * mmap.PAGESIZE / 2**30:.2f} GiB of memory"
    else:
        memory = "memory not known on this system"
    print(
        f"[{answer.prompt_tokens} prompt tokens, first token after {answer.first_s:.2f} s, "
        f"{answer.num_tokens} tokens at {answer.tokens_per_s:.1f} tokens/s, {memory}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
