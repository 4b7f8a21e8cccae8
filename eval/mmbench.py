"""MMBench and MMBench-CN: multiple choice, where a question counts if it is right for every order of its options.

The owner's file, `mmbench_dev_20230712.tsv` (4,377 rows) or `mmbench_dev_cn_20231003.tsv` (4,329 rows, 1,164
questions), holds every order as a row of its own: the question as it is (the first pass) has an index below 1,000,000,
its k-th copy, options and answer turned k places, that index + k * 1,000,000. There are as many passes as options.
Pictures are base64; in later files that of a copy may be the index of the row that has it (64 characters at most). The
test files have no answers: they are asked, and counted by the owner's server. A file without copies gets them here (one
that was cut off exactly between two first passes would pass for such a file: look at the number of questions).

- circular (the headline): all passes of a question right. vanilla: the first pass alone.
- The question is put as LLaVA's `model_vqa_mmbench.py --single-pred-prompt` does: the hint, if any, question and
  options on lines of their own, then the request for a letter; vicuna_v1, 1024 new tokens. Its script asks every row
  once, not `--all-rounds`, as the copies are in the file.
- The choice is read as the server's VLMEvalKit did when LLaVA-1.5 was scored, by rules alone: the marks .()[],:;!*#{}
  become blanks; if exactly one option's letter is a word, that is it. Else (unless a word is "Z", or the answer holds
  one of four refusals) if exactly one option's text is in the answer, capitals aside, that is it. Else nothing is
  chosen: wrong. The server then asks GPT-3.5 which option is meant, so it may count more of such answers as right.

Other rules, of which the judge models are not reproduced either:
- vlmevalkit: its LLaVA's chat template and 2048 new tokens, the request in Chinese wherever a question holds Chinese.
  Since 2025 the letter has to be among the last four words (or follow "answer is"), and an answer longer than twice
  all options names none. Not reproduced: the blanks it puts around picture and prompt.
- lmms-eval: everything before the options on one line, with an announcement, and its own words for the Chinese request;
  256 new tokens in Chinese. The letters A to E count as words, bare or with . , : or brackets. Not reproduced: its
  data's options that read "nan".

Note: LLaVA drops the options from the first "none" on. Here that word is no option only where nothing follows it, and
it is not the answer.

Source: Liu et al. 2023 (arXiv 2307.06281); https://github.com/open-compass/MMBench; VLMEvalKit's
`multiple_choice.py`, `matching_util.py` and `mmb_eval_gradio.py`.
"""

import base64
import binascii
import csv
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from data.image import open_image
from eval.mmbench_choice import read_choice
from eval.tally import Part, mean_part
from eval.task import OFFICIAL, Benchmark, Question, Scored, Task

RULES = (OFFICIAL, "lmms-eval", "vlmevalkit")
LETTERS = "ABCD"
COPY_STEP = 1_000_000  # between the indices of a question's passes
MAX_REFERENCE = 64  # characters; a longer cell is a picture
MAX_CELL = 2**28  # characters; the csv module's own limit is 131,072
COLUMNS = ("index", "question", *LETTERS, "image")
KINDS = ("category", "l2-category")
# What pandas, with which everybody reads these files, takes for nothing; "nan" and "none" also in other cases.
NOTHING = {"", "#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "n/a", "null", "-nan", "-NaN"}
REQUESTS = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接回答选项字母。",
}
LMMS_EVAL_REQUESTS = {"en": REQUESTS["en"], "zh": "请直接使用所提供的选项字母作为答案回答。"}
LMMS_EVAL_ANNOUNCEMENTS = {"en": "There are several options:", "zh": "有如下几个选项："}
MAX_NEW_TOKENS = {OFFICIAL: 1024, "lmms-eval": 1024, "vlmevalkit": 2048}
TEMPLATES = {OFFICIAL: "vicuna_v1", "lmms-eval": "vicuna_v1", "vlmevalkit": "llava_v1"}
CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Row:
    """One pass of a question."""

    index: int
    question: str
    hint: str
    options: Mapping[str, str]  # by letter
    answer: str  # a letter; "" in test files
    kinds: Mapping[str, str]
    picture: str  # its name: the index of the first row that has it

    @property
    def first_index(self) -> int:
        return self.index % COPY_STEP


def open_task(data: Path, rule: str, image_folder: Path | None, language: str) -> Task:
    """Read the TSV file, or the only one of this language in a folder.

    Raises: FileNotFoundError or ValueError saying what is missing or wrong, in which line or question.
    """
    if image_folder is not None:
        raise ValueError(f"image folder {image_folder}: MMBench's pictures are in its TSV file, leave it out")
    file = find_file(data, language)
    rows, pictures = load_rows(file)
    is_chinese = 2 * sum(bool(CHINESE.search(row.question)) for row in rows) > len(rows)
    if is_chinese != (language == "zh"):
        task = "mmbench_cn" if is_chinese else "mmbench"
        raise ValueError(f"{file} asks in {'Chinese' if is_chinese else 'English'}: that is the task {task}")
    rows = group_passes(rows, file)
    num_passes: dict[int, int] = defaultdict(int)
    for row in rows:
        num_passes[row.first_index] += 1
    questions = [make_question(row, num_passes[row.first_index], rule, language) for row in rows]

    def open_picture(name: str) -> Image.Image:
        try:
            return open_image(io.BytesIO(pictures[name]))
        except ValueError as error:
            raise ValueError(f"{file}, picture of index {name}: {error}") from error

    shown = Row(0, "{question}", "{hint}", {letter: f"{{{letter}}}" for letter in LETTERS}, "", {}, "")
    return Task(
        questions=questions,
        open_picture=open_picture,
        files=[file],
        template=TEMPLATES[rule],
        max_new_tokens=256 if (rule, language) == ("lmms-eval", "zh") else MAX_NEW_TOKENS[rule],
        prompt=make_prompt(shown, rule, language),
        bars={"always A": ["A"] * len(questions)} if questions[0].answers else {},
    )


def find_file(data: Path, language: str) -> Path:
    """Return the file that is meant. Raises: FileNotFoundError or ValueError listing what there is."""
    if data.is_file():
        return data
    if not data.is_dir():
        raise FileNotFoundError(f"{data} is missing: expected MMBench's TSV file, see github.com/open-compass/MMBench")
    files = sorted(data.glob("*.tsv"))
    fitting = [file for file in files if _is_named_so(file.name.lower(), language)]
    if len(fitting) != 1:
        wanted = "mmbench_*_cn_*.tsv" if language == "zh" else "mmbench_*.tsv without _cn"
        found = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(f"{data} holds {len(fitting)} files {wanted}, expected one: name it (TSVs: {found})")
    return fitting[0]


def _is_named_so(name: str, language: str) -> bool:
    return name.startswith("mmbench") and ("_cn" in name) == (language == "zh")


def load_rows(file: Path) -> tuple[list[Row], dict[str, bytes]]:
    """Return the rows, and each picture once, by its name.

    Raises: ValueError naming the line.
    """
    rows: list[Row] = []
    pictures: dict[str, bytes] = {}
    names: dict[str, str] = {}  # of pictures, by the digest of their base64: copies repeat them
    lines: dict[int, int] = {}
    for line, cells in _read_cells(file):
        try:
            index = int(cells["index"])
            if index < 0:
                raise ValueError(f"index {index} is negative")
            if index in lines:
                raise ValueError(f"index {index} is there twice, first in line {lines[index]}")
            lines[index] = line
            name = cells["image"].strip()
            if len(name) > MAX_REFERENCE:
                name = names.setdefault(hashlib.sha256(name.encode()).hexdigest(), str(index))
                if name not in pictures:
                    pictures[name] = base64.b64decode("".join(cells["image"].split()), validate=True)
            rows.append(_parse_row(index, cells, name))
        except binascii.Error as error:
            raise ValueError(f"{file}, line {line}: the picture is no base64: {error}") from error
        except ValueError as error:
            raise ValueError(f"{file}, line {line}: {error}") from error
    if not rows:
        raise ValueError(f"{file} holds no questions")
    # What is no picture names a row, whose own picture may be named after another one.
    owners = {str(row.index): row.picture for row in rows}
    rows = [row if row.picture in pictures else replace(row, picture=owners.get(row.picture, "")) for row in rows]
    for row in rows:
        if row.picture not in pictures:
            raise ValueError(f"{file}, line {lines[row.index]}: the picture is neither base64 nor another row's index")
    return rows, pictures


def _read_cells(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row's last line in the file and its cells by column; names in lower case, except the options'."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, "excel-tab", strict=True)
        try:
            header = [name if name in LETTERS else name.lower() for name in next(reader, [])]
            missing = [column for column in COLUMNS if column not in header]
            if missing:
                raise ValueError(f"{file} has no column {', '.join(missing)}: is it MMBench's TSV?")
            for cells in reader:
                if len(cells) != len(header):
                    problem = f"{len(cells)} columns, the header {len(header)}: is the file cut off?"
                    raise ValueError(f"{file}, line {reader.line_num} has {problem}")
                yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error} (is the file cut off?)") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8, near line {reader.line_num}: {error}") from error


def _parse_row(index: int, cells: Mapping[str, str], picture: str) -> Row:
    texts = [cells[letter] for letter in LETTERS]
    answer = cells.get("answer", "").strip()
    while texts and _is_nothing(texts[-1]) and not (LETTERS[len(texts) - 1] == answer and texts[-1].strip()):
        texts.pop()
    options = dict(zip(LETTERS, texts, strict=False))
    empty = [letter for letter, text in options.items() if not text.strip()]
    if len(options) < 2 or empty:
        raise ValueError(f"index {index} has the options {', '.join(f'{k} {v!r}' for k, v in options.items())}")
    if "answer" in cells and answer not in options:
        raise ValueError(f"index {index} has the answer {answer!r}, expected one of {', '.join(options)}")
    if _is_nothing(cells["question"]):
        raise ValueError(f"index {index} has no question")
    hint = "" if _is_nothing(cells.get("hint", "")) else cells["hint"]
    kinds = {kind: cells[kind] for kind in KINDS if not _is_nothing(cells.get(kind, ""))}
    return Row(index, cells["question"], hint, options, answer, kinds, picture)


def _is_nothing(cell: str) -> bool:
    return cell.strip() in NOTHING or cell.strip().lower() in ("nan", "none")


def group_passes(rows: Sequence[Row], file: Path) -> list[Row]:
    """Return all passes of all questions, those about one picture next to each other; a file without copies gets them.

    Raises: ValueError for copies without a question, or too few of them.
    """
    if all(row.index < COPY_STEP for row in rows):
        rows = [turn_options(row, number) for row in rows for number in range(len(row.options))]
    passes: dict[int, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.index):
        passes[row.first_index].append(row)
    for index, group in passes.items():
        if group[0].index != index:
            raise ValueError(f"{file}: index {group[0].index} is a copy of index {index}, which is not there")
        if len(group) < len(group[0].options):
            problem = f"{len(group)} rows, expected one for each of its {len(group[0].options)} options"
            raise ValueError(f"{file}: question {index} has {problem}: is the file cut off?")
    order: dict[str, int] = {}
    for row in rows:
        order.setdefault(row.picture, len(order))
    return sorted((row for group in passes.values() for row in group), key=lambda row: order[row.picture])


def turn_options(row: Row, number: int) -> Row:
    """Return the pass in which the options have moved up by `number` places, the first ones to the end."""
    letters, texts = list(row.options), list(row.options.values())
    options = dict(zip(letters, texts[number:] + texts[:number], strict=True))
    answer = letters[(letters.index(row.answer) - number) % len(letters)] if row.answer else ""
    return replace(row, index=row.index + number * COPY_STEP, options=options, answer=answer)


def make_question(row: Row, num_passes: int, rule: str, language: str) -> Question:
    return Question(
        question_id=str(row.index),
        image=row.picture,
        text=row.question + list_options(row.options),
        turns=(make_prompt(row, rule, language),),
        answers=(row.answer,) if row.answer else (),
        kinds=row.kinds,
        details={"question": row.first_index, "num_passes": num_passes, "options": dict(row.options)},
    )


def make_prompt(row: Row, rule: str, language: str) -> str:
    """Return what the model reads."""
    listed = list_options(row.options)
    if rule == "lmms-eval":
        before = f"{row.hint} {row.question}" if row.hint else row.question
        return f"{before} {LMMS_EVAL_ANNOUNCEMENTS[language]}{listed}\n\n{LMMS_EVAL_REQUESTS[language]}"
    asked = (f"{row.hint}\n{row.question}" if row.hint else row.question) + listed
    if rule == "vlmevalkit" and CHINESE.search(asked):
        language = "zh"
    return f"{asked}\n{REQUESTS[language]}"


def list_options(options: Mapping[str, str]) -> str:
    """Return a line for each option, with the line's end in front."""
    return "".join(f"\n{letter}. {text}" for letter, text in options.items())


def count(questions: Sequence[Question], predictions: Sequence[str], rule: str) -> Scored:
    """Judge every pass; count questions by all of their passes (where all are asked), and by the first.

    Raises: ValueError where no question has all its passes, and none its first.
    """
    if not questions[0].answers:
        return Scored([None] * len(questions), {})
    pairs = zip(questions, predictions, strict=True)
    credits = [
        float(read_choice(prediction, question.details["options"], rule) == question.answers[0])
        for question, prediction in pairs
    ]
    passes: dict[int, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        passes[question.details["question"]].append(place)
    whole = {
        group[0]: min(credits[place] for place in group)
        for group in passes.values()
        if len(group) == questions[group[0]].details["num_passes"]
    }
    first = {
        place: credits[place]
        for place, question in enumerate(questions)
        if question.question_id == str(question.details["question"])
    }
    if not whole and not first:
        raise ValueError(f"none of the {len(passes)} questions is asked as it is: ask more of them")
    parts: dict[str, dict[str, Part]] = {"all": {}}
    for name, values in (("circular", whole), ("vanilla", first)):
        if values:
            parts["all"][name] = mean_part([questions[place].cluster for place in values], list(values.values()))
    for kind in KINDS:
        by_name: dict[str, list[int]] = defaultdict(list)
        for place in whole:
            if kind in questions[place].kinds:
                by_name[questions[place].kinds[kind]].append(place)
        if by_name:
            parts[kind] = {
                name: mean_part([questions[place].cluster for place in places], [whole[place] for place in places])
                for name, places in sorted(by_name.items())
            }
    return Scored(list(credits), parts)


def write_submission(task: Task, predictions: Sequence[str], folder: Path) -> Path:
    """Write `mmbench.tsv` for the owner's server, which takes .tsv and .csv besides LLaVA's .xlsx."""
    file = folder / "mmbench.tsv"
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, "excel-tab")
        writer.writerow(["index", "question", *LETTERS, "prediction"])
        for question, prediction in zip(task.questions, predictions, strict=True):
            options = question.details["options"]
            asked = question.text.removesuffix(list_options(options))
            cells = [options.get(letter, "") for letter in LETTERS]
            writer.writerow([question.question_id, asked, *cells, prediction])
    return file


MMBENCH = Benchmark("circular accuracy", partial(open_task, language="en"), count, RULES, write_submission)
MMBENCH_CN = Benchmark("circular accuracy", partial(open_task, language="zh"), count, RULES, write_submission)
