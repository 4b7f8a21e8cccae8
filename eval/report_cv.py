"""A few lines for a CV, in English and Chinese, whose numbers are those of the report and no others.

A part in [brackets] whose number is not known is left out, and so is a line that says nothing without it.
"""

from collections.abc import Mapping, Sequence

from data.run_words import show_count
from eval.page import escape
from eval.report_facts import count_answers, describe_change, describe_training
from eval.report_runs import AnsweredRun
from eval.report_text import WORDS, fill

ENGLISH = {
    "title": "LLaVA-1.5 in plain PyTorch",
    "code": "Rewrote LLaVA-1.5 (vision tower, projector, language model, training, generation, evaluation) in plain "
    "PyTorch.",
    "lora": "LoRA-tuned a vision-language model[ of {num_parameters} parameters][, {num_trained} parameters trained]"
    "[, with {parallel}][ on {num_gpus} x {gpu}][, at a global batch of {batch_size}][, for {steps} steps]"
    "[: {tokens_per_s} tokens/s][, MFU {mfu}].",
    "other": "Trained {train}[ of a model of {num_parameters} parameters][, {num_trained} parameters trained]"
    "[, with {parallel}][ on {num_gpus} x {gpu}][, at a global batch of {batch_size}][, for {steps} steps]"
    "[: {tokens_per_s} tokens/s][, MFU {mfu}].",
    "results": "Results: {changes}.",
    "change": "{task}: {metric} {before} -> {after}[ on {n} questions][ (95 % interval {interval})]",
    "score": "{task}: {metric} {after}[ on {n} questions][ (95 % interval {interval})]",
    "and": "; ",
    "answers": "Scored {num_answers} answers ({tasks}), with 95 % bootstrap intervals over pictures.",
}
CHINESE = {
    "title": "纯 PyTorch 实现的 LLaVA-1.5",
    "code": "用纯 PyTorch 重写 LLaVA-1.5（视觉编码器、投影层、语言模型、训练、生成与评测）。",
    "lora": "用 LoRA 微调视觉语言模型[，模型共 {num_parameters} 个参数][，训练参数 {num_trained} 个][，采用 {parallel}]"
    "[，使用 {num_gpus} 张 {gpu}][，全局批大小 {batch_size}][，训练 {steps} 步][，吞吐量 {tokens_per_s} token/s]"
    "[，MFU {mfu}]。",
    "other": "训练{train}[，模型共 {num_parameters} 个参数][，训练参数 {num_trained} 个][，采用 {parallel}]"
    "[，使用 {num_gpus} 张 {gpu}][，全局批大小 {batch_size}][，训练 {steps} 步][，吞吐量 {tokens_per_s} token/s]"
    "[，MFU {mfu}]。",
    "results": "结果：{changes}。",
    "change": "{task}：{metric} {before} → {after}[，共 {n} 题][（95 % 置信区间 {interval}）]",
    "score": "{task}：{metric} {after}[，共 {n} 题][（95 % 置信区间 {interval}）]",
    "and": "；",
    "answers": "共评测 {num_answers} 个回答（{tasks}），95 % 置信区间按图片自助抽样（bootstrap）得到。",
}
TEMPLATES: dict[str, Mapping[str, str]] = {"en": ENGLISH, "zh": CHINESE}
MAX_TASKS = 4


def write_cv(runs: Sequence[AnsweredRun]) -> str:
    """Return the entry in both languages, as Markdown."""
    return "\n\n".join(write_entry(runs, language) for language in TEMPLATES) + "\n"


def write_entry(runs: Sequence[AnsweredRun], language: str) -> str:
    """Return one language's entry: what was built, what was trained, what came of it, how it was measured."""
    templates, words = TEMPLATES[language], WORDS[language]
    last = runs[-1]
    facts = describe_training(last, words)
    facts["num_gpus"] = facts["world_size"] if facts["gpu"] else None
    changes = [
        fill(templates["change"], change) or fill(templates["score"], change)
        for name in last.results
        if (change := describe_change(name, runs, words)) is not None
    ]
    num_answers = count_answers(runs)
    measured = {
        "changes": templates["and"].join(filter(None, changes[:MAX_TASKS])) or None,
        "num_answers": show_count(num_answers) if num_answers else None,
        "tasks": ", ".join(escape(name) for name in dict.fromkeys(name for run in runs for name in run.results)),
    }
    trained = fill(templates["lora" if last.config.get("train") == "lora" else "other"], facts) if last.config else None
    lines = [templates["code"], trained, fill(templates["results"], measured), fill(templates["answers"], measured)]
    return "\n".join([f"**{templates['title']}**\n", *(f"- {line}" for line in lines if line)])
