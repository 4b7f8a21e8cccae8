"""The training loop: one for every stage. What is trained, on what and for how long is the stage's configuration."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data.packing import Step, StepDataset, held_out_steps
from train.checkpoint import save_checkpoint
from train.loss import split_answers
from train.metrics import MetricsFile, gpu_utilization, peak_memory_bytes
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


def train(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Step],
    held_out: StepDataset | None,
    folder: Path,
    ranks: Ranks,
    stop_request: StopRequest,
    *,
    title: str,
    first_step: int,
    num_steps: int,
    warmup_ratio: float,
    max_grad_norm: float,
    eval_every: int,
    eval_rows: int,
    stop_at: float,
    save_every: int,
    keep_checkpoints: int,
    flops_per_token: float,
    peak_flops: float,
) -> bool:
    """Do steps `first_step` to `num_steps`, or until `stop_at` is reached; tell whether the stage is finished.

    Returns: False when a stop was requested: a checkpoint has been saved, the same command goes on from it.
    Raises: ValueError for a loss that is not finite (before it touches the weights), for data nothing can be learned
        from, or for a gate that was not reached; OSError when a checkpoint cannot be written. On every rank.
    """
    metrics = MetricsFile(folder / "metrics.jsonl", first_step) if ranks.is_first else None
    bar = tqdm(
        total=num_steps, initial=first_step, desc=title, unit="step", disable=not ranks.is_first, mininterval=0.5
    )
    num_documents = 0
    unlearnable: set[int] = set()
    gate_reached, is_done = stop_at == 0, False
    objective.train()
    waiting_since = time.perf_counter()
    for number, step in enumerate(loader, start=first_step + 1):
        started = time.perf_counter()
        rates = set_learning_rates(optimizer, schedule(number - 1, num_steps, warmup_ratio))
        loss, grad_norm, stop = do_step(objective, optimizer, step, max_grad_norm, ranks, stop_request)
        num_documents += step.num_documents
        unlearnable |= set(step.rows_without_labels)
        check_learnable(unlearnable, num_documents)

        step_s = time.perf_counter() - waiting_since
        row = {"step": number, "loss": loss, "learning_rates": rates, "grad_norm": grad_norm}
        row |= describe_speed(step, step_s, started - waiting_since, flops_per_token, peak_flops, ranks.device)
        if held_out and ((eval_every and number % eval_every == 0) or number == num_steps):
            measured = measure(objective, held_out, eval_rows, ranks)
            row |= {"held_out_loss": measured.loss, "exact_match": measured.exact_match}
            if ranks.is_first:
                write_samples(folder / "samples.jsonl", number, measured.samples)
            gate_reached |= measured.exact_match >= stop_at
        if metrics:
            metrics.write(row)
        shown = {"loss": f"{loss:.3f}", "tok/s": f"{row['tokens_per_s']:.0f}"}
        bar.set_postfix(shown | ({"exact": f"{measured.exact_match:.1%}"} if "exact_match" in row else {}))
        bar.update()

        is_done = number == num_steps or (stop_at > 0 and gate_reached)
        if (save_every and number % save_every == 0 and not is_done) or (stop and not is_done):
            save_checkpoint(folder / "checkpoints", number, objective, optimizer, keep_checkpoints, ranks)
        if stop or is_done:
            break
        waiting_since = time.perf_counter()
    bar.close()
    if metrics:
        metrics.close()
    if is_done and not gate_reached:
        raise ValueError(
            f"stage {title} did not reach stop_at = {stop_at} in {num_steps} steps: give it more (max_steps, epochs), "
            "another learning_rate or seed"
        )
    if ranks.is_first and unlearnable:
        rows = sorted(unlearnable)
        print(f"{title}: {len(rows)} rows had no supervised token and taught nothing, the first {rows[:10]}")
    return is_done


def do_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    max_grad_norm: float,
    ranks: Ranks,
    stop_request: StopRequest,
) -> tuple[float, float, bool]:
    """Do one optimizer step; return its loss, the gradients' norm, and whether any rank was asked to stop.

    Note: the loss is the sum over all tokens of the step divided by their number, over all ranks and micro-batches.
    Official LLaVA averages each micro-batch and then those averages, so there a token's weight depends on its company.
    """
    if step.num_supervised == 0:
        raise ValueError(f"rows {step.rows_without_labels} make a whole step without a supervised token")
    loss_sum = torch.zeros((), device=ranks.device)
    for index, batch in enumerate(step.micro_batches):
        batch_sum, _ = objective(batch.to(ranks.device))
        is_last = index + 1 == len(step.micro_batches)
        backward(batch_sum / step.num_supervised, objective, ranks, is_last)
        loss_sum += batch_sum.detach()
    total, num_stopping = ranks.sum([loss_sum.item(), float(stop_request.is_set)])
    loss = total / step.num_supervised
    grad_norm = clip_gradients([p for p in objective.parameters() if p.requires_grad], max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        rows = sorted(row for batch in step.micro_batches for row in batch.rows)
        raise ValueError(
            f"the loss is {loss} and the gradients' norm {grad_norm}, stopped before they reach the weights; "
            f"this rank's rows were {rows}: look for broken samples, or lower learning_rate"
        )
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm, num_stopping > 0


def describe_speed(
    step: Step, step_s: float, data_wait_s: float, flops_per_token: float, peak_flops: float, device: torch.device
) -> dict[str, Any]:
    """Return what `metrics.jsonl` says of a step's size, speed and memory; tokens are real ones, over all ranks."""
    tokens_per_s = step.num_tokens / step_s
    return {
        "tokens_per_s": tokens_per_s,
        "tokens": step.num_tokens,
        "supervised_tokens": step.num_supervised,
        "micro_batches": len(step.micro_batches),
        "step_s": step_s,
        "data_wait_s": data_wait_s,
        "mfu": tokens_per_s * flops_per_token / peak_flops if peak_flops else None,
        "peak_memory_bytes": peak_memory_bytes(device),
        "gpu_utilization": gpu_utilization(device),
    }


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
