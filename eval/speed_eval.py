"""Time a benchmark: questions per second, five or six about each picture, as in VQA-v2.

The peer is transformers' LLaVA asked as lmms-eval and VLMEvalKit ask it: one question at a time, the picture decoded,
preprocessed and run again for each. Beside it, this project one question at a time, and as `eval/main.py` asks: trunks
shared, rows refilled. All have the same random weights, generated JPEGs of COCO's size, and answers of as many tokens
as one or two words and their end take; weights and pictures are in memory when the clock starts.

What sharing can save at most is arithmetic: a picture and the words before it cost as much as some 600 tokens, which
are computed once for each picture instead of once for each question. What else is saved is a batch's: reading weights
once for many rows, and on GPUs the time that starting small kernels takes.
"""

import argparse
import functools
import io
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.conversation import IMAGE_TOKEN_ID, Turn, render_conversation
from data.image import open_image, pad_to_square, preprocess_image
from data.tokenizer import Tokenizer
from eval.measure import (
    describe_environment,
    format_median,
    make_goal,
    print_goals,
    print_table,
    summarize,
    take_turns,
    wait_for,
)
from eval.predict import answer_questions
from eval.speed_weights import HF_BF16, SIZES, load_transformers, prepare_checkpoint
from eval.task import Question
from model.config import LlavaConfig
from model.generate import generate
from model.llava import Llava
from model.weights import load_llava

REPEATS = 3
COUNTS = (5, 5, 6, 5, 6)  # questions about a picture, again and again: 5.4 on average
NUM_QUESTIONS = {"cpu": 27, "cuda": 540}
NUM_WORDS = range(5, 12)  # of a question
SUFFIX = "\nAnswer the question using a single word or phrase."
NEW_TOKENS = 3  # of an answer
PICTURE_SIZE = (640, 480)
PEER, ALONE, BATCHED = "transformers, one by one", "ours, one by one", "ours, batched"
GOALS = {("cpu", "1b"): 5.0, ("cuda", "7b"): 20.0}  # x the peer's questions per second


@dataclass(frozen=True)
class Workload:
    """What every contestant is to do."""

    folder: Path  # of the checkpoint
    config: LlavaConfig
    questions: Sequence[Question]
    pictures: Mapping[str, bytes]  # JPEGs by name
    device: str
    dtype: torch.dtype
    batch_size: int


Ask = Callable[[Sequence[Question]], Iterator[tuple[int, str]]]


class WordTokenizer(Tokenizer):
    """A token for each word and each sign, about as many as LLaMA's: the tiny model's pieces are far shorter."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.bos_token_id = vocab_size, 1
        self.eos_token_id = -1  # no token's: random weights would end an answer anywhere

    def encode(self, text: str, continues: bool = False) -> list[int]:
        return [3 + sum(word.encode()) * 7919 % (self.vocab_size - 3) for word in re.findall(r"\w+|\S|\n", text)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device, repeats = arguments.device, arguments.repeats or REPEATS
    environment = describe_environment(device)
    kind = device.partition(":")[0]
    has_bf16 = kind == "cuda" or "bf16" in environment["device"]
    dtype = arguments.dtype or ("bfloat16" if has_bf16 else "float32")
    config = SIZES[arguments.size]
    folder = prepare_checkpoint(arguments.checkpoint_dir, arguments.size, HF_BF16)
    questions, pictures = make_questions(arguments.questions or NUM_QUESTIONS[kind])
    work = Workload(folder, config, questions, pictures, device, getattr(torch, dtype), arguments.rows_at_once)
    rounds = take_turns({name: functools.partial(measure, name, work) for name in CONTESTANTS}, repeats)
    summary = summarize({name: [figures for figures, _ in rows] for name, rows in rounds.items()})
    answers = {name: rows[0][1] for name, rows in rounds.items()}
    speeds = {name: row["questions_per_s"] for name, row in summary["median"].items()}
    ratio = {name: {"questions_to_transformers": speed / speeds[PEER]} for name, speed in speeds.items()}
    agreeing = {
        name: {"as transformers": share_equal(answers[name], answers[PEER]),
               "as one by one": share_equal(answers[name], answers[ALONE])}
        for name in CONTESTANTS
    }  # fmt: skip
    return [
        {
            "suite": "eval",
            "size": arguments.size,
            "dtype": dtype,
            "repeats": repeats,
            "questions": len(questions),
            "pictures": len(pictures),
            "batch": work.batch_size,
            "new_tokens": NEW_TOKENS,
            "operations": count_operations(work),
            **summary,
            "ratio": ratio,
            "agreeing_answers": agreeing,
            "goals": list_goals(ratio[BATCHED], agreeing[BATCHED], kind, arguments.size, dtype),
            "environment": environment,
        }
    ]


def make_questions(number: int) -> tuple[list[Question], dict[str, bytes]]:
    """Return questions of random words, and the JPEGs they are about by name."""
    draw = random.Random(0)
    questions: list[Question] = []
    for place, count in enumerate(itertools.cycle(COUNTS)):
        for _ in range(min(count, number - len(questions))):
            words = (f"word{draw.randrange(10_000)}" for _ in range(draw.choice(NUM_WORDS)))
            text = " ".join(words) + "?" + SUFFIX
            questions.append(Question(str(len(questions)), f"{place}.jpg", text, (text,)))
        if len(questions) == number:
            break
    names = dict.fromkeys(question.image for question in questions)
    return questions, {name: make_jpeg(seed) for seed, name in enumerate(names)}


def make_jpeg(seed: int) -> bytes:
    """Return coarse noise, of about as many bytes as a photograph."""
    noise = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(PICTURE_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def measure(name: str, work: Workload) -> tuple[dict[str, float], list[str]]:
    """Load the model, warm up with as many questions as are in work together, then answer all; the process is new."""
    answer = CONTESTANTS[name](work, WordTokenizer(work.config.text.num_words))
    list(answer(work.questions[: work.batch_size if name == BATCHED else 1]))
    wait_for(work.device)
    started = time.perf_counter()
    answers = dict(answer(work.questions))
    wait_for(work.device)
    figures = {"questions_per_s": len(work.questions) / (time.perf_counter() - started)}
    return figures, [answers[index] for index in range(len(work.questions))]


def prepare_transformers(work: Workload, tokenizer: Tokenizer) -> Ask:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = load_transformers(work.folder, work.device).to(work.dtype)
    model.generation_config.eos_token_id = None
    size = work.config.vision.image_size
    process = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    def answer(questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        for index, question in enumerate(questions):
            picture = Image.open(io.BytesIO(work.pictures[question.image])).convert("RGB")
            pixels = process(pad_to_square(picture), return_tensors="pt")["pixel_values"].to(work.device, work.dtype)
            ids = render(question, work, tokenizer)[None].to(work.device)
            ids = torch.where(ids == IMAGE_TOKEN_ID, model.config.image_token_id, ids)
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
                max_new_tokens=NEW_TOKENS,
            )  # fmt: skip
            yield index, tokenizer.decode(out[0, ids.shape[1] :].tolist())

    return answer


def prepare_alone(work: Workload, tokenizer: Tokenizer) -> Ask:
    model = load_llava(work.folder, dtype=work.dtype, device=work.device)

    def answer(questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        for index, question in enumerate(questions):
            picture = open_image(io.BytesIO(work.pictures[question.image]))
            pixels = preprocess_image(picture, work.config.vision.image_size)[None].to(work.device)
            prompt = render(question, work, tokenizer)
            (ids,) = generate(model, [prompt], pixels, tokenizer.eos_token_id, NEW_TOKENS)
            yield index, tokenizer.decode(ids)

    return answer


def prepare_batched(work: Workload, tokenizer: Tokenizer) -> Ask:
    model = load_llava(work.folder, dtype=work.dtype, device=work.device)

    def open_picture(name: str) -> Image.Image:
        return open_image(io.BytesIO(work.pictures[name]))

    def answer(questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        size = work.batch_size
        for index, given in answer_questions(model, tokenizer, questions, open_picture, NEW_TOKENS, batch_size=size):
            yield index, given.text

    return answer


CONTESTANTS: dict[str, Callable[[Workload, Tokenizer], Ask]] = {
    PEER: prepare_transformers,
    ALONE: prepare_alone,
    BATCHED: prepare_batched,
}


def render(question: Question, work: Workload, tokenizer: Tokenizer) -> Tensor:
    """Return the prompt (T,), with a placeholder for every patch of the picture."""
    turns = [Turn("human", question.turns[0], has_image=True)]
    return torch.tensor(render_conversation(turns, tokenizer, work.config.vision.num_patches).input_ids)


def share_equal(first: Sequence[str], second: Sequence[str]) -> float:
    return statistics.mean(our == their for our, their in zip(first, second, strict=True))


def count_operations(work: Workload) -> dict[str, float]:
    """Return the floating-point operations of all answers, one by one and with every picture's trunk shared.

    A tower V for each picture, L(t, n) for n tokens behind t in the language model, with trunks of t, prompts of p:
        one by one   questions * V + sum of L(0, p) + answers
        shared       pictures * V + pictures * L(0, t) + sum of L(t, p - t) + answers
    """
    text, vision = work.config.text, work.config.vision
    with torch.device("meta"):
        model = Llava(work.config)
    layers = sum(parameter.numel() for parameter in model.language_model.layers.parameters())

    def pass_through(start: int, count: int) -> float:
        seen = count * start + count * (count + 1) / 2
        return 2 * layers * count + 4 * text.hidden_size * text.num_hidden_layers * seen

    used = model.vision_tower.layers[: model.vision_tower.num_used_layers]
    weights = sum(parameter.numel() for module in (*used, model.projector) for parameter in module.parameters())
    tower = 2 * weights * vision.num_patches + 4 * vision.hidden_size * len(used) * vision.num_patches**2
    tokenizer = WordTokenizer(text.num_words)
    prompts = [render(question, work, tokenizer) for question in work.questions]
    lengths = [len(prompt) for prompt in prompts]
    trunk = int((prompts[0] == IMAGE_TOKEN_ID).nonzero().max()) + 1
    head = 2 * text.vocab_size * text.hidden_size * NEW_TOKENS * len(prompts)
    answers = head + sum(pass_through(length, NEW_TOKENS - 1) for length in lengths)
    num_pictures = len(work.pictures)
    return {
        "one by one": len(prompts) * tower + sum(pass_through(0, length) for length in lengths) + answers,
        "shared": num_pictures * (tower + pass_through(0, trunk))
        + sum(pass_through(trunk, length - trunk) for length in lengths)
        + answers,
    }


def list_goals(
    ratio: dict[str, float], agreeing: dict[str, float], kind: str, size: str, dtype: str
) -> list[dict[str, Any]]:
    """Speed has a goal where its size is the one meant; in fp32 answers are the same, but for a tie of two words."""
    goals = []
    if (kind, size) in GOALS:
        what = f"{BATCHED}: x transformers' questions/s"
        goals.append(make_goal(what, ratio["questions_to_transformers"], at_least=GOALS[kind, size]))
    if dtype == "float32":
        goals += [make_goal(f"{BATCHED}: answers {key}", share, at_least=0.99) for key, share in agreeing.items()]
    return goals


def print_result(result: dict[str, Any]) -> None:
    """Print one row per contestant, what arithmetic allows, then the goals."""
    print(
        f"{result['questions']} questions about {result['pictures']} pictures with {result['size']} in "
        f"{result['dtype']}, {result['new_tokens']} tokens an answer, {result['batch']} rows when batched: "
        f"medians (lowest to highest) of {result['repeats']}\n"
    )
    rows = [["", "questions/s", "x peer", "answers as peer's", "as ours one by one"]]
    for name, ratio in result["ratio"].items():
        agreeing = result["agreeing_answers"][name]
        rows.append(
            [
                name,
                format_median(result, name, "questions_per_s", digits=2),
                f"{ratio['questions_to_transformers']:.2f}",
                *(f"{100 * share:.1f} %" for share in agreeing.values()),
            ]
        )
    print_table(rows)
    alone, shared = result["operations"]["one by one"], result["operations"]["shared"]
    print(
        f"arithmetic: {alone / 1e12:.4g} TFLOP one by one, {shared / 1e12:.4g} with trunks shared: "
        f"{alone / shared:.2f} x less; what is beyond that is the batch's and the code's\n"
    )
    if result["goals"]:
        print_goals(result["goals"])
