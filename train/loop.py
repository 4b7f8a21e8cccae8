"""The training loop: one for every stage. What is trained, on what and for how long is the stage's configuration."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.packing import Step, StepDataset, held_out_steps
from train.checkpoint import CheckpointWriter
from train.loss import split_answers
from train.metrics import MetricsFile, memory_bytes
from train.monitor import GpuMonitor, StepProfiler, TensorBoardFile
from train.optim import schedule, set_learning_rates
from train.parallel import Ranks, backward, clip_gradients

MAX_UNLEARNABLE = 0.01  # share of samples without a supervised token above which something is wrong with the data
NUM_SAMPLES = 8


@dataclass
class StopRequest:
    """Set by SIGTERM; the ranks agree at the end of a step."""

    is_set: bool = False


@dataclass(frozen=True)
class Measurement:
    """A model on held-out rows: mean loss per supervised token, and the share of answers right in every token."""

    loss: float
    exact_match: float
    samples: list[tuple[str, str]]  # (true, predicted) answers of the first rows, on the first rank


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks."""

    loss: float  # per supervised token
    grad_norm: float
    is_stopping: bool  # whether any rank was asked to stop
    rank_wait_s: float  # how long the ranks waited, on average, for the slowest


@dataclass
class Tally:
    """What became of the documents, for the lines at a run's end."""

    num_documents: int = 0
    num_cut: int = 0
    num_tokens: int = 0
    num_waited: float = 0.0  # tokens that ranks could have done while they waited for the one with the most
    unlearnable: set[int] = field(default_factory=set)  # rows without a supervised token

    def add(self, step: Step) -> None:
        self.num_documents += step.num_documents
        self.num_cut += step.num_cut
        self.num_tokens += step.num_tokens
        self.num_waited += step.num_tokens * step.waste / (1 - step.waste)
        self.unlearnable |= set(step.rows_without_labels)

    def print(self, title: str) -> None:
        if self.num_waited:
            waste = self.num_waited / (self.num_tokens + self.num_waited)
            print(f"{title}: packing left {waste:.2%} of the ranks' places for tokens empty")
        if self.num_cut:
            print(f"{title}: {self.num_cut} of {self.num_documents} documents exceeded max_tokens and lost their end")
        if self.unlearnable:
            first = sorted(self.unlearnable)[:10]
            print(f"{title}: {len(self.unlearnable)} rows had no supervised token and taught nothing, first {first}")


def train(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Step],
    held_out: StepDataset | None,
    folder: Path,
    ranks: Ranks,
    stop_request: StopRequest,
    checkpoints: CheckpointWriter,
    collect_trained: Callable[[], dict[str, Tensor]],
    *,
    title: str,
    seed: int,
    first_step: int,
    num_steps: int,
    warmup_ratio: float,
    max_grad_norm: float,
    eval_every: int,
    eval_rows: int,
    stop_at: float,
    save_every: int,
    flops_per_token: float,
    peak_flops: float,
    tensorboard: bool,
    is_profiled: bool,
) -> bool:
    """Do steps `first_step` to `num_steps`, or until `stop_at` is reached; tell whether the stage is finished.

    Returns: False when a stop was requested: a checkpoint has been saved, the same command goes on from it.
    Raises: ValueError for a loss that is not finite (before it touches the weights), for data nothing can be learned
        from, or for a gate that was not reached; OSError when a checkpoint cannot be written. On every rank.
    """
    recorder = Recorder(folder, first_step, num_steps, title, tensorboard) if ranks.is_first else None
    profiler = StepProfiler(folder, ranks.rank) if is_profiled else None
    monitor = GpuMonitor(ranks.device)
    tally = Tally()
    gate_reached, is_done = stop_at == 0, False
    objective.train()
    waiting_since = time.perf_counter()
    for number, step in enumerate(loader, start=first_step + 1):
        started = time.perf_counter()
        rates = set_learning_rates(optimizer, schedule(number - 1, num_steps, warmup_ratio))
        seed_step(seed, number, ranks.rank)
        result = do_step(objective, optimizer, step, max_grad_norm, ranks, stop_request)
        tally.add(step)
        check_learnable(tally.unlearnable, tally.num_documents)

        step_s = time.perf_counter() - waiting_since
        row: dict[str, Any] = {
            "step": number,
            "loss": result.loss,
            "learning_rates": rates,
            "grad_norm": result.grad_norm,
        }
        row |= describe_speed(step, step_s, flops_per_token, peak_flops)
        row |= {"data_wait_s": started - waiting_since, "rank_wait_s": result.rank_wait_s}
        row |= describe_machine(ranks, monitor)
        if held_out and ((eval_every and number % eval_every == 0) or number == num_steps):
            measured = measure(objective, held_out, eval_rows, ranks)
            row |= {"held_out_loss": measured.loss, "exact_match": measured.exact_match}
            if ranks.is_first:
                write_samples(folder / "samples.jsonl", number, measured.samples)
            gate_reached |= measured.exact_match >= stop_at
        if recorder:
            recorder.write(row)
        if profiler:
            profiler.step()

        is_done = number == num_steps or (stop_at > 0 and gate_reached)
        if not is_done and (result.is_stopping or (save_every and number % save_every == 0)):
            checkpoints.save(number, objective, optimizer, collect_trained(), row.get("held_out_loss"))
        checkpoints.poll()
        if result.is_stopping or is_done:
            break
        waiting_since = time.perf_counter()
    checkpoints.finish()
    monitor.close()
    if profiler:
        profiler.close()
    if recorder:
        recorder.close()
    if is_done and not gate_reached:
        raise ValueError(
            f"stage {title} did not reach stop_at = {stop_at} in {num_steps} steps: give it more (max_steps, epochs), "
            "another learning_rate or seed"
        )
    if ranks.is_first:
        tally.print(title)
    return is_done


class Recorder:
    """Where a step's row goes: `metrics.jsonl`, TensorBoard if wanted, and the progress bar."""

    def __init__(self, folder: Path, first_step: int, num_steps: int, title: str, tensorboard: bool) -> None:
        self.files: list[MetricsFile | TensorBoardFile] = [MetricsFile(folder / "metrics.jsonl", first_step)]
        if tensorboard:
            self.files.append(TensorBoardFile(folder, first_step))
        self.bar = tqdm(total=num_steps, initial=first_step, desc=title, unit="step", mininterval=0.5)

    def write(self, row: dict[str, Any]) -> None:
        for file in self.files:
            file.write(row)
        shown = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:.0f}"}
        self.bar.set_postfix(shown | ({"exact": f"{row['exact_match']:.1%}"} if "exact_match" in row else {}))
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        for file in self.files:
            file.close()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Let what a step draws at random (dropout) depend on its number, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def do_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    max_grad_norm: float,
    ranks: Ranks,
    stop_request: StopRequest,
) -> StepResult:
    """Do one optimizer step.

    Note: the loss is the sum over all tokens of the step divided by their number, over all ranks and micro-batches.
    Official LLaVA averages each micro-batch and then those averages, so there a token's weight depends on its company.
    """
    if step.num_supervised == 0:
        raise ValueError(f"rows {step.rows_without_labels} make a whole step without a supervised token")
    started = time.perf_counter()
    loss_sum = torch.zeros((), device=ranks.device)
    for index, batch in enumerate(step.micro_batches):
        batch_sum, _ = objective(batch.to(ranks.device))
        is_last = index + 1 == len(step.micro_batches)
        backward(batch_sum / step.num_supervised, objective, ranks, is_last)
        loss_sum += batch_sum.detach()
    own_loss = loss_sum.item()  # waits for the GPU
    shares = ranks.gather([own_loss, float(stop_request.is_set), time.perf_counter() - started])
    loss_sums, stopping, times = zip(*shares, strict=True)
    loss = sum(loss_sums) / step.num_supervised
    grad_norm = clip_gradients([p for p in objective.parameters() if p.requires_grad], max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        rows = sorted(row for batch in step.micro_batches for row in batch.rows)
        raise ValueError(
            f"the loss is {loss} and the gradients' norm {grad_norm}, stopped before they reach the weights; "
            f"this rank's rows were {rows}: look for broken samples, or lower learning_rate"
        )
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss, grad_norm, any(stopping), max(times) - sum(times) / len(times))


def describe_speed(step: Step, step_s: float, flops_per_token: float, peak_flops: float) -> dict[str, Any]:
    """Return what `metrics.jsonl` says of a step's size and speed; tokens are real ones, over all ranks.

    MFU = tokens per second x floating-point operations that a token needs / what the cards could do. Operations that
    checkpointed layers do a second time are not needed ones.
    """
    tokens_per_s = step.num_tokens / step_s
    return {
        "tokens_per_s": tokens_per_s,
        "tokens": step.num_tokens,
        "supervised_tokens": step.num_supervised,
        "micro_batches": len(step.micro_batches),
        "packing_waste": step.waste,
        "step_s": step_s,
        "mfu": tokens_per_s * flops_per_token / peak_flops if peak_flops else None,
    }


def describe_machine(ranks: Ranks, monitor: GpuMonitor) -> dict[str, Any]:
    """Return every rank's memory and, where there are GPUs, how busy they were since the last step: lists by rank."""
    own = {**memory_bytes(ranks.device), **monitor.read()}
    table = ranks.gather([math.nan if value is None else float(value) for value in own.values()])
    columns = ([None if math.isnan(value) else value for value in column] for column in zip(*table, strict=True))
    return dict(zip(own, columns, strict=True))


@torch.no_grad()
def measure(objective: nn.Module, held_out: StepDataset, num_rows: int, ranks: Ranks) -> Measurement:
    """Measure on the first `num_rows` held-out rows (0 for all); the same on every rank."""
    objective.eval()
    decode = held_out.dataset.tokenizer.decode
    loss_sum = num_right = num_answers = num_supervised = 0.0
    samples: list[tuple[str, str]] = []
    for step in held_out_steps(held_out, num_rows or len(held_out.dataset)):
        num_supervised += step.num_supervised
        for batch in step.micro_batches:
            batch_sum, predicted = objective(batch.to(ranks.device))
            answers = split_answers(batch.labels, predicted.cpu())
            loss_sum += batch_sum.item()
            num_answers += len(answers)
            num_right += sum(true == guess for true, guess in answers)
            samples += [(decode(true), decode(guess)) for true, guess in answers[: NUM_SAMPLES - len(samples)]]
    objective.train()
    loss_sum, num_right, num_answers = ranks.sum([loss_sum, num_right, num_answers])
    return Measurement(loss_sum / num_supervised, num_right / num_answers, samples)


def check_learnable(unlearnable: set[int], num_documents: int) -> None:
    """Stop a run whose samples are masked away: it would look busy and learn little.

    Raises: ValueError when more than 1 % of the documents seen have no supervised token.
    """
    if len(unlearnable) > MAX_UNLEARNABLE * max(num_documents, 100):
        raise ValueError(
            f"{len(unlearnable)} of the first {num_documents} documents have no supervised token "
            f"(rows {sorted(unlearnable)[:10]}), the limit is {MAX_UNLEARNABLE:.0%}: max_tokens may cut their answers "
            "off, or the answers are empty"
        )


def write_samples(file: Path, step: int, samples: Sequence[tuple[str, str]]) -> None:
    """Append what the model would answer (after the true tokens before) to `samples.jsonl`."""
    with file.open("a", encoding="utf-8") as out:
        for true, predicted in samples:
            out.write(json.dumps({"step": step, "true": true, "predicted": predicted}, ensure_ascii=False) + "\n")
