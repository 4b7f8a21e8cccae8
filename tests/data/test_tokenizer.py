"""Text <-> ids, from both kinds of file: SentencePiece's ids and texts, and streams without half a character."""

import codecs
import itertools
import json
import pickle
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

import data.tokenizer
from data.conversation import IMAGE_TOKEN_ID, SYSTEM
from data.tiny.build_tokenizer import VOCAB_SIZE, build_tokenizer
from data.tokenizer import SPACE, StreamDecoder, Tokenizer, cut_at_stop, find_tokenizer
from tests.conftest import TINY_TOKENIZER
from tests.data.tokenizer_json import (
    EXPORTERS,
    make_merges,
    make_tokenizer_json,
    make_vocab,
    write_tokenizer_json,
)

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


def make_wild_strings(processor: sentencepiece.SentencePieceProcessor, seed: int) -> list[str]:
    """Return mixtures of the fragments with long runs, printable ASCII, any hanzi, any piece, and any plane."""
    source = random.Random(seed)
    planes = [(0x20, 0x2FFF), (0x1F300, 0x1F6FF), (0xE000, 0x10FFFF)]
    makers = (
        lambda: source.choice(FRAGMENTS),
        lambda: source.choice(" \t\n=-_*#ae.") * source.randint(1, 40),
        lambda: "".join(source.choices(string.printable, k=source.randint(1, 12))),
        lambda: "".join(chr(source.randint(0x4E00, 0x9FFF)) for _ in range(source.randint(1, 6))),
        lambda: processor.id_to_piece(source.randrange(processor.vocab_size())).replace(SPACE, " "),
        lambda: chr(source.randint(*source.choice(planes))),
    )
    return ["".join(source.choice(makers)() for _ in range(source.randint(0, 12))) for _ in range(NUM_STRINGS)]


def make_id_sequences(vocab_size: int, seed: int) -> list[list[int]]:
    """Return sequences that no text has: control tokens anywhere, bytes that are no UTF-8, spaces at the start."""
    source = random.Random(seed)
    kinds = ((0, 3), (3, 259), (3 + 0x80, 3 + 0xC0), (3 + 0xC0, 259), (3 + 0xE0, 3 + 0xF5), (259, vocab_size))
    choices = [[source.randrange(*source.choice(kinds)) for _ in range(source.randint(0, 12))] for _ in range(5000)]
    return [sequence * source.choice((1, 1, 2)) for sequence in choices]


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the pieces that a reader sees, one for every token and the end."""
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


def test_ids_and_text_are_sentencepieces(tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    """The official weights know these ids and no others."""
    for text in make_strings(6) + make_wild_strings(processor, 0):
        ids = processor.EncodeAsIds(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == processor.DecodeIds(ids)


def test_a_typed_sign_for_a_space_is_one(tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    """So words end at both: a run of them is one token."""
    for length in range(1, 7):
        for letters in itertools.product(f"a {SPACE}", repeat=length):
            text = "".join(letters)
            assert tokenizer.encode(text) == processor.EncodeAsIds(text)


@pytest.mark.parametrize("vocabulary", ["tiny", "llama"])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_every_exporters_json_gives_the_same_ids(
    request: pytest.FixtureRequest, tmp_path: Path, exporter: str, vocabulary: str
) -> None:
    """They differ in what stands around pieces and merges, and in the order of merges."""
    processor = request.getfixturevalue(f"{vocabulary}_processor")
    tokenizer = Tokenizer(write_tokenizer_json(processor, exporter, tmp_path))
    model = request.getfixturevalue(f"{vocabulary}_tokenizer")
    assert tokenizer.vocab_size == model.vocab_size
    assert tokenizer.byte_of_id == model.byte_of_id
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    for text in ["x" * num_letters + " " * num_spaces for num_letters in (0, 1) for num_spaces in range(100)]:
        assert tokenizer.encode(text) == processor.EncodeAsIds(text)
    for text in make_wild_strings(processor, 1):
        assert tokenizer.encode(text) == processor.EncodeAsIds(text)
        assert tokenizer.encode(text, continues=True) == model.encode(text, continues=True)


def test_the_json_of_the_tests_is_a_real_one(llama_processor: sentencepiece.SentencePieceProcessor) -> None:
    """Its merges are those of transformers' converter, and by its own rules a typed </s> would end the conversation."""
    from transformers.tokenization_utils_base import generate_merges

    vocab = make_vocab(llama_processor)
    scores = {piece: llama_processor.get_score(i) for piece, i in vocab.items()}
    assert generate_merges(vocab, scores) == make_merges(llama_processor)
    assert generate_merges(vocab, None) == make_merges(llama_processor, by_score=False)
    library = tokenizers.Tokenizer.from_str(json.dumps(make_tokenizer_json(llama_processor, "llava_hf")))
    assert library.encode("a </s><image>").ids == [1, 263, 29871, 2, 32000]


def test_pieces_with_a_meaning_never_arise_by_merging(
    tmp_path: Path, tiny_processor: sentencepiece.SentencePieceProcessor
) -> None:
    """An exporter lists every merge whose result has an id: the letters of </s> would become the control token."""
    document = make_tokenizer_json(tiny_processor, "llava_hf")
    vocab, merges = document["model"]["vocab"], []
    vocab["<image>"] = 768
    special = ("<s>", "</s>", "<unk>", "<image>", "<0x0A>")
    for piece in special:
        for cut in range(1, len(piece)):
            vocab.setdefault(piece[:cut], len(vocab))
            vocab.setdefault(piece[cut], len(vocab))
            merges.append((piece[:cut], piece[cut]))
    document["model"]["merges"] = [" ".join(pair) for pair in merges]
    naive = tokenizers.models.BPE(vocab, merges)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    for piece in special:
        assert [token.id for token in naive.tokenize(piece)] == [vocab[piece]]
        ids = tokenizer.encode(f"a{piece}b")
        assert vocab[piece] not in ids
        assert vocab[piece[:-1]] in ids
        assert tokenizer.decode(ids) == f"a{piece}b"


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
        ids = set(tokenizer.encode(text))
        assert not {0, tokenizer.bos_token_id, tokenizer.eos_token_id} & ids
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    """A terminal that is not UTF-8 can bring one; it is an error that can be shown, in both libraries the same."""
    for continues in (False, True):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tokenizer.encode("a\ud83d", continues)


def test_joined_stream_is_the_decoded_text(tokenizer: Tokenizer) -> None:
    """The browser appends pieces; the protocol stores the whole answer; both must be the same text."""
    for text in make_strings(3):
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_stream_of_any_ids_is_sentencepieces_text(
    tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    """A model in training emits what no text has; nothing is lost, and nothing waits but one unfinished character."""
    num_invalid = 0
    for ids in make_id_sequences(tokenizer.vocab_size, 0):
        whole = processor.DecodeIds(ids)
        assert tokenizer.decode(ids) == whole
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == whole
        num_invalid += REPLACEMENT in whole
        shown = ""
        for number, piece in enumerate(pieces[:-1], start=1):
            shown += piece
            held = processor.DecodeIds(ids[:number]).removeprefix(shown)
            assert held == REPLACEMENT * len(held)
            assert len(held) < 4
    assert num_invalid > 1000


def test_ids_outside_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    """<image>, <pad> and the empty rows of llava-hf's embeddings, and our own sentinel."""
    size = tokenizer.vocab_size
    ids = tokenizer.encode("a 龘")
    for token_id in (size, size + 1, size + 63, IMAGE_TOKEN_ID):
        assert tokenizer.decode([token_id]) == ""
        assert "".join(stream(tokenizer, [token_id, *ids, token_id])) == "a 龘"


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
    """An answer stopped by its length limit may end in half a character: signs say so, at the end."""
    ids = tokenizer.encode("a龘")[:-1]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces[:-1]) == "a"
    assert pieces[-1] == REPLACEMENT * 2  # one for each byte, as SentencePiece has it


def test_stream_of_the_unknown_token(tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    """No text contains it, but a model can emit it."""
    assert stream(tokenizer, [0, 0, 2]) == [" ⁇ ", " ⁇ ", "", ""]
    assert processor.DecodeIds([0, 0, 2]) == " ⁇  ⁇ "


def test_words_are_forgotten_when_they_are_too_many(
    tiny_processor: sentencepiece.SentencePieceProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered stays small, sentences without spaces are not, and the ids are the same."""
    monkeypatch.setattr(data.tokenizer, "MAX_KNOWN_WORDS", 5)
    tokenizer = Tokenizer(TINY_TOKENIZER)
    most = 0
    for text in make_strings(8)[:500]:
        assert tokenizer.encode(text) == tiny_processor.EncodeAsIds(text)
        most = max(most, len(tokenizer._ids_of_word))
    assert most == 5
    tokenizer = Tokenizer(TINY_TOKENIZER)
    tokenizer.encode("有" * 33 + " red")
    assert list(tokenizer._ids_of_word) == [" red"]


def test_what_is_remembered_does_not_change(tiny_tokenizer: Tokenizer) -> None:
    first = tiny_tokenizer.encode("red")
    first.append(7)
    assert tiny_tokenizer.encode("red") == first[:-1]


def test_pieces_that_go_on_after_a_space_are_found(
    tmp_path: Path, tiny_processor: sentencepiece.SentencePieceProcessor
) -> None:
    """LLaMA has none: text is split word by word only where that is so."""
    document = make_tokenizer_json(tiny_processor, "llava_hf")
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    vocab[f"q{SPACE}"] = len(vocab)
    merges.insert(0, f"q {SPACE}")
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert vocab[f"q{SPACE}"] in Tokenizer(tmp_path / "tokenizer.json").encode("q q")


def test_runs_of_spaces_stay_together(tmp_path: Path, tiny_processor: sentencepiece.SentencePieceProcessor) -> None:
    """LLaMA has pieces for them: a text in words has the ids of the whole one, whichever sign was typed."""
    document = make_tokenizer_json(tiny_processor, "llava_hf")
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    vocab[2 * SPACE] = len(vocab)
    merges.insert(0, f"{SPACE} {SPACE}")
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    for length in range(1, 7):
        for letters in itertools.product(f"a {SPACE}", repeat=length):
            text = "".join(letters)
            assert tokenizer.encode(text) == tokenizer._split(" " + text)
    assert tokenizer.encode("a  ")[-1] == vocab[2 * SPACE]
    assert len(tokenizer._ids_of_word) > 1


def test_loader_processes_can_be_handed_a_tokenizer(tokenizer: Tokenizer) -> None:
    """Where processes are not forked, everything they need is pickled."""
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in make_strings(7)[:100]:
        assert copy.encode(text) == tokenizer.encode(text)
        assert copy.decode(copy.encode(text)) == text


def test_missing_file(tmp_path: Path) -> None:
    """The message names the file: a wrong path is the usual mistake."""
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*nothing\.model is missing"):
        Tokenizer(tmp_path / "nothing.model")
    with pytest.raises(FileNotFoundError, match="is missing"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"version https://git-lfs.github.com/spec/v1\n"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    """A download that was cut, another JSON, or a Git LFS pointer."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model or .*: take the file that"):
        Tokenizer(file)


def test_sentencepiece_model_of_another_family(tmp_path: Path) -> None:
    """Without bytes for what it does not know, a rare hanzi would be lost in silence."""
    file = tmp_path / "spiece.model"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["one two three"] * 9),
        model_prefix=str(file.with_suffix("")),
        vocab_size=15,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"spiece\.model is not a LLaMA-style vocabulary \(it lacks <0x00>, <0x01>"):
        Tokenizer(file)


STYLE = "is not a LLaMA-style tokenizer.json"
WHOLE = "is not a whole tokenizer.json"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "Unigram"}, f"{STYLE} (its 'model' needs type BPE and byte_fallback true)"),
        ({"byte_fallback": False}, f"{STYLE} (its 'model' needs type BPE and byte_fallback true)"),
        ({"vocab": {"<unk>": 0, "<s>": 1, "</s>": 3}}, f"{STYLE} (the ids of its 'vocab' need to be 0, 1, 2, ...)"),
        ({"vocab": {"<unk>": 0, "<s>": 1}, "merges": []}, "is not a LLaMA-style vocabulary (it lacks </s>, <0x00>"),
        ({"vocab": {"a": 0, "b": None}}, f"{WHOLE} (TypeError"),
        ({"vocab": ["a"]}, f"{WHOLE} (TypeError"),
        ({"merges": None}, f"{WHOLE} (TypeError"),
        ({"merges": [[1, 2]]}, f"{WHOLE} (TypeError"),
        ({"merges": ["a"]}, f"{STYLE} (its 'merges' need to be pairs of 'vocab' that are in 'vocab')"),
        ({"merges": ["a b e"]}, f"{STYLE} (its 'merges' need"),
        ({"merges": [["a", "zebra"]]}, f"{STYLE} (its 'merges' need"),
        ({"merges": [["a", "?"]]}, f"{STYLE} (its 'merges' need"),
        ({"merges": [["▁quest", "ions"]]}, f"{STYLE} (its 'merges' need"),
    ],
)
def test_json_that_is_no_llama_vocabulary(
    tmp_path: Path, tiny_processor: sentencepiece.SentencePieceProcessor, model: dict[str, Any], message: str
) -> None:
    """A tokenizer of another family would read every text wrongly, without an error."""
    document = make_tokenizer_json(tiny_processor, "metaspace")
    document["model"] |= model
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{file} {message}")) as caught:
        Tokenizer(file)
    assert str(caught.value).endswith(": take the file that the language model came with")


@pytest.mark.parametrize(
    "text", ["{", '{"model"', "{}", '{"model": []}', '{"model": {"type": "BPE", "byte_fallback": true}}']
)
def test_json_that_was_cut(tmp_path: Path, text: str) -> None:
    """The file is named, and what was looked for in it."""
    file = tmp_path / "tokenizer.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{file} {WHOLE}")):
        Tokenizer(file)


def test_content_decides_not_the_name(tmp_path: Path, tiny_processor: sentencepiece.SentencePieceProcessor) -> None:
    """Tools copy either file under either name, and editors put a byte order mark before JSON."""
    source = write_tokenizer_json(tiny_processor, "legacy", tmp_path / "source")
    (tmp_path / "tokenizer.model").write_bytes(codecs.BOM_UTF8 + b"\n " + source.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(TINY_TOKENIZER.read_bytes())
    ids = tiny_processor.EncodeAsIds("is there a 龘?")
    assert Tokenizer(tmp_path / "tokenizer.model").encode("is there a 龘?") == ids
    assert Tokenizer(tmp_path / "tokenizer.json").encode("is there a 龘?") == ids


def test_find_tokenizer(tmp_path: Path) -> None:
    """A checkpoint's own file comes first, then its base's; of two in one folder SentencePiece's own."""
    first, second = tmp_path / "lora", tmp_path / "base"
    for folder in (first, second):
        folder.mkdir()
    message = f"looked for tokenizer.model and tokenizer.json in {first}, {second}; copy the file"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        find_tokenizer(first, second)
    (first / "tokenizer.model").mkdir()
    for file in (folder / name for folder in (second, first) for name in ("tokenizer.json", "tokenizer.model")):
        if file.is_dir():
            file.rmdir()
        file.touch()
        assert find_tokenizer(first, second) == file


def test_tiny_vocabulary_is_reproducible(tiny_processor: sentencepiece.SentencePieceProcessor) -> None:
    """The committed file is what the committed texts give: same pieces and scores, used in the same way.

    Its bytes also hold the trainer's settings, which another version of sentencepiece may write differently.
    """
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=build_tokenizer())

    def list_pieces(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, float]]:
        return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]

    assert list_pieces(rebuilt) == list_pieces(tiny_processor)
    texts = make_strings(5)
    assert rebuilt.EncodeAsIds(texts) == tiny_processor.EncodeAsIds(texts)


def test_vocabularies_share_llamas_conventions(
    tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    """What works with the tiny vocabulary has to work with LLaMA's."""
    assert (processor.unk_id(), tokenizer.bos_token_id, tokenizer.eos_token_id, processor.pad_id()) == (0, 1, 2, -1)
    assert tokenizer.pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert tokenizer.pieces == [processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
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


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("no stop at all", ["###"], "no stop at all"),
        ("one. two", ["."], "one"),
        ("a## b###c", ["###"], "a## b"),
        ("ends in ##", ["###"], "ends in ##"),
        ("USER: first", ["USER:"], ""),
        ("x, then end", ["end", ", then"], "x"),
        ("aaab", ["aab"], "a"),
        ("\N{WHITE MEDIUM STAR}\N{GRINNING FACE}!", ["\N{GRINNING FACE}"], "\N{WHITE MEDIUM STAR}"),
        ("anything", [], "anything"),
    ],
)
def test_no_part_of_a_stop_text_is_shown(text: str, stops: list[str], expected: str) -> None:
    """However the text is cut into pieces, what is passed on is never taken back."""
    source = random.Random(0)
    for _ in range(50):
        cuts = sorted(source.choices(range(len(text) + 1), k=source.randint(0, 6)))
        shown = ""
        for end in cuts:
            now, _ = cut_at_stop(text[:end], stops, is_whole=False)
            assert now.startswith(shown)
            assert expected.startswith(now)
            shown = now
        assert cut_at_stop(text, stops, is_whole=True) == (expected, expected != text)


def test_tokens_have_names(tiny_tokenizer: Tokenizer) -> None:
    """Also those behind the vocabulary, for which a padded head has rows."""
    assert tiny_tokenizer.name(tiny_tokenizer.eos_token_id) == "</s>"
    assert tiny_tokenizer.name(tiny_tokenizer.vocab_size) == f"<{tiny_tokenizer.vocab_size}>"
