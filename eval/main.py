"""Score models on benchmarks: `python eval/main.py --task easy_vqa --model-path runs/tiny/final`.

    --task vqav2, vqav2_test_dev, vqav2_test_std   --data COCO's folder, with VQA's questions and annotations
           mme, pope                               --data what their owners distribute
           mmbench, mmbench_cn                     --data the TSV file
           conversations                           --data LLaVA's conversation file: its answers are the references
           easy_vqa, easy_vqa_choice, tiny_zh      --data runs (the default), where `data.prepare` wrote them

The files in `eval/` that are called like tasks say how each asks and counts. Several tasks and models are shown side
by side; adapters among the models need `--model-base`, what they were trained on; `--adapter` puts a LoRA on the model:

    python eval/main.py --task tiny_zh easy_vqa --model-path runs/tiny/final runs/tiny-zh/final \\
        --model-base runs/tiny/final
    torchrun --nproc_per_node=8 eval/main.py --task vqav2 --data datasets/coco --model-path liuhaotian/llava-v1.5-13b

Answers and scores go to `eval/<task>/` beside the model or adapter, or into `runs/<name>/` for one from the hub; what
lies there is told in `eval/answers.py`. A run that was stopped goes on when the same line is run again; when all is
answered, it only counts.
"""

import argparse
import dataclasses
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.conversation import CHAT_TEMPLATES  # noqa: E402
from eval.answers import Ranks, ResultsFolder, describe_scores, hash_files  # noqa: E402
from eval.benchmarks import BENCHMARKS  # noqa: E402
from eval.loading import Model, choose_batch_size, describe_session, load_model, open_model  # noqa: E402
from eval.predict import answer_questions  # noqa: E402
from eval.task import Task  # noqa: E402
from model.adapter_files import ADAPTER_CONFIG  # noqa: E402
from model.llava import Llava  # noqa: E402

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WRITE_EVERY_S = 1.0  # a kill costs what was answered since
MAX_NAMES = 20  # of a breakdown in the terminal; larger ones are in scores.json and in compare.py's tables


def main() -> None:
    arguments = parse_arguments()
    ranks = Ranks.of_environment()
    try:
        tables = score_models(arguments, ranks)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    for table in tables:
        print_table(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=BENCHMARKS, nargs="+", required=True, metavar="TASK")
    parser.add_argument(
        "--model-path", nargs="+", required=True, help="model or adapter folders (runs/tiny/final), or owner/name[@rev]"
    )
    parser.add_argument("--model-base", help="what an adapter or projector given as a model belongs to")
    parser.add_argument("--adapter", help="LoRA on top of the model")
    parser.add_argument("--vision-tower", help="CLIP to use instead of the one the model names")
    parser.add_argument("--data", type=Path, default=Path("runs"), help="folder or file of the benchmark")
    parser.add_argument("--image-folder", type=Path, help="where its pictures are, if not beside its questions")
    parser.add_argument("--rule", help="ask and count as another harness does: lmms-eval, vlmevalkit")
    parser.add_argument("--conv-mode", choices=CHAT_TEMPLATES, help="prompt template, instead of the task's own")
    parser.add_argument("--max-new-tokens", type=int, help="of the longest answer, instead of the task's own")
    parser.add_argument("--limit", type=int, help="ask at most so many questions, of each picture all or none")
    parser.add_argument("--seed", type=int, default=0, help="which pictures --limit draws")
    parser.add_argument("--out", type=Path, help="folder of the results, instead of eval/ beside the model")
    parser.add_argument("--batch-size", type=int, help="questions in work together: by default 32, a tiny model's 256")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", dest="bits", action="store_const", const=8, default=16)
    bits.add_argument("--load-4bit", dest="bits", action="store_const", const=4)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: as stored, but on CPUs bfloat16 for float16"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for name in ("limit", "max_new_tokens", "batch_size"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1")
    if len(arguments.model_path) > 1 and (arguments.out or arguments.adapter):
        parser.error("--out and --adapter go with one model")
    return arguments


def score_models(arguments: argparse.Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    """Answer and count all that is asked for; return a table a task, on the first rank."""
    tasks = {name: open_task(name, arguments) for name in dict.fromkeys(arguments.task)}
    hashes = {name: hash_files(task.files) for name, task in tasks.items()}
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in tasks}
    adapters = [path for path in arguments.model_path if (Path(path) / ADAPTER_CONFIG).is_file()]
    is_alone = len(arguments.model_path) == 1
    if arguments.model_base and not adapters and not is_alone:
        raise ValueError(f"--model-base {arguments.model_base}: none of the models is an adapter, leave it out")
    for path in dict.fromkeys(arguments.model_path):
        model = open_model(
            path, arguments.model_base if is_alone or path in adapters else None, arguments.adapter,
            arguments.vision_tower, DTYPES[arguments.dtype], arguments.bits, arguments.device, arguments.out,
        )  # fmt: skip
        llava: Llava | None = None
        for name, task in tasks.items():
            rule = arguments.rule or BENCHMARKS[name].rules[0]
            settings = model.settings | {
                "task": name,
                "rule": rule,
                "data": str(arguments.data),
                "image_folder": arguments.image_folder and str(arguments.image_folder),
                "data_hash": hashes[name],
                "template": task.template,
                "prompt": task.prompt,
                "max_new_tokens": task.max_new_tokens,
                "limit": arguments.limit,
                "seed": arguments.seed if arguments.limit else None,
                "num_questions": len(task.questions),
            }
            folder = model.results / (name if rule == BENCHMARKS[name].rules[0] else f"{name}.{rule}")
            results = ResultsFolder(folder, settings, task.questions, ranks)
            if not results.is_complete:
                batch_size = arguments.batch_size or choose_batch_size(model.checkpoint.config)
                results.start(describe_session(arguments.device, batch_size, ranks.size))
                llava = llava or load_model(model, arguments.device)
                answer_remaining(results, llava, model, task, batch_size)
            if ranks.rank == 0:
                results.wait_for_others()
                scores = finish(results, task)
                rows[name] |= scores["bars"] | {model.name: scores}
    return [{"task": name, "rows": of_task} for name, of_task in rows.items() if of_task]


def open_task(name: str, arguments: argparse.Namespace) -> Task:
    """Open a benchmark's files, and choose the questions."""
    benchmark = BENCHMARKS[name]
    rule = arguments.rule or benchmark.rules[0]
    if rule not in benchmark.rules:
        raise ValueError(f"--rule {rule}: {name} knows {', '.join(benchmark.rules)}")
    task = benchmark.open(arguments.data, rule, arguments.image_folder)
    task = dataclasses.replace(
        task,
        template=arguments.conv_mode or task.template,
        max_new_tokens=arguments.max_new_tokens or task.max_new_tokens,
    )
    return task if arguments.limit is None else draw_questions(task, arguments.limit, arguments.seed)


def draw_questions(task: Task, limit: int, seed: int) -> Task:
    """Keep all questions about some pictures, drawn by lot, as many as do not exceed the limit.

    Raises: ValueError when no picture has as few questions.
    """
    by_picture: dict[str, list[int]] = {}
    for number, question in enumerate(task.questions):
        by_picture.setdefault(question.cluster, []).append(number)
    pictures = sorted(by_picture)
    random.Random(seed).shuffle(pictures)
    kept: list[int] = []
    for picture in pictures:
        if len(kept) + len(by_picture[picture]) <= limit:
            kept += by_picture[picture]
    if not kept:
        raise ValueError(f"--limit {limit}: every picture has more questions, and they are asked together")
    kept.sort()
    return dataclasses.replace(
        task,
        questions=[task.questions[number] for number in kept],
        bars={bar: [answers[number] for number in kept] for bar, answers in task.bars.items()},
    )


def answer_remaining(results: ResultsFolder, llava: Llava, model: Model, task: Task, batch_size: int) -> None:
    """Answer what has no answer yet of this rank's share, writing every second."""
    remaining = results.remaining
    questions = [task.questions[number] for number in remaining]
    answers = answer_questions(
        llava, model.tokenizer, questions, task.open_picture, task.max_new_tokens, task.template, batch_size
    )
    num_questions = len(results.ranks.share(task.questions))
    what = f"{model.name} {results.settings['task']}"
    num_done, is_first = num_questions - len(remaining), results.ranks.rank == 0
    rows: list[dict[str, Any]] = []
    written_at = time.monotonic()
    try:
        with tqdm(answers, what, num_questions, initial=num_done, unit="question", disable=not is_first) as bar:
            for place, answer in bar:
                rows.append(
                    {
                        "question_id": questions[place].question_id,
                        "prediction": answer.text,
                        "num_prompt_tokens": answer.num_prompt_tokens,
                        "num_tokens": answer.num_tokens,
                    }
                )
                if time.monotonic() - written_at > WRITE_EVERY_S:
                    results.add(rows)
                    rows, written_at = [], time.monotonic()
    finally:  # a picture that cannot be read, or Ctrl-C, costs no answer
        results.add(rows)
        results.close()


def finish(results: ResultsFolder, task: Task) -> dict[str, Any]:
    """Count the answers of all ranks; write and return what comes out."""
    name, rule = (results.settings[key] for key in ("task", "rule"))
    benchmark = BENCHMARKS[name]
    scored = benchmark.count(task.questions, results.predictions, rule)
    scores = {"task": name, "rule": rule, "metric": benchmark.metric} | describe_scores(scored)
    scores["bars"] = {
        bar: describe_scores(benchmark.count(task.questions, answers, rule)) for bar, answers in task.bars.items()
    }
    scores = results.finish(scored, scores)
    if benchmark.write_submission:
        print(f"wrote {benchmark.write_submission(task, results.predictions, results.folder)}")
    return scores


def print_table(table: dict[str, Any]) -> None:
    """Print a line for each part of a score, a column for each model or bar."""
    scores = list(table["rows"].values())
    last = scores[-1]
    settings = last["settings"]
    print(f"\n{table['task']}: {last['metric']}, rule {settings['rule']}, template {settings['template']}")
    print(f"asked as {settings['prompt']!r}, at most {settings['max_new_tokens']} tokens of answer")
    shown = {breakdown: parts for breakdown, parts in last["parts"].items() if len(parts) <= MAX_NAMES}
    if not shown:
        print(f"{last['n']} answers, which their owner's server scores")
        return
    numbers = [f"[{number}]" for number in range(1, len(scores) + 1)]
    width = 2 + max(len(name) for parts in shown.values() for name in parts)
    print(f"{'':{width}s}{'n':>9s}" + "".join(f"{number:>9s}" for number in numbers) + "   95 % interval of the last")
    for breakdown, parts in shown.items():
        is_headline = breakdown == "all"
        if not is_headline:
            print(f"{breakdown}:")
        for name, part in parts.items():
            of_all = [row["parts"].get(breakdown, {}).get(name) for row in scores]
            unit = 100 if part["best"] == 1 else 1
            cells = "".join(f"{'-' if one is None else format(one['score'] * unit, '.1f'):>9s}" for one in of_all)
            low, high = (value * unit for value in part["interval"])
            label = name if is_headline else f"  {name}"
            print(f"{label:{width}s}{part['n']:9d}{cells}   {low:.1f} to {high:.1f}")
    for number, name in zip(numbers, table["rows"], strict=True):
        print(f"{number} {name}")


if __name__ == "__main__":
    main()
