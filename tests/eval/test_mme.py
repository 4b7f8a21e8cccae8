"""MME's points by hand and by brute force, its two layouts, its own format, and everything that can be wrong."""

import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from eval import mme
from eval.mme import MME, NUM_QUESTIONS, count, score_results_folder, write_submission
from eval.task import Question, Scored, Task

ENDING = " Please answer yes or no."
APART = ("posters", "celebrity", "scene", "landmark", "artwork")  # texts and pictures in folders of their own


@pytest.mark.parametrize(
    ("prediction", "label"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("NO.", "no"),
        ("Yes, there is no dog", "yes"),
        ("Not sure", "no"),
        ("None", "no"),
        ("Now yes", "no"),
        ("yesterday", "yes"),
        ("I know", "other"),  # "i kn"
        ("A yes", "other"),  # "a ye"
        (" yes", "yes"),
        ("\tno\n", "no"),
        ("", "other"),
        ("y", "other"),
        ("是", "other"),
        ("否。", "other"),
    ],
)
def test_the_first_four_characters_decide(prediction: str, label: str) -> None:
    assert mme.read_start(prediction) == label


@pytest.mark.parametrize(
    ("prediction", "lmms_eval", "vlmevalkit"),
    [
        ("Yes", "yes", "yes"),
        ("No.", "no", "no"),
        ("y", "yes", "other"),
        (" N. ", "no", "other"),
        ("..yes", "yes", "yes"),  # officially "..ye", which is other
        ("Yes, it is", "yes", "yes"),
        ("It is, yes.", "other", "yes"),
        ("yes,no", "yes", "other"),  # both words
        ("yes/maybe", "yes", "yes"),  # the mark becomes a blank
        ("yes/ maybe", "yes", "yes"),  # the mark goes
        ("1,000 yes-men", "other", "other"),  # with thousands every mark goes: "yesmen"
        ("yes-men", "yes", "yes"),
        ("yes: it is", "yes", "other"),  # a colon stays
        ("Yes.No", "yes", "other"),  # "yesno"
        ("None", "no", "other"),
        ("Not sure", "no", "other"),
        ("", "other", "other"),
        ("是", "other", "other"),
    ],
)
def test_how_the_others_read(prediction: str, lmms_eval: str, vlmevalkit: str) -> None:
    read = (mme.RULES["lmms-eval"].read(prediction), mme.RULES["vlmevalkit"].read(prediction))
    assert read == (lmms_eval, vlmevalkit)


SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("native", "official", "lmms_eval"),
    [
        ("Is it red? Please answer yes or no.", "Is it red?" + SHORT, "Is it red?" + SHORT),
        # Two blanks, as the release has them in color/000000563758.txt; LLaVA's `llava_mme.jsonl` asks without one.
        (
            "Is there a red scarf?  Please answer yes or no.",
            "Is there a red scarf?" + SHORT,
            "Is there a red scarf? " + SHORT,
        ),
        ("Is it on the left Please answer yes or no.", "Is it on the left" + SHORT, "Is it on the left" + SHORT),
        ("Is it red？ Please answer yes or no.", "Is it red？" + SHORT, "Is it red？" + SHORT),
    ],
)
def test_how_questions_are_put(native: str, official: str, lmms_eval: str) -> None:
    asked = [mme.RULES[rule].ask(native) for rule in MME.rules]
    assert MME.rules == ("official", "lmms-eval", "vlmevalkit")
    assert asked == [official, lmms_eval, native]


def make_questions(rows: Sequence[tuple[str, str, str]]) -> list[Question]:
    """Make questions of (subtask, picture, right answer)."""
    return [
        Question(f"{subtask}/{image}/{number}", f"{subtask}/{image}", "?", ("?",), (answer,), {"subtask": subtask})
        for number, (subtask, image, answer) in enumerate(rows)
    ]


def get_scores(scored: Scored) -> dict[str, dict[str, float]]:
    return {name: {key: part.score for key, part in parts.items()} for name, parts in scored.parts.items()}


def test_points_by_hand() -> None:
    """Count: 3 of 4 right, 1 picture of 2 whole. OCR: 1 of 2, none. Code: all, with both answers Yes."""
    questions = make_questions(
        [
            ("count", "a.jpg", "Yes"),
            ("count", "a.jpg", "No"),
            ("count", "b.jpg", "Yes"),
            ("count", "b.jpg", "No"),
            ("OCR", "a.jpg", "Yes"),
            ("OCR", "a.jpg", "No"),
            ("code_reasoning", "a.png", "Yes"),
            ("code_reasoning", "a.png", "Yes"),
        ]
    )
    scored = count(questions, ["Yes", "No", "yes, two", "Yes", "是的", "no", "YES", "yes."], "official")
    assert scored.credits == [1, 1, 1, 0, 0, 1, 1, 1]
    assert get_scores(scored) == {
        "all": {"perception": 75 + 50 + 50 + 0, "cognition": 100 + 100},
        "subtask": {"count": 125, "OCR": 50, "code_reasoning": 200},
        "accuracy": {"count": 3 / 4, "OCR": 1 / 2, "code_reasoning": 1},
        "accuracy+": {"count": 1 / 2, "OCR": 0, "code_reasoning": 1},
        "answers": {"neither yes nor no": 1 / 8, "是 or 否": 1 / 8},
    }
    assert next(iter(scored.parts["all"])) == "perception"
    assert scored.parts["all"]["perception"].best == 400
    assert scored.parts["all"]["perception"].num_questions == 6
    assert scored.parts["subtask"]["count"].best == 200
    assert scored.parts["accuracy"]["count"].best == 1


def test_what_is_neither_yes_nor_no_is_wrong_and_told() -> None:
    questions = make_questions([("count", f"{number // 2}.jpg", "Yes") for number in range(6)])
    scored = count(questions, ["", "否", "maybe", "它是红色的", "Yes 是", "这里没有是"], "official")
    assert scored.credits == [0, 0, 0, 0, 1, 0]
    assert get_scores(scored)["answers"] == {"neither yes nor no": 5 / 6, "是 or 否": 2 / 6}


def test_a_picture_with_one_question_is_no_pair() -> None:
    questions = make_questions([("count", "a.jpg", "Yes"), ("count", "b.jpg", "Yes"), ("count", "b.jpg", "No")])
    with pytest.raises(
        ValueError, match=r"^count/a\.jpg has 1 questions, expected 2: MME is scored by whole pictures$"
    ):
        count(questions, ["Yes"] * 3, "official")


def make_random_sample(generator: random.Random) -> tuple[list[Question], list[str]]:
    rows = [
        (subtask, f"{number}.jpg", generator.choice(["Yes", "No"]))
        for subtask in NUM_QUESTIONS
        for number in range(generator.randint(1, 5))
        for _ in range(2)
    ]
    words = ["Yes", "No", "yes.", "No, it isn't", "Nothing", "", "是", "Maybe"]
    return make_questions(rows), [generator.choice(words) for _ in rows]


def count_by_brute_force(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
    scores = {}
    for subtask in NUM_QUESTIONS:
        right: dict[str, list[bool]] = {}
        for question, prediction in zip(questions, predictions, strict=True):
            if question.kinds["subtask"] == subtask:
                is_yes, is_no = (word in prediction.lower()[:4] for word in ("yes", "no"))
                said = "Yes" if is_yes else "No" if is_no else None
                right.setdefault(question.image, []).append(said == question.answers[0])
        answers = [value for pair in right.values() for value in pair]
        whole = [all(pair) for pair in right.values()]
        scores[subtask] = 100 * (sum(answers) / len(answers) + sum(whole) / len(whole))
    return scores


def test_groups_are_the_sums_of_their_subtasks() -> None:
    generator = random.Random(0)
    for _ in range(20):
        questions, predictions = make_random_sample(generator)
        scores = get_scores(count(questions, predictions, "official"))
        expected = count_by_brute_force(questions, predictions)
        assert scores["subtask"] == pytest.approx(expected)
        values = list(expected.values())
        assert scores["all"] == pytest.approx({"perception": sum(values[:10]), "cognition": sum(values[10:])})
        for subtask in NUM_QUESTIONS:
            points = 100 * (scores["accuracy"][subtask] + scores["accuracy+"][subtask])
            assert scores["subtask"][subtask] == pytest.approx(points)


def test_neither_the_order_of_pictures_nor_the_sides_matter() -> None:
    generator = random.Random(1)
    swap = {"Yes": "No", "No": "Yes"}
    for _ in range(20):
        questions, _ = make_random_sample(generator)
        predictions = [generator.choice(["Yes", "No"]) for _ in questions]
        scores = get_scores(count(questions, predictions, "official"))
        pairs = list(zip(questions, predictions, strict=True))
        generator.shuffle(pairs)
        shuffled = count([row for row, _ in pairs], [text for _, text in pairs], "official")
        for name, parts in get_scores(shuffled).items():
            assert parts == pytest.approx(scores[name])
        turned = make_questions(
            [(row.kinds["subtask"], row.image.split("/")[1], swap[row.answers[0]]) for row in questions]
        )
        assert get_scores(count(turned, [swap[text] for text in predictions], "official")) == scores


def test_an_interval_holds_the_score() -> None:
    questions, predictions = make_random_sample(random.Random(2))
    part = count(questions, predictions, "official").parts["all"]["perception"]
    low, high = part.interval()
    assert 0 <= low < part.score < high <= part.best == 2000


def write_release(root: Path, sizes: dict[str, int]) -> Path:
    """Write a release of that many questions; every picture is the same file."""
    picture = root.parent / "picture.png"
    root.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(picture)
    for subtask, num_questions in sizes.items():
        is_apart = subtask in APART
        texts = root / subtask / ("questions_answers_YN" if is_apart else "")
        images = root / subtask / ("images" if is_apart else "")
        texts.mkdir(parents=True)
        images.mkdir(exist_ok=True)
        ending = "png" if subtask in ("OCR", "code_reasoning") else "jpg"
        for number in range(num_questions // 2):
            lines = f"Is it red?{ENDING}\tYes\nIs it {number}?{ENDING}\tNo\n"
            (texts / f"{number:04d}.txt").write_text(lines, encoding="utf-8")
            os.link(picture, images / f"{number:04d}.{ending}")
    return root


@pytest.fixture(scope="module")
def whole_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("mme") / mme.RELEASE, NUM_QUESTIONS)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release of two pictures a subtask, which is as many as are expected here."""
    for subtask in NUM_QUESTIONS:
        monkeypatch.setitem(NUM_QUESTIONS, subtask, 4)
    return write_release(tmp_path / mme.RELEASE, NUM_QUESTIONS)


def test_the_whole_release_in_both_layouts(whole_release: Path) -> None:
    task = MME.open(whole_release.parent, "official", None)
    assert len(task.questions) == 2374 == len({row.question_id for row in task.questions})
    assert len(task.files) == 1187
    assert (task.template, task.max_new_tokens) == ("vicuna_v1", 128)
    assert task.prompt == "{question}\nAnswer the question using a single word or phrase."
    perception = [row for row in task.questions if row.kinds["subtask"] in mme.GROUPS["perception"]]
    assert len(perception) == 2114
    for first, second in zip(task.questions[::2], task.questions[1::2], strict=True):
        assert first.image == second.image
    assert task.questions[0] == Question(
        "existence/0000/1",
        "existence/0000.jpg",
        f"Is it red?{ENDING}",
        ("Is it red?" + SHORT,),
        ("Yes",),
        {"subtask": "existence"},
    )
    assert "posters/images/0000.jpg" in {row.image for row in task.questions}
    assert task.open_picture("posters/images/0000.jpg").size == (4, 4)
    always_yes = count(task.questions, task.bars["always yes"], "official")
    assert [part.score for part in always_yes.parts["all"].values()] == [500, 200]  # half right, no picture whole
    perfect = count(task.questions, [row.answers[0] for row in task.questions], "official")
    assert [(part.score, part.best) for part in perfect.parts["all"].values()] == [(2000, 2000), (800, 800)]


@pytest.mark.parametrize(
    ("rule", "settings"),
    [("lmms-eval", ("vicuna_v1", 16)), ("vlmevalkit", ("llava_v1", 2048))],
)
def test_other_rules_ask_otherwise(release: Path, rule: str, settings: tuple[str, int]) -> None:
    task = MME.open(release, rule, None)
    assert (task.template, task.max_new_tokens) == settings
    assert task.questions[0].turns == (mme.RULES[rule].ask(f"Is it red?{ENDING}"),)
    assert task.questions[0].text == f"Is it red?{ENDING}"


def test_pictures_may_lie_elsewhere(release: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "pictures"
    for subtask in NUM_QUESTIONS:
        shutil.copytree(release / subtask / ("images" if subtask in APART else ""), elsewhere / subtask)
    for picture in release.rglob("*.[jp][pn]g"):
        picture.unlink()
    task = MME.open(release, "official", elsewhere)
    assert task.open_picture(task.questions[0].image).size == (4, 4)
    assert "posters/0000.jpg" in {row.image for row in task.questions}  # not posters/images


def test_line_ends_marks_and_equal_answers_are_fine(release: Path) -> None:
    text = release / "count/0000.txt"
    text.write_bytes("\ufeffIs it “é”?  Please answer yes or no.\tYes\r\nIs it?\tyes \r\n\r\n".encode())
    (release / "count/._0000.txt").write_bytes(b"\x00\xff")  # a Mac's
    task = MME.open(release, "official", None)
    first, second = (row for row in task.questions if row.image == "count/0000.jpg")
    assert (first.text, first.turns, first.answers) == (
        "Is it “é”?  Please answer yes or no.",
        ("Is it “é”?" + SHORT,),
        ("Yes",),
    )
    assert (second.text, second.answers) == ("Is it?", ("yes",))
    assert count([first, second], ["Yes", "yes"], "official").credits == [1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Is it?\tYes\n", "{file} has 1 lines, expected 2: each a question, a tab, and Yes or No"),
        (b"a\tYes\nb\tNo\nc\tNo\n", "{file} has 3 lines, expected 2: each a question, a tab, and Yes or No"),
        (b"", "{file} is empty"),
        (b"\n \n", "{file} has 0 lines, expected 2: each a question, a tab, and Yes or No"),
        (b"Is it? Yes\nb\tNo\n", "{file}, line 1: 0 tabs, expected 1: 'Is it? Yes'"),
        (b"a\tYes\nb\tb\tNo\n", "{file}, line 2: 2 tabs, expected 1: 'b\\tb\\tNo'"),
        (b"a\tYes\nb\tMaybe\n", "{file}, line 2: the right answer is 'Maybe', expected Yes or No"),
        (b"a\tYes\nb\t\n", "{file}, line 2: the right answer is '', expected Yes or No"),
        (b"caf\xe9\tYes\nb\tNo\n", "{file} is not UTF-8: "),
    ],
)
def test_texts_that_cannot_be_right(release: Path, content: bytes, message: str) -> None:
    file = release / "count/0000.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        MME.open(release, "official", None)
    assert str(caught.value).startswith(message.replace("{file}", str(file)))


def test_what_is_missing_is_listed(release: Path) -> None:
    shutil.rmtree(release / "scene")
    (release / "count/0000.txt").unlink()
    (release / "posters/images/0001.jpg").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        MME.open(release.parent, "official", None)
    assert str(caught.value) == (
        f"{release} is not the whole of MME_Benchmark_release_version: count has 2 of 4 questions; "
        "count/0000.jpg has no text; posters/0001.txt has no picture; scene has 0 of 4 questions"
    )


def test_long_lists_are_cut(release: Path) -> None:
    for picture in release.rglob("*.jpg"):
        picture.unlink()
    with pytest.raises(FileNotFoundError, match=r"existence/0000\.txt has no picture; .*; and 14 more$"):
        MME.open(release, "official", None)


def test_two_pictures_for_one_text(release: Path) -> None:
    shutil.copy(release / "count/0000.jpg", release / "count/0000.png")
    with pytest.raises(
        ValueError, match=r"two pictures for one text, count/0000\.jpg and count/0000\.png: delete one$"
    ):
        MME.open(release, "official", None)


def test_no_release(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none is missing: the folder with MME's release"):
        MME.open(tmp_path / "none", "official", None)


def open_answered(release: Path, seed: int) -> tuple[Task, list[str]]:
    task = MME.open(release, "official", None)
    words = ["Yes", "No\n", "yes\tno", "No\r\nit is not", "", "是\n否", "Maybe\tyes", "no\u2028yes", "NO"]
    generator = random.Random(seed)
    return task, [generator.choice(words).strip() for _ in task.questions]


def test_results_written_and_read_again_score_the_same(release: Path, tmp_path: Path) -> None:
    for seed in range(5):
        task, predictions = open_answered(release, seed)
        folder = write_submission(task, predictions, tmp_path / f"results{seed}")
        assert folder == tmp_path / f"results{seed}/submission"
        assert sorted(file.name for file in folder.iterdir()) == sorted(f"{subtask}.txt" for subtask in NUM_QUESTIONS)
        again = score_results_folder(folder)
        direct = count(task.questions, predictions, "official")
        assert get_scores(again) == get_scores(direct)
        assert again.credits == direct.credits


def test_the_format_of_results(release: Path, tmp_path: Path) -> None:
    task = MME.open(release, "official", None)
    predictions = ["Yes"] * len(task.questions)
    predictions[:2] = ["Yes,\tit\r\nis", ""]
    folder = write_submission(task, predictions, tmp_path / "results")
    lines = (folder / "existence.txt").read_bytes().decode().split("\n")
    assert lines[0] == f"0000.jpg\tIs it red?{ENDING}\tYes\tYes, it  is"
    assert lines[1] == f"0000.jpg\tIs it 0?{ENDING}\tNo\t"
    assert len(lines) == 4 + 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\tq\tYes\n", "{file}, line 1: 2 tabs, expected 3: 'a\\tq\\tYes'"),
        ("a\tq\tYes\tyes\n\na\tq\tNo\tno\n", "{file}, line 2: 0 tabs, expected 3: ''"),
        ("a\tq\tYes\tyes\na\tq\tNo\tno\tno\n", "{file}, line 2: 4 tabs, expected 3: 'a\\tq\\tNo\\tno\\tno'"),
        ("a\tq\tYes\tyes\na\tq\tright\tno\n", "{file}, line 2: the right answer is 'right', expected Yes or No"),
        ("a\tq\tYes\tyes\nb\tq\tNo\tno\n", "{file}, lines 1 and 2: two consecutive lines are one image, not a and b"),
        ("a\tq\tYes\tyes\n", "{file} has 1 lines: the last has no partner, two are one image"),
        ("a\tq\tYes\tyes\n" * 4, "{file}: a is there 4 times, expected 2"),
        ("a\tq\tYes\tyes\na\tq\tNo\tno\n", "{file} has 2 lines, expected 4"),
        ("", "{file} is empty"),
    ],
)
def test_results_that_cannot_be_right(release: Path, tmp_path: Path, lines: str, message: str) -> None:
    task, predictions = open_answered(release, 0)
    file = write_submission(task, predictions, tmp_path / "results") / "color.txt"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        score_results_folder(file.parent)
    assert str(caught.value) == message.replace("{file}", str(file))


def run_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mme", "--results", str(folder)])
    mme.main()


def test_the_command_prints_subtasks_and_groups(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = MME.open(release, "official", None)
    run_command(write_submission(task, ["Yes"] * len(task.questions), tmp_path / "results"), monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["perception", "500.0000", "of", "2000"],
        ["cognition", "200.0000", "of", "800"],
    ]
    assert [line.split()[0] for line in lines[:-2]] == list(NUM_QUESTIONS)


def test_the_command_names_missing_files(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, predictions = open_answered(release, 0)
    folder = write_submission(task, predictions, tmp_path / "results")
    (folder / "OCR.txt").unlink()
    (folder / "count.txt").unlink()
    with pytest.raises(SystemExit) as caught:
        run_command(folder, monkeypatch)
    assert caught.value.code == f"error: {folder} is not a whole folder of MME results, missing: count.txt, OCR.txt"


@pytest.mark.skipif(
    "MME_EVAL_TOOL" not in os.environ,
    reason="MME_EVAL_TOOL names no folder of the owner's eval_tool.zip, whose LaVIN/ has a published score",
)
def test_the_owners_example() -> None:
    parts = score_results_folder(Path(os.environ["MME_EVAL_TOOL"]) / "LaVIN").parts["all"]
    assert (round(parts["perception"].score, 4), round(parts["cognition"].score, 4)) == (963.6114, 249.6429)
