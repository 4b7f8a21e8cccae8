"""Text <-> ids with LLaMA's vocabulary, from either of its files, and a decoder that never shows half a character.

`tokenizer.model` (SentencePiece) and `tokenizer.json` (Hugging Face) hold the same BPE: pieces, in which "▁" stands for
a space, and bytes for characters that no piece has. Of the JSON only pieces and merges are read: its other parts differ
between exporters (▁ before a text or not), and would take "</s>" or "<image>" typed by a user for a control token.
"""

import codecs
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import models

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
UNKNOWN_TEXT = " \N{DOUBLE QUESTION MARK} "  # no text becomes <unk>, but a model can emit it
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
WORD = re.compile(f"[ {SPACE}]*[^ {SPACE}]+|[ {SPACE}]+")  # with the spaces before it
MAX_KNOWN_WORDS = 2**15  # a few megabytes in each loader process
MAX_KNOWN_CHARACTERS = 32  # of a word: longer ones, such as sentences in Chinese, hardly ever come again

Split = Callable[[str], list[int]]


def find_tokenizer(*folders: Path) -> Path:
    """Return the tokenizer file of the first folder that has one.

    Raises: FileNotFoundError saying what was looked for, and where.
    """
    for folder in folders:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"no tokenizer: looked for {' and '.join(TOKENIZER_FILES)} in {', '.join(map(str, folders))}; "
        "copy the file that the language model came with into one of these"
    )


class Tokenizer:
    """BPE with byte fallback. No text becomes a control token: only `render_conversation` places those."""

    def __init__(self, file: Path) -> None:
        """Raises: FileNotFoundError or ValueError when `file` is missing or not a LLaMA-style vocabulary."""
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer {file} is missing")
        self.file = file
        content = file.read_bytes()
        is_json = content.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"{")
        try:
            self.pieces, control, self._split = (_parse_json if is_json else _parse_sentencepiece)(content)
        except ValueError as error:
            raise ValueError(f"{file} is not {error}: take the file that the language model came with") from error
        self.vocab_size = len(self.pieces)
        self.bos_token_id = self.pieces.index(BOS)
        self.eos_token_id = self.pieces.index(EOS)
        # LLaMA's pieces have spaces at their start alone, so nothing merges across words: each can be split by itself,
        # and is remembered, which takes a sixth of the time of splitting whole texts.
        self._merges_words = any(SPACE in piece.lstrip(SPACE) for piece in self.pieces)
        self._ids_of_word: dict[str, list[int]] = {}
        # Bytes outside the vocabulary are spelled <0xNN>; streaming has to reassemble them into characters.
        self.byte_of_id = {i: BYTE_PIECES[piece] for i, piece in enumerate(self.pieces) if piece in BYTE_PIECES}
        self.text_of_id = {
            i: UNKNOWN_TEXT if piece == UNKNOWN else piece
            for i, piece in enumerate(self.pieces)
            if piece not in BYTE_PIECES and piece not in control
        }

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Return the ids of `text`, without BOS or EOS; control tokens typed in the text stay text.

        Args:
            continues: the text follows a token directly (as `USER:` follows `</s>`), so it gets no leading space.
        Raises: ValueError for half a surrogate pair, which is no text.
        """
        text.encode("utf-8")
        if not text:
            return []
        whole = text if continues else " " + text
        ids: list[int] = []
        for word in [whole] if self._merges_words else WORD.findall(whole):
            ids += self._ids_of_word.get(word) or self._split_word(word)
        return ids

    def _split_word(self, word: str) -> list[int]:
        """Return the ids of a word and remember them, if it may come again."""
        ids = self._split(word)
        if len(word) <= MAX_KNOWN_CHARACTERS:
            if len(self._ids_of_word) >= MAX_KNOWN_WORDS:
                self._ids_of_word.clear()
            self._ids_of_word[word] = ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`. Control tokens and ids outside the vocabulary have none."""
        decoder = StreamDecoder(self)
        return "".join(map(decoder.push, ids)) + decoder.finish()

    def name(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it; a head may have rows for more tokens, which have no spelling."""
        return self.pieces[token_id] if token_id < self.vocab_size else f"<{token_id}>"


class StreamDecoder:
    """Turns tokens into text as they come; holds back a character until its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.held = b""  # the beginning of a character
        self.is_at_start = True

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes, possibly none. Joined, the pieces are `decode` of all ids."""
        byte = self.tokenizer.byte_of_id.get(token_id)
        if byte is not None:
            self.is_at_start = False
            self.held += bytes([byte])
            return self._release()
        text = self.tokenizer.text_of_id.get(token_id, "")
        if text and self.is_at_start:
            self.is_at_start = False
            text = text.removeprefix(SPACE)  # the marker before the first word is no space
        return self.finish() + text.replace(SPACE, " ")

    def finish(self) -> str:
        """Return what is still held back: an unfinished character becomes U+FFFD for each of its bytes."""
        return self._release(final=True)

    def _release(self, final: bool = False) -> str:
        text = ""
        while self.held:
            try:
                character, num_bytes = codecs.utf_8_decode(self.held, "strict", final)
            except UnicodeDecodeError:
                character, num_bytes = "\N{REPLACEMENT CHARACTER}", 1  # for each wrong byte, as in SentencePiece
            if num_bytes == 0:
                break
            text += character
            self.held = self.held[num_bytes:]
        return text


def cut_at_stop(text: str, stops: Sequence[str], is_whole: bool) -> tuple[str, bool]:
    """Return an answer up to the first of `stops`, and whether there was one.

    Where the answer is not whole yet, what may be the beginning of a stop is left out, too: what was shown once is
    never taken back.
    """
    places = [text.index(stop) for stop in stops if stop in text]
    if places:
        return text[: min(places)], True
    unclear = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text if is_whole else text[: len(text) - unclear], False


def _parse_sentencepiece(content: bytes) -> tuple[list[str], set[str], Split]:
    """Return the pieces by id, those that are control tokens, and the function that splits text.

    Raises: ValueError whose text goes on from "the file is not".
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise ValueError(f"a SentencePiece model or a tokenizer.json ({error})") from error
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    _check_pieces(pieces)
    control = {piece for i, piece in enumerate(pieces) if processor.is_control(i)}
    return pieces, control, functools.partial(_split_sentencepiece, processor)


def _split_sentencepiece(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    # SentencePiece puts ▁ before every text. A newline is a byte token: nothing merges across it, so what follows it
    # is split as it stands.
    return processor.EncodeAsIds("\n" + text)[2:]


def _parse_json(content: bytes) -> tuple[list[str], set[str], Split]:
    """Like `_parse_sentencepiece`, from the part `model` of a Hugging Face tokenizer."""
    try:
        document = json.loads(content)
        model, added = document["model"], document.get("added_tokens", [])
        if model.get("type") != "BPE" or model.get("byte_fallback") is not True:
            raise ValueError("a LLaMA-style tokenizer.json (its 'model' needs type BPE and byte_fallback true)")
        vocab = model["vocab"]
        control = {BOS, EOS, *(token["content"] for token in added)} - {UNKNOWN}
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        pieces = sorted(vocab, key=lambda piece: vocab[piece])
        is_complete = all(len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys() for pair in pairs)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a whole tokenizer.json ({type(error).__name__}: {error})") from error
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("a LLaMA-style tokenizer.json (the ids of its 'vocab' need to be 0, 1, 2, ...)")
    if not is_complete:
        raise ValueError("a LLaMA-style tokenizer.json (its 'merges' need to be pairs of 'vocab' that are in 'vocab')")
    _check_pieces(pieces)
    # In SentencePiece these pieces never arise by merging, but exporters list every merge whose result has an id.
    reserved = {UNKNOWN, *control, *BYTE_PIECES}
    pairs = [pair for pair in pairs if "".join(pair) not in reserved]
    # LLaMA joins spaces last; transformers 5 lists merges by the id of their result, where two spaces come first.
    pairs.sort(key=lambda pair: set("".join(pair)) == {SPACE})
    bpe = models.BPE(vocab, pairs, byte_fallback=True, unk_token=UNKNOWN)
    return pieces, control, functools.partial(_split_bpe, bpe)


def _split_bpe(bpe: models.BPE, text: str) -> list[int]:
    return [token.id for token in bpe.tokenize(text.replace(" ", SPACE))]


def _check_pieces(pieces: list[str]) -> None:
    missing = sorted({UNKNOWN, BOS, EOS, *BYTE_PIECES} - set(pieces))
    if missing:
        raise ValueError(f"a LLaMA-style vocabulary (it lacks {', '.join(missing[:5])}{', ...' * (len(missing) > 5)})")
