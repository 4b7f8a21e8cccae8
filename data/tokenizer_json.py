"""Write a LLaMA vocabulary as Hugging Face's `tokenizer.json`, which can be read without SentencePiece."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
CONTROL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 of every LLaMA vocabulary


def write_tokenizer_json(source: Path, added_tokens: Sequence[str], file: Path) -> None:
    """Write the vocabulary of a `tokenizer.model` or `tokenizer.json`, and behind it further tokens as <image>.

    Note: as LLaMA's tokenizer without its "legacy" flag, a space marker is put before the first word of a text, and
    not behind a special token within it.
    """
    if source.suffix == ".json":
        model = json.loads(source.read_text(encoding="utf-8"))["model"]
    else:
        model = _model_section(sentencepiece.SentencePieceProcessor(model_file=str(source)))
    special = {**dict(zip(CONTROL, range(3), strict=True))}
    special |= {token: len(model["vocab"]) + place for place, token in enumerate(added_tokens)}
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, place) for token, place in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [special["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _model_section(processor: Any) -> dict[str, Any]:
    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": CONTROL[0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece: index for index, piece in enumerate(pieces)},
        "merges": _list_merges(processor, pieces),
    }


def _list_merges(processor: Any, pieces: Sequence[str]) -> list[list[str]]:
    """SentencePiece merges the pair whose whole has the highest score, so each whole's pairs take its rank."""
    words = {
        piece: index
        for index, piece in enumerate(pieces)
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))
    }
    merges = []
    for piece, index in words.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = sorted((words[left], words[right]) for left, right in pairs if left in words and right in words)
        merges += [(-processor.get_score(index), index, left, right) for left, right in found]
    return [[pieces[left], pieces[right]] for _, _, left, right in sorted(merges)]


def _added_token(content: str, index: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": True}
