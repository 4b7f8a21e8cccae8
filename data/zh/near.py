"""What a data set must not have twice, pictures and texts that are nearly the same, or not at all, questions of tests.

Pictures are compared by `data.similar`. Texts are compared by the sets of 5 characters that follow each other in them
(Jaccard: those in both by those in either). The comparison is exact: two texts can only be alike if they share one of
their rarest grams, so the others are never compared.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.conversation import IMAGE_MARKER
from data.rows import stream_rows
from data.similar import MAX_DISTANCE, is_plain
from data.zh.filters import squeeze
from data.zh.record import Reply

GRAM = 5  # characters
SHORT_TEXT = 20  # characters of answers; below, dialogues about different pictures may well be the same
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with its bits well mixed: grams become 64-bit numbers, by multiplication

Fault = tuple[str, str]  # why a dialogue is dropped, and the detail


def find_like_pictures(hashes: Sequence[int]) -> list[int | None]:
    """Return, for each picture, the place of an earlier one that looks like it and is kept itself; None to keep it.

    Args:
        hashes: `data.similar.hash_picture` of each, the one to prefer first.
    """
    kept = np.empty(len(hashes), dtype=np.uint64)
    places: list[int] = []  # of those in `kept`
    found: list[int | None] = []
    for place, one in enumerate(np.array(hashes, dtype=np.uint64)):
        near = np.bitwise_count(kept[: len(places)] ^ one) <= MAX_DISTANCE
        plain = bool(is_plain(one))
        found.append(places[int(near.argmax())] if near.any() and not plain else None)
        if found[-1] is None and not plain:
            kept[len(places)] = one
            places.append(place)
    return found


def find_like_texts(texts: Sequence[str], min_jaccard: float) -> list[int | None]:
    """Return, for each text, the place of an earlier one that is nearly the same and is kept itself; None to keep it.

    Texts should be squeezed; those shorter than a gram have no like.
    """
    sets, sizes = _number_grams(texts)
    shared: defaultdict[int, list[int]] = defaultdict(list)  # by rare gram: the kept texts that have it
    found: list[int | None] = []
    for place, grams in enumerate(sets):
        size = int(sizes[place])
        # Two sets that are alike share at least min_jaccard of either: of each, so many may miss, and one more not.
        rare = grams[: size - int(np.ceil(min_jaccard * size - 1e-9)) + 1].tolist() if size else []
        near = sorted({other for gram in rare for other in shared[gram]})
        found.append(next((one for one in near if _is_like(grams, sets[one], min_jaccard)), None))
        if found[-1] is None:
            for gram in rare:
                shared[gram].append(place)
    return found


def _number_grams(texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the grams of each text, as numbers that grow with how common a gram is, in rising order; and how many."""
    hashed = [np.unique(_hash_grams(text)) for text in texts]
    sizes = np.array([len(grams) for grams in hashed], dtype=np.int64)
    if not sizes.sum():
        return hashed, sizes
    _, inverse, counts = np.unique(np.concatenate(hashed), return_inverse=True, return_counts=True)
    ranks = np.empty(len(counts), dtype=np.uint32)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts), dtype=np.uint32)
    numbers = np.split(ranks[inverse], np.cumsum(sizes)[:-1])
    return [np.sort(grams) for grams in numbers], sizes


def _hash_grams(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32).astype(np.uint64)
    num_grams = max(0, len(codes) - GRAM + 1)
    hashed = np.zeros(num_grams, dtype=np.uint64)
    for place in range(GRAM):
        hashed = (hashed ^ codes[place : place + num_grams]) * FACTOR
        hashed ^= hashed >> np.uint64(29)
    return hashed


def _is_like(one: np.ndarray, other: np.ndarray, min_jaccard: float) -> bool:
    low, high = sorted((len(one), len(other)))
    if low < min_jaccard * high:  # of too different a length
        return False
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both >= min_jaccard * (len(one) + len(other) - both)


def find_text_faults(replies: Sequence[Reply], min_jaccard: float, max_same: int) -> dict[str, Fault]:
    """Return which dialogues, by their keys, have the text of an earlier one, or long answers that are nearly its."""
    answers = {reply.key: squeeze("".join(answer for _, answer in reply.turns)) for reply in replies}
    same: defaultdict[str, list[Reply]] = defaultdict(list)
    faults: dict[str, Fault] = {}
    for reply in replies:
        others = same["\n".join(squeeze(text) for turn in reply.turns for text in turn)]
        limit = max_same if len(answers[reply.key]) < SHORT_TEXT else 1
        if len(others) >= limit or any(other.sha256 == reply.sha256 for other in others):
            faults[reply.key] = "text: the same as another's", others[0].key
        else:
            others.append(reply)
    long = [reply for reply in replies if reply.key not in faults and len(answers[reply.key]) >= SHORT_TEXT]
    places = find_like_texts([answers[reply.key] for reply in long], min_jaccard)
    for reply, place in zip(long, places, strict=True):
        if place is not None:
            faults[reply.key] = "text: answers nearly the same as another's", long[place].key
    return faults


def load_questions(file: Path) -> set[str]:
    """Return the squeezed questions of a file: conversation rows (.json, .jsonl), or one question a line.

    Of a question with a prompt below it ("请用一个词回答。") the first line counts as well as the whole.
    Raises: FileNotFoundError, or ValueError naming the file for what is broken or holds no question.
    """
    questions = set()
    for text in _read_questions(file):
        plain = text.replace(IMAGE_MARKER, "").strip()
        questions |= {squeeze(plain), squeeze(plain.partition("\n")[0])}
    questions.discard("")
    if not questions:
        raise ValueError(f"{file} has no questions, expected one a line, or rows with 'conversations' or 'question'")
    return questions


def _read_questions(file: Path) -> Iterator[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}, a list of questions to exclude, is missing")
    if file.suffix not in {".json", ".jsonl"}:
        try:
            yield from file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from error
        return
    for row in stream_rows(file):
        turns = row.get("conversations") if isinstance(row, dict) else None
        if isinstance(turns, list):
            yield from (
                str(turn.get("value")) for turn in turns if isinstance(turn, dict) and turn.get("from") == "human"
            )
        elif isinstance(row, dict) and isinstance(row.get("question"), str):
            yield row["question"]
