"""Answer many questions about many pictures, fast: what questions share is computed once, and no row waits for another.

All questions about a picture start with the same tokens, the picture among them: their trunk. It runs once and is
stored once, however many questions branch off. Questions in work are rows; as soon as one has its answer, the next
question takes its row, so a long answer does not hold up short ones. New questions and next words of old ones run
together, their tokens end to end: nothing is spent on padding, but in attention.

Shapes: N images, P placeholders per image, G trunks, J branches of each.
"""

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from data.conversation import IMAGE_TOKEN_ID, Turn, render_conversation
from data.image import preprocess_image
from data.tokenizer import Tokenizer
from eval.task import Question
from model.generate import BranchedCache, extend_branches, prefill_trunks
from model.llava import Llava

MAX_TOKENS_AT_ONCE = 4096  # bounds what a pass takes of memory; larger ones are no faster


@dataclass(frozen=True)
class Answer:
    text: str
    num_prompt_tokens: int
    num_tokens: int  # without its end


@dataclass
class _Branch:
    """A question in work."""

    index: int
    pending: list[int]  # tokens the cache does not hold yet: first the prompt's, then always the last one
    num_prompt_tokens: int
    answer: list[int] = field(default_factory=list)


@dataclass
class _Group:
    """What is asked about one picture."""

    image: str
    waiting: deque[_Branch]


def answer_questions(
    model: Llava,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    open_picture: Callable[[str], Image.Image],
    max_new_tokens: int,
    template: str = "vicuna_v1",
    batch_size: int = 32,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index of a question, its greedy answer) as they are ready, in no particular order.

    Args:
        questions: those about one picture side by side, or the picture is read once for each stretch.
        batch_size: questions in work at a time. Rows cost memory, and so do the trunks of the pictures they are about.
    Raises: ValueError before the first answer for a question that does not fit the model, or when a picture cannot be
        read, saying which.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens} and batch_size = {batch_size}, expected at least 1 of each"
        )
    limit = model.config.text.max_position_embeddings
    # Trunks that are in work together are equally long: questions without a picture are answered by themselves.
    prompts: dict[bool, list[tuple[str, _Branch]]] = {True: [], False: []}
    trunks: dict[bool, list[int]] = {}
    for index, question in enumerate(questions):
        has_image = question.image != ""
        trunk, others = _split_prompt(question, tokenizer, model.config.vision.num_patches, template)
        length = len(trunk) + len(others)
        if length + max_new_tokens > limit:
            raise ValueError(
                f"question {question.question_id} has {length} tokens, and an answer of {max_new_tokens} more would "
                f"exceed the model's {limit} positions: shorten the question or max_new_tokens"
            )
        assert trunks.setdefault(has_image, trunk) == trunk, "one template makes one trunk"
        prompts[has_image].append((question.image, _Branch(index, others, length)))
    for has_image, trunk in trunks.items():
        by_picture = itertools.groupby(prompts[has_image], key=lambda prompt: prompt[0])
        groups = [_Group(image, deque(branch for _, branch in prompts)) for image, prompts in by_picture]
        end = tokenizer.eos_token_id
        for branch in _Pool(model, torch.tensor(trunk), groups, open_picture, max_new_tokens, end, batch_size).run():
            text = tokenizer.decode(branch.answer).strip()
            yield branch.index, Answer(text, branch.num_prompt_tokens, len(branch.answer))


def _split_prompt(
    question: Question, tokenizer: Tokenizer, num_patches: int, template: str
) -> tuple[list[int], list[int]]:
    """Return a prompt's tokens up to the picture's last placeholder (without a picture, BOS), and those that follow."""
    has_image = question.image != ""
    turns = [
        Turn(("human", "gpt")[number % 2], text, has_image and number == 0)
        for number, text in enumerate(question.turns)
    ]
    ids = render_conversation(turns, tokenizer, 1, template).input_ids
    if not has_image:
        return ids[:1], ids[1:]
    place = ids.index(IMAGE_TOKEN_ID)
    return ids[:place] + [IMAGE_TOKEN_ID] * num_patches, ids[place + 1 :]


def choose_num_branches(counts: Sequence[int], batch_size: int) -> int:
    """Return J for pictures with so many questions: the one that takes least, if a trunk costs as much as a branch.

    Few large trunks are read less often, but leave branches without a question. There are four pictures in work where
    there can be, so that the last question about one of them leaves at most a quarter of the rows without work.
    """
    largest = max(1, batch_size // min(4, len(counts)))
    pictures = Counter(counts)
    return min(
        range(1, largest + 1),
        key=lambda size: sum(number * -(-count // size) * (size + 1) for count, number in pictures.items()),
    )


class _Pool:
    """G pictures and up to J questions about each, in work together."""

    def __init__(
        self,
        model: Llava,
        trunk: Tensor,
        groups: Sequence[_Group],
        open_picture: Callable[[str], Image.Image],
        max_new_tokens: int,
        eos_token_id: int,
        batch_size: int,
    ) -> None:
        self.model, self.trunk, self.groups, self.open_picture = model, trunk, groups, open_picture
        self.max_new_tokens, self.eos_token_id = max_new_tokens, eos_token_id
        num_branches = choose_num_branches([len(group.waiting) for group in groups], batch_size)
        num_trunks = min(batch_size // num_branches, len(groups))
        self.cache = BranchedCache(model.language_model, num_trunks, num_branches, len(trunk))
        self.in_work: list[_Group | None] = [None] * num_trunks
        self.rows: dict[int, _Branch] = {}  # by their number in the cache

    def run(self) -> Iterator[_Branch]:
        """Yield every question when it has its answer."""
        with contextlib.closing(self.read_ahead()) as pictures:
            while True:
                self.admit(pictures)
                if not self.rows:
                    return
                for rows in self.split_rows():
                    yield from self.extend(rows)

    def read_ahead(self) -> Generator[tuple[_Group, Tensor | None]]:
        """Yield each picture's questions and pixels (3, S, S); a thread prepares as many ahead as are in work."""
        thread = ThreadPoolExecutor(1)
        coming: deque[tuple[_Group, Future[Tensor | None]]] = deque()
        groups = iter(self.groups)
        try:
            while True:
                for group in itertools.islice(groups, 2 * len(self.in_work) - len(coming)):
                    coming.append((group, thread.submit(self.read_picture, group)))
                if not coming:
                    return
                group, pixels = coming.popleft()
                yield group, pixels.result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def read_picture(self, group: _Group) -> Tensor | None:
        if not group.image:
            return None
        try:
            return preprocess_image(self.open_picture(group.image), self.model.config.vision.image_size)
        except (ValueError, OSError) as error:
            raise ValueError(f"picture {group.image}: {error}") from error

    def admit(self, pictures: Iterator[tuple[_Group, Tensor | None]]) -> None:
        """Give free places to the next pictures, and free rows to what is asked about those in work."""
        num_branches = self.cache.num_branches
        taken = {row // num_branches for row in self.rows}
        free = [
            place for place, group in enumerate(self.in_work) if place not in taken and not (group and group.waiting)
        ]
        new = list(zip(free, pictures, strict=False))
        at_once = max(1, MAX_TOKENS_AT_ONCE // len(self.trunk))
        for start in range(0, len(new), at_once):
            self.prefill(new[start : start + at_once])
        for row in range(len(self.cache.lengths)):
            group = self.in_work[row // num_branches]
            if row not in self.rows and group and group.waiting:
                self.rows[row] = group.waiting.popleft()

    @torch.inference_mode()
    def prefill(self, new: Sequence[tuple[int, tuple[_Group, Tensor | None]]]) -> None:
        """Run the trunks of new pictures: of each its place, what is asked about it and its pixels."""
        for place, (group, _) in new:
            self.in_work[place] = group
        pixels = [pixels.to(self.cache.device) for _, (_, pixels) in new if pixels is not None]
        features = self.model.encode_images(torch.stack(pixels)) if pixels else None
        prefill_trunks(self.model, self.cache, [place for place, _ in new], self.trunk, features)

    def split_rows(self) -> Iterator[list[int]]:
        """Yield the rows in pieces to run together: in attention all are as wide as the longest."""
        piece: list[int] = []
        trunks: set[int] = set()
        for row in sorted(self.rows, key=lambda row: len(self.rows[row].pending)):
            trunks.add(row // self.cache.num_branches)
            width = len(self.rows[row].pending)
            if piece and len(trunks) * self.cache.num_branches * width > MAX_TOKENS_AT_ONCE:
                yield piece
                piece, trunks = [], {row // self.cache.num_branches}
            piece.append(row)
        yield piece

    def extend(self, rows: Sequence[int]) -> Iterator[_Branch]:
        """Run what is pending of some rows; yield those that have ended, and free them."""
        logits = extend_branches(self.model, self.cache, rows, [self.rows[row].pending for row in rows])
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            branch = self.rows[row]
            if token != self.eos_token_id:
                branch.answer.append(token)
                branch.pending = [token]
            if token == self.eos_token_id or len(branch.answer) == self.max_new_tokens:
                del self.rows[row]
                self.cache.lengths[row] = 0
                yield branch
