"""Train: `torchrun --nproc_per_node=2 train/main.py [stage.toml ...] [key=value ...]`.

Without files it is the embedded default, LLaVA's whole way in miniature: a tiny ViT and a tiny LLaMA learn alone,
the projector aligns them, visual question answering is tuned on easy-VQA, and the test set is answered.
"""

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from data.conversation import IGNORE_INDEX  # noqa: E402
from data.dataset import ConversationDataset, RenderOptions  # noqa: E402
from data.packing import StepDataset  # noqa: E402
from data.prepare import easy_vqa  # noqa: E402
from data.tokenizer import Tokenizer, find_tokenizer  # noqa: E402
from model.config import CONFIGS  # noqa: E402
from model.llava import Llava, initialize_weights  # noqa: E402
from model.weights import build_llava, open_checkpoint, save_llava  # noqa: E402
from train.checkpoint import list_checkpoints, load_checkpoint  # noqa: E402
from train.config import TrainConfig, format_config, load_configs  # noqa: E402
from train.loop import StopRequest, train  # noqa: E402
from train.loss import CaptionMatching, NextToken  # noqa: E402
from train.metrics import plot_loss  # noqa: E402
from train.optim import make_optimizer  # noqa: E402
from train.parallel import Ranks, gather, leave_ranks, shard, start_ranks  # noqa: E402

RUNS = Path("runs")
TINY_DATA = RUNS / "easy_vqa"
TINY_STAGES = [ROOT / "train/configs" / f"tiny_{stage}.toml" for stage in ("vision", "language", "projector", "full")]


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.exit(__doc__)
    files = [Path(argument) for argument in arguments if argument.endswith(".toml") and "=" not in argument]
    overrides = [argument for argument in arguments if Path(argument) not in files]
    try:
        configs = load_configs(files or TINY_STAGES, overrides)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    ranks = start_ranks()
    stop_request = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: setattr(stop_request, "is_set", True))
    try:
        if not files and ranks.is_first:
            easy_vqa.prepare(TINY_DATA)
        ranks.wait()
        is_finished = run_stages(configs, ranks, stop_request)
        ranks.wait()
    except Exception as error:
        fail(error, ranks)
    exit_code = 0
    if is_finished and not files and ranks.is_first:
        exit_code = answer_test_questions(*(RUNS / config.name / "final" for config in configs[-2:]))
    leave_ranks(exit_code)


def fail(error: Exception, ranks: Ranks) -> NoReturn:
    """End this rank; the first to fail says why. What the others then meet is only its absence."""
    if ranks.is_first_to_fail():
        if isinstance(error, (ValueError, OSError)):
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
    leave_ranks(1)


def run_stages(configs: Sequence[TrainConfig], ranks: Ranks, stop_request: StopRequest) -> bool:
    """Run stage after stage; tell whether all are finished.

    A line whose last stage is finished starts anew, except for stages that are kept; otherwise finished stages are
    taken as they are and the unfinished one goes on from its last checkpoint.
    """
    is_line_finished = (RUNS / configs[-1].name / "final").exists()
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
            if not run_stage(config, folder, previous, ranks, stop_request):
                return False
        previous = folder / "final"
    return True


def choose_action(folder: Path, config: TrainConfig, may_reuse: bool, may_keep: bool) -> str:
    """Return what to do with a stage's folder: "keep" its result, "resume" its checkpoint, or start "anew"."""
    saved = folder / "config.toml"
    is_same = saved.is_file() and saved.read_text(encoding="utf-8") == format_config(config)
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
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
    (folder / "config.toml").write_text(format_config(config), encoding="utf-8")


def run_stage(
    config: TrainConfig, folder: Path, previous: Path | None, ranks: Ranks, stop_request: StopRequest
) -> bool:
    """Train one stage and write `final/`; tell whether it is finished."""
    dtype = getattr(torch, config.dtype)
    llava, tokenizer = load_start(config, previous)
    steps, held_out = open_data(config, llava, tokenizer, ranks)
    freeze(llava, config)
    for parameter in llava.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    objective = make_objective(config, llava, steps.dataset).to(ranks.device)
    shard(objective, objective.blocks(), config.shard_size, dtype, ranks)
    optimizer = make_optimizer(
        objective,
        {
            "projector": config.projector_learning_rate or config.learning_rate,
            "vision_tower": config.vision_learning_rate or config.learning_rate,
            "": config.learning_rate,
        },
        config.weight_decay,
        config.beta2,
    )
    checkpoints = list_checkpoints(folder / "checkpoints")
    first_step = load_checkpoint(checkpoints[-1], objective, optimizer) if checkpoints else 0
    num_steps = math.ceil(config.epochs * len(steps.dataset) / config.batch_size)
    num_steps = min(num_steps, config.max_steps or num_steps)
    if ranks.is_first and first_step:
        print(f"{config.name}: going on from step {first_step}")
    is_finished = train(
        objective,
        optimizer,
        DataLoader(steps, batch_size=None, sampler=range(first_step, num_steps), num_workers=config.num_workers),
        held_out,
        folder,
        ranks,
        stop_request,
        title=config.name,
        first_step=first_step,
        num_steps=num_steps,
        warmup_ratio=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        eval_every=config.eval_every,
        eval_rows=config.eval_rows,
        stop_at=config.stop_at,
        save_every=config.save_every,
        keep_checkpoints=config.keep_checkpoints,
        flops_per_token=count_flops_per_token(llava),
        peak_flops=config.peak_tflops * 1e12 * ranks.size,
    )
    if is_finished:
        tensors = {name: gather(tensor) for name, tensor in llava.state_dict().items()}
        if ranks.is_first:
            # It is talked to in the words it was tuned on; stage 1's template has none for that.
            chat_template = llava.config.chat_template if config.template == "plain" else config.template
            saved = replace(llava.config, chat_template=chat_template)
            save_llava(folder / "final", saved, tensors, tokenizer.file)
    if ranks.is_first:
        plot_loss(folder / "metrics.jsonl", folder / "loss.png", config.name)
        print(f"{config.name}: {'finished' if is_finished else 'stopped, the same command goes on from here'}")
    ranks.wait()
    return is_finished


def load_start(config: TrainConfig, previous: Path | None) -> tuple[Llava, Tokenizer]:
    """Return what a stage starts from: random weights, a model folder, or what the stage before left."""
    if config.model in CONFIGS:
        tokenizer = Tokenizer(Path(config.tokenizer) if config.tokenizer else ROOT / "data/tiny/tokenizer.model")
        llava = Llava(CONFIGS[config.model])
        initialize_weights(llava, llava.config.text.hidden_size**-0.5, config.seed)
    else:
        folder = config.model or previous
        if folder is None:
            raise ValueError(f"{config.name}: the first stage needs model = a folder or one of {', '.join(CONFIGS)}")
        checkpoint = open_checkpoint(folder)
        llava = build_llava(checkpoint, torch.float32)
        tokenizer = Tokenizer(find_tokenizer(*checkpoint.folders))
    if tokenizer.vocab_size > llava.config.text.vocab_size:
        raise ValueError(
            f"{tokenizer.file} has {tokenizer.vocab_size} pieces, the model {llava.config.text.vocab_size}: "
            "they do not belong together"
        )
    return llava, tokenizer


def open_data(
    config: TrainConfig, llava: Llava, tokenizer: Tokenizer, ranks: Ranks
) -> tuple[StepDataset, StepDataset | None]:
    """Open the training and the held-out file."""
    vision = llava.config.vision
    if config.max_tokens > llava.config.text.max_position_embeddings:
        limit = llava.config.text.max_position_embeddings
        raise ValueError(f"max_tokens = {config.max_tokens} exceeds the model's {limit} positions")
    if config.max_tokens <= vision.num_patches and config.train != "language":
        raise ValueError(
            f"max_tokens = {config.max_tokens} leaves no text beside a picture's {vision.num_patches} tokens"
        )
    if config.held_out and 0 < config.eval_rows < ranks.size:
        raise ValueError(f"eval_rows = {config.eval_rows} rows cannot be shared by {ranks.size} ranks: raise it")
    options = RenderOptions(
        tokens_per_image=vision.num_patches,
        image_size=vision.image_size,
        template=config.template,
        aspect=config.aspect,
        branched=config.branched,
        max_tokens=config.max_tokens,
        augment_pixels=config.augment_pixels,
    )
    opened = []
    for file in (config.data, config.held_out):
        if file:
            folder = Path(config.image_folder) if config.image_folder else Path(file).parent
            dataset = ConversationDataset(Path(file), folder, tokenizer, options)
            if config.train == "language" and any(dataset.images):
                raise ValueError(f"{file} has pictures, train = 'language' takes text only")
            opened.append(
                StepDataset(dataset, config.batch_size, config.micro_batch_tokens, config.seed, ranks.rank, ranks.size)
            )
    return opened[0], opened[1] if config.held_out else None


def make_objective(config: TrainConfig, llava: Llava, dataset: ConversationDataset) -> CaptionMatching | NextToken:
    """Return what the stage minimises, its own parts (CLIP's text side) at seeded random values."""
    if config.train != "vision":
        return NextToken(llava, reads_images=config.train != "language")
    objective = CaptionMatching(llava.vision_tower, list_captions(dataset), dataset.tokenizer.vocab_size)
    for part in (objective.visual_projection, objective.word_embedding):
        initialize_weights(part, llava.config.vision.hidden_size**-0.5, config.seed)
    return objective


def list_captions(dataset: ConversationDataset) -> list[tuple[int, ...]]:
    """Return the distinct answers of a file as token ids, in an order that depends on nothing else."""
    labels = (dataset.render(row).labels for row in range(len(dataset)))
    return sorted({tuple(label for label in row if label != IGNORE_INDEX) for row in labels})


def freeze(llava: Llava, config: TrainConfig) -> None:
    """Leave trainable what the stage trains, and of that only what its loss reaches."""
    llava.requires_grad_(False)
    if config.train in ("language", "full"):
        llava.language_model.requires_grad_(True)
    if config.train in ("projector", "full"):
        llava.projector.requires_grad_(True)
    if config.train == "vision" or config.vision_learning_rate:
        tower = llava.vision_tower.requires_grad_(True)
        tower.layers[tower.num_used_layers :].requires_grad_(False)
        tower.post_layernorm.requires_grad_(False)


def count_flops_per_token(llava: Llava) -> float:
    """Return the floating-point operations of one token in the language model's matrices, forward and backward.

    2 per weight forward, 2 for the gradient that passes through, 2 more where the weight itself is trained;
    attention and the vision tower, a few percent at LLaVA's lengths, are left out.
    """
    matrices = [p for p in llava.language_model.layers.parameters() if p.ndim > 1]
    return sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in matrices)


def answer_test_questions(before: Path, after: Path) -> int:
    """Answer easy-VQA's test questions with both models by the command a reader would type; return its exit code."""
    command = [sys.executable, str(ROOT / "eval/main.py"), "--task", "easy_vqa", "--data", str(TINY_DATA)]
    command += ["--model-path", str(before), str(after)]
    ranks_of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")  # this is one process with all cores
    environment = {name: value for name, value in os.environ.items() if name not in ranks_of_torchrun}
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    main()
