"""Time this project beside its peers: `python eval/speed.py --suite train,generate --size small`.

    train     a LoRA step, against transformers with PEFT, default and tuned         eval/speed_train.py
    generate  first token and tokens per second, against transformers' generate     eval/speed_generate.py
    eval      questions per second of a benchmark, against transformers             eval/speed_eval.py
    data      preparing, checking and loading, against official LLaVA's loading     eval/speed_data.py
    load      reading a checkpoint, against transformers and plain reading          eval/speed_load.py
    start     from a job's command to the end of its first step, part by part       eval/speed_start.py
    memory    what a LoRA step takes of one card of eight, against the plan         eval/speed_memory.py
    padding   tokens spent on padding, against official LLaVA's sampler; counted    eval/speed_padding.py
    growth    a step, a plan and a data set as they grow; with plots                eval/speed_growth.py

Contestants take turns on the same weights; what is printed is medians, their spread and ratios to the peer, and how
much of what the machine can do at most that is. Each result is appended to `eval/results/speed.jsonl` with the machine,
the versions and the commit; `--table` shows what it should have been. Needs `pip install -r tests/requirements.txt` for
the peers, on a GPU also `accelerate`.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from eval.speed_table import make_table  # noqa: E402

RESULTS = ROOT / "eval/results/speed.jsonl"
SUITES = ("train", "generate", "eval", "data", "load", "start", "memory", "padding", "growth")
SIZES = ("tiny", "small", "1b", "7b", "13b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--suite", help=f"one or several of {','.join(SUITES)}, with commas between")
    chosen.add_argument("--table", action="store_true", help="measure nothing: show what --out holds already")
    parser.add_argument("--size", choices=SIZES, default="small", help="of all but data and padding")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    parser.add_argument("--repeats", type=int, help="rounds; by default 5 for load, 3 for others")
    parser.add_argument("--documents", type=int, help="of train: rows of a step, by default 32, on a GPU 64")
    parser.add_argument(
        "--checkpoint-dir", type=Path, default=Path("runs/speed"), help="random weights, written if they are not there"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="of generate")
    parser.add_argument("--questions", type=int, help="of eval: by default 27, on a GPU 540")
    parser.add_argument("--rows-at-once", type=int, default=32, help="of eval: questions in work at a time")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of eval; by default what the device multiplies"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="of generate: tokens an answer has")
    parser.add_argument("--rows", type=int, help="of data, start, growth: rows of the largest file")
    tiny = ROOT / "data/tiny/tokenizer.model"
    parser.add_argument("--tokenizer", type=Path, default=tiny, help="of data, growth: LLaMA's; else the tiny model's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file the results are appended to")
    arguments = parser.parse_args()
    if arguments.table:
        if not arguments.out.is_file():
            parser.error(f"--out {arguments.out} does not exist: nothing has been measured into it")
        try:
            print(make_table(read_results(arguments.out), SUITES), end="")
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"error: {arguments.out} holds something else than results of this program: {error}")
        return
    suites = arguments.suite.split(",")
    if unknown := sorted(set(suites) - set(SUITES)):
        parser.error(f"--suite {','.join(unknown)}: expected one or several of {','.join(SUITES)}")
    at_least = {"questions": 1, "documents": 1, "repeats": 1, "rows_at_once": 1, "batch_sizes": 1, "new_tokens": 2}
    at_least["rows"] = 8  # one a rank
    for name, least in at_least.items():
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if not arguments.tokenizer.is_file():
        parser.error(f"--tokenizer {arguments.tokenizer}: expected a file, tokenizer.model or tokenizer.json")
    if arguments.checkpoint_dir.exists() and not arguments.checkpoint_dir.is_dir():
        parser.error(f"--checkpoint-dir {arguments.checkpoint_dir}: expected a folder, or a name that is free")
    run_suites(suites, arguments)


def read_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_suites(suites: list[str], arguments: argparse.Namespace) -> None:
    import torch

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: this PyTorch finds no GPU; leave the option out to measure the CPU")
    for name in suites:
        # Imported here: contestants' processes import this file, too, and should start quickly.
        suite = importlib.import_module(f"eval.speed_{name}")
        for result in suite.compare(arguments):
            suite.print_result(result)
            print(f"{result['environment']}\n", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
