"""Build the tiny model's vocabulary from the texts in this folder: `python -m data.tiny.build_tokenizer`.

768 pieces: 3 control tokens, 256 bytes, the rest learned. The result is committed; building again gives the same.
"""

import argparse
import io
import re
from pathlib import Path

import sentencepiece

from data.conversation import SYSTEM

FOLDER = Path(__file__).parent
VOCAB_SIZE = 768
# The system prompt stands in every conversation, so its words should be whole pieces before any others are.
SYSTEM_WEIGHT = 5000
TEXT_WEIGHT = 100


def build_tokenizer() -> bytes:
    """Return a SentencePiece model with LLaMA's conventions: byte fallback, no normalisation, <s> 1, </s> 2."""
    english = (FOLDER / "corpus_en.txt").read_text(encoding="utf-8").splitlines()
    chinese = (FOLDER / "corpus_zh.txt").read_text(encoding="utf-8")
    # One character a line: otherwise whole Chinese questions, written without spaces, would become single pieces.
    characters = re.findall(r"[\u3000-\u303f\u4e00-\u9fff]", chinese)
    lines = [f"{SYSTEM} USER: ASSISTANT:"] * SYSTEM_WEIGHT + english * TEXT_WEIGHT + characters
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "tokenizer.model")
    out = parser.parse_args().out
    out.write_bytes(build_tokenizer())
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
