"""SentencePiece text <-> ids, and a decoder for streams that never shows half a character."""

import codecs
from pathlib import Path

import sentencepiece


class Tokenizer:
    """A LLaMA-style `tokenizer.model`: BPE with byte fallback and a leading-space marker."""

    def __init__(self, file: Path) -> None:
        """Raises: FileNotFoundError or ValueError when `file` is missing or no SentencePiece model."""
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer {file} is missing")
        self.file = file
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromFile(str(file))
        except RuntimeError as error:
            raise ValueError(f"{file} is not a SentencePiece model: {error}") from error
        self.bos_token_id: int = self.processor.bos_id()
        self.eos_token_id: int = self.processor.eos_id()
        self.vocab_size: int = self.processor.vocab_size()
        # Bytes outside the vocabulary are spelled <0xNN>; streaming has to reassemble them into characters.
        self.byte_of_id = {
            index: int(self.processor.id_to_piece(index)[3:5], 16)
            for index in range(self.vocab_size)
            if self.processor.is_byte(index)
        }

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Return the ids of `text`, without BOS or EOS; control tokens typed in the text stay text.

        Args:
            continues: the text follows a token directly (as `USER:` follows `</s>`), so it gets no leading space.
        """
        if not continues:
            return self.processor.EncodeAsIds(text)
        # A newline is a byte token: nothing merges across it, so what follows it is encoded as if it stood alone.
        marker = self.processor.EncodeAsIds("\n")
        return self.processor.EncodeAsIds("\n" + text)[len(marker) :]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, control tokens left out."""
        return self.processor.DecodeIds(ids)


class StreamDecoder:
    """Turns tokens into text as they come; holds back a character until its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.at_start = True

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes, possibly none. Joined, the pieces are `decode` of all ids."""
        if token_id in self.tokenizer.byte_of_id:
            piece = self.utf8.decode(bytes([self.tokenizer.byte_of_id[token_id]]))
        elif self.tokenizer.processor.is_control(token_id):
            return ""
        elif self.tokenizer.processor.is_unknown(token_id):
            piece = self.utf8.decode(self.tokenizer.decode([token_id]).encode("utf-8"))
        else:
            text = self.tokenizer.processor.id_to_piece(token_id).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
            if self.at_start:
                text = text.removeprefix(" ")  # the marker before the first word is no space
            piece = self.utf8.decode(text.encode("utf-8"))
        self.at_start = False
        return piece

    def finish(self) -> str:
        """Return what is still held back: an unfinished character becomes U+FFFD."""
        return self.utf8.decode(b"", final=True)
