"""Small annotation files, written as the owners of the data sets publish theirs, with the flaws that theirs have."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

COCO_LICENSES = [
    {
        "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/",
        "id": 1,
        "name": "Attribution-NonCommercial-ShareAlike",
    },
    {"url": "http://flickr.com/commons/usage/", "id": 7, "name": "No known copyright restrictions"},
]
COCO_CAPTIONS: dict[int, list[str]] = {
    9: [  # each is flawed, none is the same as another
        "A bowl of fruit and a plate of bread. ",
        "Closeup of bins of food.\n",
        "various  foods on\na table",
        "A MEAL IN A BOX WITH BREAD",
        "Bread , fruit and broccoli in containers .",
    ],
    25: ["A giraffe eats leaves."] * 3 + ["a giraffe eats leaves", "A giraffe eats leaves. ", "Two tall trees."],
    30: ["", " \n", "Flowers.", "a vase"],  # none of them is a caption
    34: [],
    36: ["A woman holds an umbrella.", "Person with a red umbrella.", "A woman in the rain."],
    999: ["A picture that the list of images does not have."],
}
FLICKR_CAPTIONS = {  # tokenised, as the owners' file has them
    "1000092795.jpg": [
        "Two young guys with shaggy hair look at their hands while hanging out in the yard .",
        "Two young , White males are outside near many bushes .",
        "Two men in green shirts are standing in a yard .",
        "A man in a blue shirt standing in a garden .",
        "Two friends enjoy time spent together .",
    ],
    "10002456.jpg": [
        'Man \'s shirt says " Dodgers " on it .',
        "The boy is n't looking at the dog 's ball ( a red one ) .",
        "Several men in hard hats are operating a giant pulley system .",
        "Workers look down from up above on a piece of equipment .",
        "Four men on top of a tall structure .",
    ],
    "2199200615.jpg": [
        "White dog running .",
        "A large white dog runs in the grass .",
        "A white dog is trotting through the grass .",
        "A white dog runs .",
        "A dog runs across the grass .",
    ],
    "36979.jpg": [
        "A group of friends playing cards .",
        "A group of people sit at a table .",
        "Friends play a game , and laugh .",
        "People sitting around a table .",
        "Several people play cards .",
    ],
}


def dump(content: object, file: Path) -> Path:
    """Write JSON as the owners do: on one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def write_coco(
    root: Path,
    split: str = "train2017",
    captions: Mapping[int, list[str]] = COCO_CAPTIONS,
    unlisted: Iterable[int] = (999,),
    annotations_first: bool = False,
) -> Path:
    """Write `captions_<split>.json`; 2017's file lists its licences first, 2014's last."""
    prefix = f"COCO_{split}_" if split.endswith("2014") else ""
    images = [
        {
            "license": 7 if image_id % 2 else 1,
            "file_name": f"{prefix}{image_id:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/{split}/{prefix}{image_id:012d}.jpg",
            "height": 360,
            "width": 640,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": f"http://farm9.staticflickr.com/8186/{image_id}_z.jpg",
            "id": image_id,
        }
        for image_id in captions
        if image_id not in unlisted
    ]
    pairs = [(image_id, caption) for image_id, texts in captions.items() for caption in texts]
    pairs = pairs[::2] + pairs[1::2]  # the captions of a picture do not stand together
    annotations = [
        {"image_id": image_id, "id": number, "caption": caption} for number, (image_id, caption) in enumerate(pairs, 1)
    ]
    info = {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017}
    content = {"info": info, "licenses": COCO_LICENSES, "images": images, "annotations": annotations}
    if annotations_first:
        content = dict(reversed(content.items()))
    return dump(content, root / "annotations" / f"captions_{split}.json")


def write_karpathy(root: Path, splits: Mapping[str, str]) -> Path:
    """Write `dataset_flickr30k.json`, whose sentences stand as they were typed, without blanks before full stops."""
    images = []
    for number, (name, split) in enumerate(splits.items()):
        sentids = list(range(5 * number, 5 * number + 5))
        sentences = [
            {"tokens": text.lower().split()[:-1], "raw": untokenise(text), "imgid": number, "sentid": sentid}
            for text, sentid in zip(FLICKR_CAPTIONS[name], sentids, strict=True)
        ]
        images.append({"sentids": sentids, "imgid": number, "sentences": sentences, "split": split, "filename": name})
    return dump({"images": images, "dataset": "flickr30k"}, root / "dataset_flickr30k.json")


def untokenise(text: str) -> str:
    """Return one of the captions above as it was typed."""
    for detached in (" .", " ,", " 's", " n't", " )"):
        text = text.replace(detached, detached[1:])
    return text.replace("( ", "(").replace('" Dodgers "', '"Dodgers"')


def write_token(root: Path) -> Path:
    """Write the owners' `results_20130124.token`."""
    lines = [f"{name}#{number}\t{text}" for name, texts in FLICKR_CAPTIONS.items() for number, text in enumerate(texts)]
    file = root / "results_20130124.token"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_csv(root: Path, extra: bytes = b"") -> Path:
    """Write Kaggle's `results.csv`: blanks around its bars, and one line without its second."""
    lines = ["image_name| comment_number| comment"]
    lines += [
        f"{name}| {number}| {text}" for name, texts in FLICKR_CAPTIONS.items() for number, text in enumerate(texts)
    ]
    content = "\n".join(lines).replace("2199200615.jpg| 4| A", "2199200615.jpg| 4   A") + "\n"
    file = root / "results.csv"
    file.write_bytes(content.encode() + extra)
    return file


VQA_QUESTIONS: dict[int, list[tuple[str, str]]] = {
    9: [
        ("How many cookies can be seen?", "2"),
        ("What color are the dishes?", "pink and yellow"),
        ("Is it fresh?", "yes"),
    ],
    25: [
        ("Is it sunny?", "yes"),
        ("Is it sunny?", "no"),
        ("How many giraffes are there?", "2"),
        (" Is it  sunny?", "yes"),
    ],
    30: [("What is in the vase?", "")],
    36: [("What is she holding?", "umbrella"), ("Is it raining?", "yes"), ("Who is this?", "woman"), ("Hot?", "no")],
}


def write_vqa(
    root: Path,
    questions: Mapping[int, list[tuple[str, str]]] = VQA_QUESTIONS,
    subtype: str = "train2014",
    without_answer: Iterable[int] = (),
    without_question: Iterable[int] = (),
) -> None:
    """Write both files of VQA-v2's training split; `subtype` is what they say they are."""
    asked = [
        (image_id, image_id * 1000 + number, question, answer)
        for image_id, pairs in questions.items()
        for number, (question, answer) in reversed(list(enumerate(pairs)))  # no order is promised
    ]
    about = {
        "info": {"description": "This is v2.0 of the VQA dataset.", "url": "http://visualqa.org", "year": 2017},
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "Creative Commons Attribution 4.0"},
        "data_subtype": subtype,
    }
    listed = [
        {"image_id": image_id, "question": question, "question_id": question_id}
        for image_id, question_id, question, _ in asked
        if question_id not in without_question
    ]
    annotations = [
        {
            "question_type": " ".join(question.lower().split()[:2]),
            "multiple_choice_answer": answer,
            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": person} for person in range(1, 11)],
            "image_id": image_id,
            "answer_type": "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other",
            "question_id": question_id,
        }
        for image_id, question_id, question, answer in reversed(asked)
        if question_id not in without_answer
    ]
    head = {"task_type": "Open-Ended", "data_type": "mscoco"}
    dump(head | about | {"questions": listed}, root / "v2_OpenEnded_mscoco_train2014_questions.json")
    del about["data_subtype"]  # that file has it behind its list
    tail = {"data_subtype": subtype, "data_type": "mscoco"}
    dump(about | {"annotations": annotations} | tail, root / "v2_mscoco_train2014_annotations.json")
