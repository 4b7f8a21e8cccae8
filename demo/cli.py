"""Talk to a LLaVA in the terminal:

    python demo/cli.py --model-path liuhaotian/llava-v1.5-7b --image-file PATH_OR_URL [--load-4bit] [--adapter DIR]

A model is a folder (runs/tiny/final, an official or llava-hf checkpoint) or a repository of the Hugging Face hub, which
is downloaded once. An empty line or Ctrl-D ends the chat, Ctrl-C the answer. `--prompt TEXT` answers once and exits.
"""

import argparse
import mmap
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from PIL.Image import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from data.conversation import CHAT_TEMPLATES, Turn, render_conversation  # noqa: E402
from data.image import open_image, preprocess_image  # noqa: E402
from data.tokenizer import StreamDecoder, Tokenizer, find_tokenizer, stop_at  # noqa: E402
from data.web import fetch_picture, is_url  # noqa: E402
from model.generate import generate_stream  # noqa: E402
from model.llava import Llava  # noqa: E402
from model.quantize import pack_for_decoding  # noqa: E402
from model.sampling import Sampling  # noqa: E402
from model.weights import build_llava, choose_dtype, open_checkpoint  # noqa: E402

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-path", required=True, help="model, adapter or projector: a folder, or owner/name[@rev]"
    )
    parser.add_argument("--model-base", help="what an adapter or projector given as the model belongs to")
    parser.add_argument("--adapter", help="LoRA on top of the model")
    parser.add_argument("--vision-tower", help="CLIP to use instead of the one the model names")
    parser.add_argument("--image-file", help="picture the first question is about: a file or a URL; without, text only")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--conv-mode", choices=CHAT_TEMPLATES, help="prompt template, instead of the model's own")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", dest="bits", action="store_const", const=8, default=16)
    bits.add_argument("--load-4bit", dest="bits", action="store_const", const=4)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest word")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much of the probability")
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many words; 0 from all")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes repeating less likely")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: as stored, but on CPUs bfloat16 for float16"
    )
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
        model, tokenizer = load(arguments)
        pixels = None if picture is None else preprocess_image(picture, model.config.vision.image_size)[None]
        template = arguments.conv_mode or model.config.chat_template
        speaker = Speaker(
            model, tokenizer, template, arguments.max_new_tokens, sampling, arguments.stop, arguments.compile
        )
        chat(speaker, pixels, arguments.prompt, arguments.stats, arguments.debug)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def load(arguments: argparse.Namespace) -> tuple[Llava, Tokenizer]:
    """Read the model that the arguments name, and its tokenizer. The files are closed behind it."""
    checkpoint = open_checkpoint(arguments.model_path, arguments.model_base, arguments.vision_tower, arguments.adapter)
    tokenizer = Tokenizer(find_tokenizer(*checkpoint.folders))
    dtype = DTYPES[arguments.dtype] or choose_dtype(checkpoint.dtype, arguments.device)
    model = build_llava(checkpoint, dtype, arguments.device, arguments.bits)
    if arguments.bits == 4 and arguments.device == "cpu" and dtype == torch.bfloat16:
        pack_for_decoding(model)
    return model, tokenizer


def open_picture(name: str) -> Image:
    """Read a picture from a file or the web."""
    return open_image(fetch_picture(name) if is_url(name) else Path(name))


@dataclass
class Stats:
    """What the last answer cost."""

    prompt_tokens: int = 0
    new_tokens: int = 0  # the end among them
    first_s: float = 0.0  # from the question to the first token
    total_s: float = 0.0


@dataclass
class Speaker:
    """A model with everything that decides what it says next."""

    model: Llava
    tokenizer: Tokenizer
    template: str
    max_new_tokens: int
    sampling: Sampling
    stop: list[str]
    compiled: bool

    def answer(self, turns: list[Turn], pixel_values: Tensor | None, stats: Stats) -> Iterator[str]:
        """Yield the answer to the last of `turns` in pieces of whole characters.

        Raises: ValueError when the conversation no longer fits the model's positions.
        """
        yield from stop_at(self._stream(turns, pixel_values, stats), self.stop)

    def _stream(self, turns: list[Turn], pixel_values: Tensor | None, stats: Stats) -> Iterator[str]:
        rendered = render_conversation(turns, self.tokenizer, self.model.config.vision.num_patches, self.template)
        room = self.model.config.text.max_position_embeddings - len(rendered)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(rendered)} tokens, no room is left for an answer: start a new one"
            )
        stats.prompt_tokens = len(rendered)
        started = time.perf_counter()
        eos, decoder = self.tokenizer.eos_token_id, StreamDecoder(self.tokenizer)
        for token in generate_stream(
            self.model, [torch.tensor(rendered.input_ids)], pixel_values, eos, min(self.max_new_tokens, room),
            self.sampling, self.compiled,
        ):  # fmt: skip
            token_id = int(token)
            stats.total_s = time.perf_counter() - started
            stats.first_s = stats.first_s or stats.total_s
            stats.new_tokens += 1
            if token_id != eos:
                yield decoder.push(token_id)
        yield decoder.finish()


def chat(speaker: Speaker, pixel_values: Tensor | None, prompt: str | None, show_stats: bool, debug: bool) -> None:
    """Answer `prompt`, or question after question from the terminal, each with all that was said before."""
    turns: list[Turn] = []
    while question := prompt or ask():
        asked = [*turns, Turn("human", question, has_image=pixel_values is not None and not turns)]
        if debug:
            print_prompt(speaker, asked)
        answer, stats = "", Stats()
        try:
            if not prompt:
                print("ASSISTANT: ", end="", flush=True)
            for piece in speaker.answer(asked, pixel_values, stats):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        if show_stats:
            print_stats(stats, speaker.model.language_model.lm_head.weight.device)
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


def print_prompt(speaker: Speaker, turns: list[Turn]) -> None:
    """Show what the model gets, control tokens and the picture's place included."""
    num_patches = speaker.model.config.vision.num_patches
    ids = render_conversation(turns, speaker.tokenizer, num_patches, speaker.template).input_ids
    pieces = [speaker.tokenizer.pieces[token] if token >= 0 else "<image>" for token in ids]
    text = "".join(pieces).replace("<image>" * num_patches, f"<image x {num_patches}>")
    print(f"prompt: {text}", file=sys.stderr)


def print_stats(stats: Stats, device: torch.device) -> None:
    """Show what an answer cost: the first token has the prompt and the picture in it, the others are decoding."""
    rate = (stats.new_tokens - 1) / (stats.total_s - stats.first_s) if stats.new_tokens > 1 else 0.0
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU memory at most"
    elif (status := Path("/proc/self/statm")).is_file():
        memory = f"{int(status.read_text(encoding='ascii').split()[1]) * mmap.PAGESIZE / 2**30:.2f} GiB of memory"
    else:
        memory = "memory not known on this system"
    print(
        f"[{stats.prompt_tokens} prompt tokens, first token after {stats.first_s:.2f} s, {stats.new_tokens} tokens at "
        f"{rate:.1f} tokens/s, {memory}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
