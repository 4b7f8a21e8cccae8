"""Text <-> ids: contexts, streams that never show half a character, and the committed vocabulary."""

import random
import re
from pathlib import Path

import pytest
import sentencepiece

from data.conversation import SYSTEM
from data.tiny.build_tokenizer import VOCAB_SIZE, build_tokenizer
from data.tokenizer import StreamDecoder, Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NUM_STRINGS = 3000
FRAGMENTS = (
    *("is there a red circle?", "yes", "Hello", "3.14", "USER:", "ASSISTANT: ", "don't", "naïve", "<image>", "</s>"),
    *("<s>", "<unk>", "<0x0A>", "图中是什么", "圆形。", "龘", "😀", "👩‍👩‍👧", "🇨🇳", "é", "한국", "\n", "\n\n", " "),
    *("  ", "    ", "\t", "\r\n", "\x00", "\N{NO-BREAK SPACE}", "\N{IDEOGRAPHIC SPACE}", "a", ",", "{}", "\\"),
)


def make_strings(seed: int) -> list[str]:
    """Return random mixtures of scripts, spaces, newlines and what looks like control tokens."""
    source = random.Random(seed)
    return ["".join(source.choices(FRAGMENTS, k=source.randint(0, 9))) for _ in range(NUM_STRINGS)]


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the pieces that a reader sees, one for every token and the end."""
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


def test_round_trip(tokenizer: Tokenizer) -> None:
    """Nothing is normalised: what a question says is what the model reads."""
    for text in make_strings(0):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([1, *tokenizer.encode(text), 2]) == text


@pytest.mark.parametrize("context", ["Hello.\n", "a😀", "\n", "图龘\n\n", "</s>\n"])
def test_a_continuation_equals_the_rest_of_a_longer_text(tokenizer: Tokenizer, context: str) -> None:
    """`USER:` after `</s>` has no leading space, although SentencePiece gives one to every text."""
    before = tokenizer.encode(context)
    for text in ["USER:", "USER: ", " USER:", "hello world", "", " ", "\n", "图中", "😀", *make_strings(1)[:300]]:
        assert tokenizer.encode(context + text) == before + tokenizer.encode(text, continues=True)


def test_only_a_fresh_text_gets_a_leading_space(llama_tokenizer: Tokenizer) -> None:
    """The ids of the official conversation: ▁US ER at its start, USER after </s>."""
    assert llama_tokenizer.encode("USER:") == [3148, 1001, 29901]
    assert llama_tokenizer.encode("USER:", continues=True) == [11889, 29901]


def test_encode_adds_no_control_tokens(tokenizer: Tokenizer) -> None:
    """Only `render_conversation` places them."""
    for text in make_strings(2):
        assert not {0, tokenizer.bos_token_id, tokenizer.eos_token_id} & set(tokenizer.encode(text))


def test_joined_stream_is_the_decoded_text(tokenizer: Tokenizer) -> None:
    """The browser appends pieces; the protocol stores the whole answer; both must be the same text."""
    for text in make_strings(3):
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_stream_starting_inside_a_text(tokenizer: Tokenizer) -> None:
    """A model's first token may have no leading space, or be a byte or a control token."""
    for text in make_strings(4)[:500]:
        for ids in (tokenizer.encode(text, continues=True), [1, *tokenizer.encode(text), 2]):
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_holds_back_half_a_character_only(tiny_tokenizer: Tokenizer) -> None:
    """Each character appears with its last byte, not later: a reader waits for nothing."""
    ids = tiny_tokenizer.encode("a龘b")
    assert [tiny_tokenizer.byte_of_id.get(token_id) for token_id in ids[1:-1]] == list("龘".encode())
    assert stream(tiny_tokenizer, ids) == ["a", "", "", "龘", "b", ""]


def test_stream_cut_inside_a_character(tokenizer: Tokenizer) -> None:
    """An answer stopped by its length limit may end in half a character: one sign says so, at the end."""
    ids = tokenizer.encode("a龘")[:-1]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces[:-1]) == "a"
    assert pieces[-1] == REPLACEMENT


def test_stream_of_the_unknown_token(tokenizer: Tokenizer) -> None:
    """No text contains it, but a model can emit it."""
    assert "".join(stream(tokenizer, [0])) == tokenizer.decode([0])


def test_missing_file(tmp_path: Path) -> None:
    """The message names the file: a wrong path is the usual mistake."""
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*nothing\.model is missing"):
        Tokenizer(tmp_path / "nothing.model")
    with pytest.raises(FileNotFoundError, match="is missing"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"model": {}}', b"version https://git-lfs.github.com/spec/v1\n"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    """A download that was cut, a tokenizer.json, or a Git LFS pointer."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(file)


def test_tiny_vocabulary_is_reproducible(tiny_tokenizer: Tokenizer) -> None:
    """The committed file is what the committed texts give: same pieces and scores, used in the same way.

    Its bytes also hold the trainer's settings, which another version of sentencepiece may write differently.
    """
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=build_tokenizer())

    def list_pieces(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, float]]:
        return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]

    assert list_pieces(rebuilt) == list_pieces(tiny_tokenizer.processor)
    texts = make_strings(5)
    assert rebuilt.EncodeAsIds(texts) == tiny_tokenizer.processor.EncodeAsIds(texts)


def test_vocabularies_share_llamas_conventions(tokenizer: Tokenizer) -> None:
    """What works with the tiny vocabulary has to work with LLaMA's."""
    processor = tokenizer.processor
    assert (processor.unk_id(), tokenizer.bos_token_id, tokenizer.eos_token_id, processor.pad_id()) == (0, 1, 2, -1)
    assert [processor.id_to_piece(i) for i in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert [i for i in range(tokenizer.vocab_size) if processor.is_control(i)] == [1, 2]
    assert tokenizer.byte_of_id == {3 + byte: byte for byte in range(256)}
    assert tokenizer.encode("\n")[-1] == 13
    wide = "\N{FULLWIDTH LATIN CAPITAL LETTER A}  \N{LATIN SMALL LIGATURE FI}"
    assert tokenizer.decode(tokenizer.encode(wide)) == wide


def test_sizes_of_the_vocabularies(tiny_tokenizer: Tokenizer, llama_tokenizer: Tokenizer) -> None:
    """The tiny models' embeddings are built for 768 rows, the official ones for 32,000."""
    assert tiny_tokenizer.vocab_size == VOCAB_SIZE == 768
    assert llama_tokenizer.vocab_size == 32000


def test_system_prompt_is_short_in_the_tiny_vocabulary(tiny_tokenizer: Tokenizer) -> None:
    """It stands in every conversation, so each of its words is one piece: tiny runs would be slow otherwise."""
    text = f"{SYSTEM} USER:"
    assert len(tiny_tokenizer.encode(text)) == len(re.findall(r"\w+|[^\w\s]", text))
