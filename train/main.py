"""Train: `torchrun --nproc_per_node=2 train/main.py [stage.toml ...] [key=value ...] [--profile]`.

Without files it is the embedded default, LLaVA's whole way in miniature: a tiny ViT and a tiny LLaMA learn alone,
the projector aligns them, visual question answering is tuned on easy-VQA, and the test set is answered.
`--profile` also writes a torch profiler trace of three steps. What a configuration costs: `train/plan.py`.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from data.prepare import easy_vqa, tiny_zh  # noqa: E402
from train.checkpoint import list_checkpoints  # noqa: E402
from train.config import TrainConfig, format_config, is_same_result, load_configs  # noqa: E402
from train.loop import StopRequest  # noqa: E402
from train.parallel import Ranks, is_loss_of_a_rank, leave_ranks, start_ranks  # noqa: E402
from train.stage import run_stage  # noqa: E402

RUNS = Path("runs")
TINY_STAGES = [ROOT / "train/configs" / f"tiny_{stage}.toml" for stage in ("vision", "language", "projector", "full")]


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.exit(__doc__)
    is_profiled = "--profile" in arguments
    arguments = [argument for argument in arguments if argument != "--profile"]
    files = [Path(argument) for argument in arguments if argument.endswith(".toml") and "=" not in argument]
    overrides = [argument for argument in arguments if Path(argument) not in files]
    try:
        configs = load_configs(files or TINY_STAGES, overrides)
        ranks = start_ranks()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    stop_request = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: setattr(stop_request, "is_set", True))
    try:
        if not files and ranks.is_first:
            easy_vqa.prepare(RUNS / "easy_vqa")
            tiny_zh.prepare(RUNS / "easy_vqa", RUNS / "tiny_zh")
        ranks.wait()
        is_finished = run_stages(configs, ranks, stop_request, is_profiled)
        ranks.wait()
    except Exception as error:
        fail(error, ranks)
    exit_code = 0
    if is_finished and ranks.is_first:
        exit_code = answer_test_questions(configs)
    leave_ranks(exit_code)


def fail(error: Exception, ranks: Ranks) -> NoReturn:
    """End this rank; the first to fail says why. What the others then meet is only its absence."""
    if ranks.is_first_to_fail():
        if isinstance(error, (ValueError, OSError)):
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        elif is_loss_of_a_rank(error):
            print("\nerror: another rank died without a word: was it killed, or out of memory?", file=sys.stderr)
        else:
            traceback.print_exc()
    leave_ranks(1)


def run_stages(configs: Sequence[TrainConfig], ranks: Ranks, stop_request: StopRequest, is_profiled: bool) -> bool:
    """Run stage after stage; tell whether all are finished.

    A line whose last stage is finished starts anew, except for stages that are kept; otherwise finished stages are
    taken as they are and the unfinished one goes on from its last checkpoint. So it does when torchrun, by
    `--max-restarts`, has started the ranks again.
    """
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    is_line_finished = (RUNS / configs[-1].name / "final").exists() and not is_restart
    ranks.wait()
    previous: Path | None = None
    may_reuse = True
    locks: list[IO[str]] = []  # a lock is held as long as its file is open
    for config in configs:
        folder = RUNS / config.name
        action = choose_action(folder, config, may_reuse, config.keep or not is_line_finished)
        ranks.wait()
        if action == "keep":
            if ranks.is_first:
                print(f"{config.name}: kept from an earlier run with the same settings ({folder / 'final'})")
        else:
            may_reuse = False
            if ranks.is_first:
                locks.append(lock_run(config.name))
            if action == "anew" and ranks.is_first:
                start_folder(folder, config)
            ranks.wait()
            if not run_stage(config, folder, previous, ranks, stop_request, is_profiled):
                return False
        previous = folder / "final"
    return True


def choose_action(folder: Path, config: TrainConfig, may_reuse: bool, may_keep: bool) -> str:
    """Return what to do with a stage's folder: "keep" its result, "resume" its checkpoint, or start "anew"."""
    saved = folder / "config.toml"
    is_same = saved.is_file() and is_same_result(saved, config)
    if (folder / "final").exists():
        return "keep" if is_same and may_reuse and may_keep else "anew"
    if not list_checkpoints(folder / "checkpoints"):
        return "anew"
    if not is_same:
        raise ValueError(
            f"{folder} holds an unfinished run with other settings (config.toml there): use another name=..., "
            "or remove the folder"
        )
    return "resume" if may_reuse else "anew"


def lock_run(name: str) -> IO[str]:
    """Keep other runs out of `runs/<name>` until this process ends, however it ends.

    Raises: ValueError when another process is in it, such as ranks that outlived a killed torchrun.
    """
    RUNS.mkdir(exist_ok=True)
    lock = (RUNS / f".{name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is training runs/{name}: wait for it, stop it, or use name=...") from error
    return lock


def start_folder(folder: Path, config: TrainConfig) -> None:
    """Make an empty run folder; what an earlier run left is moved aside, never deleted."""
    if (folder / "final").exists() or list_checkpoints(folder / "checkpoints"):
        aside = folder.with_name(folder.name + time.strftime("-until-%Y%m%d-%H%M%S"))
        folder.rename(aside)
        print(f"{config.name}: the earlier run is now {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl", "sessions.jsonl"):
        (folder / name).unlink(missing_ok=True)
    (folder / "config.toml").write_text(format_config(config), encoding="utf-8")


def answer_test_questions(configs: Sequence[TrainConfig]) -> int:
    """Have stages that are scored, and what they started from, answer test questions; return the exit code.

    It is done by the command that a reader would type.
    """
    scored = [place for place, config in enumerate(configs) if config.score]
    if not scored:
        return 0
    starts = [config.model or str(RUNS / configs[place - 1].name / "final") for place, config in enumerate(configs)]
    folders = dict.fromkeys(path for path in (starts[place] for place in scored) if Path(path).is_dir())
    command = [sys.executable, str(ROOT / "eval/main.py"), "--data", str(RUNS)]
    command += ["--task", *dict.fromkeys(task for place in scored for task in configs[place].score.split(","))]
    command += ["--model-path", *folders, *(str(RUNS / configs[place].name / "final") for place in scored)]
    if adapted := [starts[place] for place in scored if configs[place].train == "lora"]:
        command += ["--model-base", adapted[0]]
    ranks_of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")  # this is one process with all cores
    environment = {name: value for name, value in os.environ.items() if name not in ranks_of_torchrun}
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    main()
