"""Files of rows: two notations of the same thing, and errors that say where to look."""

import itertools
import json
import re
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.conversation import Turn, parse_turns, render_conversation
from data.dataset import ConversationDataset, RenderOptions
from data.image import open_image, preprocess_image
from data.packing import StepDataset
from data.rows import load_rows
from data.tokenizer import Tokenizer
from tests.conftest import TINY_TOKENIZER
from tests.data.conftest import MakeDataset

SIZE = 14  # of the pictures that `make_dataset` asks for


def make_row(question: str, answer: str = "yes", **extra: object) -> dict:
    """Return a row of one question."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **extra}


def open_rows(file: Path, folder: Path, tokenizer: Tokenizer) -> ConversationDataset:
    """Open a file that a test wrote itself."""
    return ConversationDataset(file, folder, tokenizer, RenderOptions(tokens_per_image=3, image_size=SIZE))


def read_turns(dataset: ConversationDataset) -> list[list[Turn]]:
    return [parse_turns(dataset.rows[number]) for number in dataset.row_numbers.tolist()]


def test_json_and_jsonl_are_the_same(make_dataset: MakeDataset, eleven_rows: list[dict]) -> None:
    """A list is how LLaVA's files come, a line per row is what tools write; the reader does not care."""
    rows = [*eleven_rows, make_row("图中\u2028是什么?", "line\u2028separator\u0085is no line's end")]
    first, second = make_dataset(rows, "rows.json"), make_dataset(rows, "rows.jsonl")
    assert len(first) == len(second) == 12
    assert read_turns(first) == read_turns(second)
    for index in range(12):
        assert first.render(index) == second.render(index)
        one, other = first.load_picture(index), second.load_picture(index)
        assert (one is None) == (other is None) == ("image" not in rows[index])
        if one is not None and other is not None:
            assert torch.equal(one, other)


def test_jsonl_with_blank_lines_and_windows_line_ends(
    tmp_path: Path, picture_folder: Path, tiny_tokenizer: Tokenizer
) -> None:
    """What editors leave behind is no error."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\r\n".join(["", *[json.dumps(make_row(f"q{i}")) for i in range(3)], "  ", ""]).encode())
    dataset = open_rows(file, picture_folder, tiny_tokenizer)
    assert [turns[0].text for turns in read_turns(dataset)] == ["q0", "q1", "q2"]


def test_examples_are_rendered_with_the_options(
    make_dataset: MakeDataset, eleven_rows: list[dict], tiny_tokenizer: Tokenizer, picture_folder: Path
) -> None:
    """Every option reaches the function it is meant for."""
    plain = make_dataset(eleven_rows, template="plain", tokens_per_image=7, max_tokens=31)
    branched = make_dataset(eleven_rows, "branched.json", branched=True, aspect="square", image_size=17)
    for index in range(11):
        turns = read_turns(plain)[index]
        assert plain.render(index) == render_conversation(turns, tiny_tokenizer, 7, "plain", max_tokens=31)
        assert branched.render(index) == render_conversation(turns, tiny_tokenizer, 3, branched=True)
    picture = open_image(picture_folder / "3.png")
    pixels = branched.load_picture(3)
    assert pixels is not None
    assert torch.equal(pixels, preprocess_image(picture, 17, "square"))


def test_a_row_may_name_its_template(make_dataset: MakeDataset, tiny_tokenizer: Tokenizer) -> None:
    """A file of the text corpus mixes captions and conversations."""
    rows = [make_row("red", template="plain"), make_row("red"), make_row("red", template="vicuna_v1")]
    dataset = make_dataset(rows)
    expected = [
        render_conversation(read_turns(dataset)[0], tiny_tokenizer, 3, template)
        for template in ("plain", "vicuna_v1", "vicuna_v1")
    ]
    assert [dataset.render(index) for index in range(3)] == expected
    assert make_dataset(rows, template="plain").render(1) == expected[0]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (make_row("<image>\nq"), ValueError, "marker, the row has no 'image'"),
        (make_row("q", image="0.png"), ValueError, "has an 'image', its text has 0"),
        (make_row("<image>\nq", image="nothing.png"), FileNotFoundError, "image .*nothing.png is missing: .*bad_list"),
        (make_row("<image>\nq", image=""), ValueError, "'image' is '', expected one path"),
        (make_row("<image>\nq", image="../0.png"), ValueError, "'../0.png' leads out of the image folder"),
        (make_row("q", template="v0"), ValueError, "template 'v0' is unknown"),
        (make_row("q", template=None), ValueError, "template None is unknown"),
        ({"conversations": []}, ValueError, "needs a question"),
        (["no", "object"], ValueError, "expected an object"),
    ],
)
def test_wrong_rows_name_file_and_row(
    make_dataset: MakeDataset, name: str, row: dict, error: type[Exception], message: str
) -> None:
    """665,298 rows: without its number a wrong one cannot be found. All are checked before training starts."""
    with pytest.raises(error, match=rf"{re.escape(name)}, row 2: .*{message}"):
        make_dataset([make_row("q"), make_row("<image>\nq", image="0.png"), row], name)


def test_broken_line_is_named(tmp_path: Path) -> None:
    """Line numbers are those an editor shows: from 1, blank lines counted."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"conversations": []}\n\n{"conversations": [}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 3 is not JSON")):
        load_rows(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'[{"conversations": [}]', r"is not JSON: .*line 1 column 21"),
        ("rows.json", b'{"a": 1}\n{"a": 2}\n', r"holds no rows, .*needs the ending \.jsonl"),
        ("rows.json", b"", "is not JSON"),
        ("rows.json", b"[]", "holds no rows"),
        ("rows.json", b'{"conversations": []}', "holds no rows, expected a list"),
        ("rows.jsonl", b"\n\n", "holds no rows"),
        ("rows.json", b'["\xff"]', "is not UTF-8"),
        ("rows.jsonl", '{"a": "红"}'.encode("gb18030"), "is not UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """What is no list of rows at all."""
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} {message}"):
        load_rows(file)


def test_missing_data_file(tmp_path: Path) -> None:
    """The usual mistake of the first run."""
    with pytest.raises(FileNotFoundError, match=r"data file .*nothing\.json is missing"):
        load_rows(tmp_path / "nothing.json")


def test_unreadable_picture_names_row_and_picture(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """Pictures are opened hours into a run; the message has to say which one stopped it."""
    Image.effect_noise((9, 9), 50).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:80])
    rows = [make_row("<image>\nq", image=name) for name in ("good.png", "bad.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset = open_rows(tmp_path / "rows.json", tmp_path, tiny_tokenizer)
    assert dataset.load_picture(0) is not None
    with pytest.raises(ValueError, match=r"rows\.json, row 1: .*bad\.png: cannot read the picture: "):
        dataset.load_picture(1)


def load(dataset: ConversationDataset, index: int, seed: tuple[int, ...] | None) -> torch.Tensor:
    """Return the pixels of a row that has a picture."""
    pixels = dataset.load_picture(index, seed)
    assert pixels is not None
    return pixels


def test_augmentation_is_decided_by_its_seed(make_dataset: MakeDataset, eleven_rows: list[dict]) -> None:
    """A resumed run sees the same pixels again; two epochs do not."""
    dataset = make_dataset(eleven_rows, augment_pixels=3)
    variants = [load(dataset, 1, (0, draw)) for draw in range(40)]
    for draw, pixels in enumerate(variants):
        assert torch.equal(pixels, load(dataset, 1, (0, draw)))
    distinct = {pixels.numpy().tobytes() for pixels in variants}
    assert len(distinct) > 20  # of 7 x 7 x 2


def test_augmentation_shifts_and_mirrors(make_dataset: MakeDataset, eleven_rows: list[dict]) -> None:
    """Every variant is a shift of the picture or of its mirror image, by no more than asked, and both occur."""
    dataset, reach = make_dataset(eleven_rows, augment_pixels=2), 2
    plain = load(dataset, 1, None)
    padded = torch.nn.functional.pad(plain, (reach,) * 4, mode="replicate")
    shifts = {
        (down, right, mirrored): shifted.flip(2) if mirrored else shifted
        for down in range(5)
        for right in range(5)
        for mirrored in (False, True)
        for shifted in [padded[:, down : down + SIZE, right : right + SIZE]]
    }
    seen = set()
    for draw in range(300):
        pixels = load(dataset, 1, (0, draw))
        matches = [name for name, shifted in shifts.items() if torch.equal(pixels, shifted)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 40  # of 5 x 5 x 2


def test_augmentation_is_off_without_seed_or_reach(make_dataset: MakeDataset, eleven_rows: list[dict]) -> None:
    """Measuring uses the picture itself, and by default so does training, as officially."""
    dataset, default = make_dataset(eleven_rows, "a.json", augment_pixels=3), make_dataset(eleven_rows, "b.json")
    for index in range(11):
        if "image" in eleven_rows[index]:
            assert torch.equal(load(dataset, index, None), load(default, index, None))
            assert torch.equal(load(default, index, (0, index)), load(default, index, None))


def test_a_picture_in_a_later_branch_and_half_a_character_are_refused_when_opened(tmp_path: Path) -> None:
    """Both would fail in the middle of a run, or in silence."""
    later = [("human", "hi"), ("gpt", "yes"), ("human", "<image>\nwhat?"), ("gpt", "red")]
    for turns, image, message in (
        (later, "a.png", "row 0: branched turns share one picture"),
        ([("human", "\ud83d"), ("gpt", "x")], None, "row 0: turn 0 holds half a character"),
    ):
        row: dict[str, object] = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        (tmp_path / "rows.json").write_text(json.dumps([row | ({"image": image} if image else {})]), encoding="utf-8")
        options = RenderOptions(tokens_per_image=4, image_size=14, branched=True)
        with pytest.raises(ValueError, match=message):
            ConversationDataset(tmp_path / "rows.json", tmp_path, Tokenizer(TINY_TOKENIZER), options)


def write_rows(folder: Path, rows: list[dict]) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


def test_the_bad_list_leaves_out_pictures_and_rows(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """Rows keep the numbers they have in the file: messages name those."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    images = [None, "a.png", "gone.png", None, "gone.png", "a.png"]
    rows = [make_row("<image>\nq" if image else f"q{n}", **({"image": image} if image else {}))
            for n, image in enumerate(images)]  # fmt: skip
    rows[3] = {"conversations": "broken"}
    file, bad_list = write_rows(tmp_path, rows), tmp_path / "bad.jsonl"
    bad_list.write_text('{"image": "gone.png", "reason": "missing"}\n{"row": 3, "reason": "no list"}\n', "utf-8")
    options = RenderOptions(tokens_per_image=3, image_size=SIZE)
    dataset = ConversationDataset(file, tmp_path, tiny_tokenizer, options, bad_list)
    assert (len(dataset), dataset.num_left_out) == (3, 3)
    assert dataset.row_numbers.tolist() == [0, 1, 5]
    assert [dataset.image(index) for index in range(3)] == [None, "a.png", "a.png"]
    assert [dataset.render(index).num_images for index in range(3)] == [0, 1, 1]
    assert dataset.has_pictures
    batch = StepDataset(dataset, 3, 999, 0, rank=0, num_ranks=1)[0].micro_batches[0]
    assert sorted(batch.rows) == [0, 1, 5]

    bad_list.write_text('{"image": "gone.png"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.json, row 3: expected an object with a list"):
        ConversationDataset(file, tmp_path, tiny_tokenizer, options, bad_list)
    bad_list.write_text("".join(f'{{"row": {number}}}\n' for number in range(6)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no row that .*bad\.jsonl does not name"):
        ConversationDataset(file, tmp_path, tiny_tokenizer, options, bad_list)


def test_missing_pictures_are_counted(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """One message for all of them, and the way out; three rows, two pictures."""
    rows = [make_row("<image>\nq", image=f"{name}.png") for name in ("x", "y", "x")]
    with pytest.raises(FileNotFoundError, match=r"row 0: .*x\.png is missing; 2 in all: .*data\.check.*bad_list"):
        open_rows(write_rows(tmp_path, rows), tmp_path, tiny_tokenizer)


def test_an_epoch_over_shards_reads_each_from_front_to_back(
    tmp_path: Path, picture_folder: Path, tiny_tokenizer: Tokenizer, make_dataset: MakeDataset, eleven_rows: list[dict]
) -> None:
    """The rows are those of the folder, in an order that suits a tar; every epoch has another."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in (3, 1, 0, 4, 2):
            tar.add(picture_folder / f"{number}.png", f"{number}.png")
    loose = make_dataset(eleven_rows, "data/rows.json")
    dataset = open_rows(tmp_path / "data/rows.json", tmp_path, tiny_tokenizer)
    orders = [dataset.permute(epoch, seed=1).tolist() for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(11))
        places = [[3, 1, 0, 4, 2].index(int(image[0])) for image in map(dataset.image, order) if image]
        assert sum(later < earlier for earlier, later in itertools.pairwise(places)) <= 1  # where it wraps around
    assert len({tuple(order) for order in orders}) > 1
    for index in range(11):
        one, other = dataset.load_picture(index), loose.load_picture(index)
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
