"""Score model folders: `python eval/main.py --task easy_vqa --model-path runs/tiny/final`.

Predictions and scores go to `<run>/eval/<task>/`, beside the model folder. Several tasks and model folders are shown
side by side; adapters among the folders need `--model-base`, what they were trained on:

    python eval/main.py --task tiny_zh easy_vqa --model-path runs/tiny/final runs/tiny-zh/final \\
        --model-base runs/tiny/final
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.tokenizer import Tokenizer, find_tokenizer  # noqa: E402
from eval import easy_vqa  # noqa: E402
from eval.predict import answer_questions  # noqa: E402
from model.adapter_files import ADAPTER_CONFIG  # noqa: E402
from model.files import replace_folder  # noqa: E402
from model.llava import Llava  # noqa: E402
from model.weights import build_llava, open_checkpoint  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=easy_vqa.TASKS, nargs="+", required=True)
    parser.add_argument("--model-path", type=Path, nargs="+", required=True, help="model folders, e.g. runs/tiny/final")
    parser.add_argument("--model-base", type=Path, help="model folder that adapters among the model folders belong to")
    parser.add_argument("--data", type=Path, default=Path("runs"), help="folder of the prepared data sets")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    try:
        adapters = [folder for folder in arguments.model_path if (folder / ADAPTER_CONFIG).is_file()]
        if arguments.model_base and not adapters:
            raise ValueError(f"--model-base {arguments.model_base}: no model folder is an adapter, leave it out")
        questions = {task: easy_vqa.load_questions(arguments.data, task) for task in arguments.task}
        tables = {
            task: {
                name: easy_vqa.score(questions[task], predictions)
                for name, predictions in easy_vqa.baselines(questions[task], arguments.data, task).items()
            }
            for task in arguments.task
        }
        for folder in arguments.model_path:
            checkpoint = open_checkpoint(folder, arguments.model_base if folder in adapters else None)
            model = build_llava(checkpoint, device=arguments.device)
            tokenizer = Tokenizer(find_tokenizer(*checkpoint.folders))
            for task in arguments.task:
                tables[task][str(folder)] = evaluate(folder, model, tokenizer, task, questions[task], arguments.data)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for task, table in tables.items():
        print_table(task, table)


def evaluate(folder: Path, model: Llava, tokenizer: Tokenizer, task: str, questions: list[dict], data: Path) -> dict:
    """Answer every question with one model; write predictions and scores; return the scores."""
    by_image: dict[str, list[dict]] = {}
    for row in questions:
        by_image.setdefault(row["image"], []).append(row)
    groups = [(data / image, [row["question"] for row in rows]) for image, rows in by_image.items()]
    started = time.perf_counter()
    answers = answer_questions(model, tokenizer, groups, easy_vqa.MAX_NEW_TOKENS)
    bar = tqdm(answers, total=len(groups), desc=f"{folder} {task}", unit="picture")
    predictions = [answer for answers_to_image in bar for answer in answers_to_image]
    ordered = [row for rows in by_image.values() for row in rows]
    scores = {"task": task} | easy_vqa.score(ordered, predictions)
    scores |= {"model": str(folder), "seconds": round(time.perf_counter() - started, 2)}
    with replace_folder(folder.resolve().parent / "eval" / task) as out:
        with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for row, prediction in zip(ordered, predictions, strict=True):
                file.write(json.dumps(row | {"prediction": prediction}, ensure_ascii=False) + "\n")
        (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores


def print_table(task: str, rows: dict[str, dict]) -> None:
    """Print a row per model or bar, a column per question type."""
    title = f"{task}: exact match, %"
    width = max(len(name) for name in (title, *rows))
    first = next(iter(rows.values()))
    types = [kind for kind in easy_vqa.TYPES if kind in first["by_type"]]
    print(f"\n{title:{width}s}" + "".join(f"{kind:>14s}" for kind in ("all", *types)))
    for name, scores in rows.items():
        values = [scores["score"], *(scores["by_type"][kind]["score"] for kind in types)]
        print(f"{name:{width}s}" + "".join(f"{100 * value:14.1f}" for value in values))
    counts = [first["n"], *(first["by_type"][kind]["n"] for kind in types)]
    print(f"{'questions':{width}s}" + "".join(f"{n:14d}" for n in counts))


if __name__ == "__main__":
    main()
