"""Writes Hugging Face's `tokenizer.json` for a SentencePiece vocabulary, in the ways that exporters have."""

import json
from pathlib import Path

import sentencepiece

from data.tokenizer import SPACE

EXPORTERS = ("legacy", "metaspace", "llava_hf", "transformers_5")


def make_vocab(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Return the ids by piece."""
    return {processor.id_to_piece(i): i for i in range(processor.vocab_size())}


def make_merges(processor: sentencepiece.SentencePieceProcessor, by_score: bool = True) -> list[tuple[str, str]]:
    """Return every pair of pieces whose whole is a piece, as SentencePiece prefers them or in the order of ids."""
    vocab = make_vocab(processor)
    pairs = [(piece[:cut], piece[cut:]) for piece in vocab for cut in range(1, len(piece))]
    pairs = [(left, right) for left, right in pairs if left in vocab and right in vocab]
    if by_score:
        pairs.sort(key=lambda pair: (-processor.get_score(vocab["".join(pair)]), -len(pair[0]), -len(pair[1])))
    return pairs


def make_tokenizer_json(processor: sentencepiece.SentencePieceProcessor, exporter: str) -> dict:
    """Return the file's content. What `Tokenizer` has to leave alone differs as widely as in published files."""
    control = ["<unk>", "<s>", "</s>", *(["<image>", "<pad>"] if exporter == "llava_hf" else [])]
    vocab = make_vocab(processor)
    ids = {token: vocab.get(token, len(vocab) + place - 3) for place, token in enumerate(control)}
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    merges = make_merges(processor, by_score=exporter != "transformers_5")
    is_old = exporter in ("legacy", "llava_hf")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, "special": True, **flags} for token, i in ids.items()],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if is_old else None,
        "pre_tokenizer": None if is_old else metaspace,
        "post_processor": None if exporter == "transformers_5" else template,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges] if is_old else [list(pair) for pair in merges],
        },
    }


def write_tokenizer_json(processor: sentencepiece.SentencePieceProcessor, exporter: str, folder: Path) -> Path:
    """Write the file into `folder`, which is made, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(make_tokenizer_json(processor, exporter), ensure_ascii=False), encoding="utf-8")
    return file
