"""What a run was and how it scored, as words and numbers ready to be shown; what is unknown is None."""

from collections.abc import Mapping, Sequence
from typing import Any

from data.names import translate
from data.run_words import show_bytes, show_count, show_interval, show_percent, show_score, show_size, show_time
from data.runs import LAST_STEPS, Run, highest, latest, median, select, total
from eval.answers import Result
from eval.page import escape
from eval.report_runs import AnsweredRun, find_base
from eval.report_text import fill

Words = Mapping[str, str]
Facts = dict[str, str | None]

# Rows of the table of trainings, in this order.
TRAINING = (
    "started from", "train", "num_trained", "num_parameters", "data", "rows", "held_out_data", "steps", "epochs",
    "batch_size", "learning_rate", "precision", "parallel", "world_size", "tokens", "supervised_tokens", "time",
    "tokens_per_s", "mfu", "peak_memory", "loss", "held_out_loss", "exact_match",
)  # fmt: skip
PARTS = ("vision", "language", "projector", "lora", "full")  # what a stage may train


def describe_training(run: Run, words: Words) -> Facts:
    """Return what is known of how a run was trained."""
    config, rows = run.config, run.rows
    is_shared = run.num_ranks is not None and run.num_ranks > 1
    return {
        "name": escape(run.name),
        "started from": _escape(find_base(run)),
        "train": _describe_parts(config, words),
        "num_trained": show_size(run.find("trained_parameters")),
        "num_parameters": show_size(run.find("parameters")),
        "data": _escape(config.get("data")),
        "rows": show_count(run.find("rows")),
        "held_out_data": _escape(config.get("held_out")),
        "steps": show_count(latest(rows, "step")),
        "epochs": f"{config['epochs']:g}" if "epochs" in config else None,
        "batch_size": show_count(config.get("batch_size")),
        "learning_rate": _describe_rates(config, words),
        "precision": fill(
            words["precision of"],
            {"dtype": _escape(config.get("dtype")), "bits": None if config.get("bits") == 16 else config.get("bits")},
        ),
        "parallel": _escape(str(config.get("parallel", "")).upper()) if is_shared else None,
        "world_size": show_count(run.num_ranks),
        "tokens": show_count(total(rows, "tokens")),
        "supervised_tokens": show_count(total(rows, "supervised_tokens")),
        "time": show_time(total(rows, "step_s"), words),
        "tokens_per_s": show_count(median(rows, "tokens_per_s")),
        "mfu": show_percent(median(rows, "mfu")),
        "peak_memory": show_bytes(highest(rows, "peak_memory_bytes")),
        "loss": f"{select(rows, 'loss')[1][0, -LAST_STEPS:].mean():.4f}" if rows else None,
        "held_out_loss": None if latest(rows, "held_out_loss") is None else f"{latest(rows, 'held_out_loss'):.4f}",
        "exact_match": show_percent(latest(rows, "exact_match")),
        "lora_rank": show_count(config.get("lora_rank")) if config.get("train") == "lora" else None,
        "gpu": _name_gpu(run),
    }


def describe_change(name: str, runs: Sequence[AnsweredRun], words: Words) -> Facts | None:
    """Return how the last run scored in a task and how the first did; None where the last one did not answer it.

    The first one's score is left out where it was asked other questions, or the same ones in another way.
    """
    result = runs[-1].results.get(name)
    before = runs[0].results.get(name) if len(runs) > 1 else None
    if result is None or result.scores.get("score") is None:
        return None
    scores, best = result.scores, result.scores.get("best", 1.0)
    is_same = before is not None and all(
        before.settings.get(key) == result.settings.get(key)
        for key in ("task", "rule", "data_hash", "limit", "seed", "num_questions")
    )
    return {
        "task": escape(name),
        "metric": name_metric(result, words),
        "name": escape(runs[-1].name),
        "base": escape(runs[0].name),
        "n": show_count(scores["n"]),
        "after": show_score(scores["score"], best),
        "interval": show_interval(scores.get("interval"), best, words),
        "before": show_score(before.scores.get("score"), best) if before is not None and is_same else None,
    }


def name_metric(result: Result, words: Words) -> str:
    """Return what a headline is called."""
    metric = str(result.scores.get("metric", result.benchmark.metric))
    return escape(translate(metric, words["page language"]))


def count_answers(runs: Sequence[AnsweredRun]) -> int:
    return sum(len(result.predictions) for run in runs for result in run.results.values())


def _escape(value: Any) -> str | None:
    return escape(str(value)) if value not in (None, "") else None


def _describe_parts(config: Mapping[str, Any], words: Words) -> str | None:
    train = config.get("train")
    if train not in PARTS:
        return None
    has_vocabulary = train == "lora" and config.get("lora_vocabulary")
    text = words["lora vocabulary" if has_vocabulary else train].format(lora_rank=config.get("lora_rank"))
    if train == "full" and config.get("vision_learning_rate"):
        text = words["with vision"].format(train=text)
    return text


def _describe_rates(config: Mapping[str, Any], words: Words) -> str | None:
    names = ("learning_rate", "projector_learning_rate", "vision_learning_rate")  # 0 is none of its own
    return fill(words["rates of"], {name: f"{config[name]:g}" if config.get(name) else None for name in names})


def _name_gpu(run: Run) -> str | None:
    device = run.find("device")
    return escape(str(device)) if device and " CPU" not in str(device) else None
