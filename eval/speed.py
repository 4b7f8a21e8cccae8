"""Time this project beside its peers: `python eval/speed.py --suite tiny,load,generate --size small`.

    tiny      a training step of the main job's model, against transformers         eval/speed_tiny.py
    load      reading a checkpoint, against transformers and plain reading          eval/speed_load.py
    generate  first token and tokens per second, against transformers' generate     eval/speed_generate.py
    padding   tokens spent on padding, against official LLaVA's sampler; counted    eval/speed_padding.py
    memory    what a LoRA step takes of one card of eight, against the plan         eval/speed_memory.py
    eval      questions per second of a benchmark, against transformers             eval/speed_eval.py
    data      preparing, checking and loading, against official LLaVA's loading     eval/speed_data.py

Contestants take turns on the same weights; what is printed is medians, their spread and ratios to the peer, and how
much of what the machine can do at most that is. Each result is appended to `eval/results/speed.jsonl` with the machine,
the versions and the commit. Needs `pip install -r tests/requirements.txt` for the peer, on a GPU also `accelerate`.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

RESULTS = ROOT / "eval/results/speed.jsonl"
SUITES = ("tiny", "load", "generate", "padding", "memory", "eval", "data")
SIZES = ("tiny", "small", "1b", "7b", "13b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, help=f"one or several of {','.join(SUITES)}, with commas between")
    parser.add_argument("--size", choices=SIZES, default="small", help="of load, generate, memory, eval; 13b of memory")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--repeats", type=int, help="rounds; by default 15 for tiny, 5 for load, 3 for others")
    parser.add_argument("--data", type=Path, default=Path("runs/easy_vqa"), help="tiny's, prepared if it is not there")
    parser.add_argument(
        "--checkpoint-dir", type=Path, default=Path("runs/speed"), help="random weights, written if they are not there"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="of generate")
    parser.add_argument("--questions", type=int, help="of eval: by default 27, on a GPU 540")
    parser.add_argument("--rows-at-once", type=int, default=32, help="of eval: questions in work at a time")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of eval; by default what the device multiplies"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="of generate: tokens an answer has")
    parser.add_argument("--rows", type=int, help="of data: rows of the file that is opened; by default LLaVA's 665,298")
    tiny = ROOT / "data/tiny/tokenizer.model"
    parser.add_argument("--tokenizer", type=Path, default=tiny, help="of data: LLaMA's; else the tiny model's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file the results are appended to")
    arguments = parser.parse_args()
    suites = arguments.suite.split(",")
    if unknown := sorted(set(suites) - set(SUITES)):
        parser.error(f"--suite {','.join(unknown)}: expected one or several of {','.join(SUITES)}")
    if arguments.size == "13b" and suites != ["memory"]:
        parser.error("--size 13b goes with --suite memory alone")
    if (arguments.questions or 1) < 1 or arguments.rows_at_once < 1:
        parser.error("expected at least 1 of --questions and --rows-at-once")
    if (arguments.repeats or 1) < 1 or arguments.new_tokens < 2 or min(arguments.batch_sizes) < 1:
        parser.error("expected at least 1 of --repeats and --batch-sizes, and 2 --new-tokens")
    if (arguments.rows or 8) < 8 or not arguments.tokenizer.is_file():
        parser.error(f"expected at least 8 --rows, one a rank, and a file --tokenizer {arguments.tokenizer}")
    run_suites(suites, arguments)


def run_suites(suites: list[str], arguments: argparse.Namespace) -> None:
    import torch

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
