"""The report's words in English and Chinese, and how its sentences are filled in."""

import re
from collections.abc import Mapping, Sequence

from data.run_words import RUN_WORDS

LANGUAGES = ("en", "zh")

# Sentences are templates: a part in [brackets] is left out where a {number} of it is not known, a sentence without
# brackets around what is not known is left out whole.
ENGLISH = {
    "page language": "en",
    "title": "{names}: training and evaluation",
    "comma": ", ",
    "and": " and ",
    "space": " ",
    "summary trained": "**{name}**: {train} trained on {data}[, {num_trained} numbers trained]"
    "[ in a model of {num_parameters}][, {steps} steps of {batch_size} conversations][, {time} of training]"
    "[, {tokens_per_s} tokens/s (median)].",
    "summary change": "On **{task}** ({n} questions) its {metric} is **{after}**[ (95 % interval {interval})], that of "
    "{base} is {before}.",
    "summary score": "On **{task}** ({n} questions) the {metric} of {name} is **{after}**"
    "[ (95 % interval {interval})].",
    "training": "What was trained on what",
    "curves": "Curves",
    "evaluation": "Evaluation",
    "compared": "Base beside tuned",
    "examples": "Answers that changed",
    "environment": "Environment",
    "reproduce": "How to reproduce",
    "configuration": "Configuration",
    "cv": "For a CV",
    # The table of trainings
    "run": "run",
    "data": "training data",
    "rows": "conversations in it",
    "held_out_data": "held-out data",
    "started from": "started from",
    "train": "trained",
    "num_trained": "trained numbers",
    "num_parameters": "numbers in the model",
    "steps": "optimizer steps",
    "epochs": "epochs asked for",
    "batch_size": "conversations a step",
    "learning_rate": "learning rate, peak",
    "precision": "precision",
    "parallel": "parallelism",
    "tokens": "tokens seen",
    "supervised_tokens": "of these learned from",
    "time": "time in steps",
    "tokens_per_s": "tokens/s, median",
    "mfu": "MFU, median",
    "peak_memory": "memory of a rank, peak",
    "loss": "training loss, last 25 steps",
    "held_out_loss": "held-out loss, last",
    "exact_match": "held-out exact match, last",
    "vision": "the vision tower",
    "language": "the language model",
    "projector": "the projector",
    "lora": "LoRA of rank {lora_rank} beside the language model's linears and the projector",
    "lora vocabulary": "LoRA of rank {lora_rank} beside the language model's linears, the projector, embeddings and "
    "lm_head",
    "full": "the language model and the projector",
    "with vision": "{train}, gently the vision tower",
    "rates of": "{learning_rate}[, projector {projector_learning_rate}][, vision tower {vision_learning_rate}]",
    "precision of": "{dtype}[, frozen linears in {bits} bits]",
    "not trained here": "{names}: not trained here, so nothing is told of it but its answers.",
    **RUN_WORDS["en"],
    # Evaluation
    "n": "questions",
    "interval": "95 % interval",
    "intervals": "Intervals are 95 % bootstrap intervals over pictures.",
    "no score": "{name}: answered, and scored by its owner's server.",
    "too many": "{breakdown}: {number} names, too many for a page; they are in scores.json.",
    "no results": "No benchmark has been answered yet: eval/main.py does that.",
    "settings": "Decided by",
    "a and b": "A is {first}, B is {second}.",
    # Environment
    "device": "device",
    "world_size": "processes",
    "commit": "commit",
    "python": "Python",
    "torch": "PyTorch",
    "threads": "threads",
    "started": "started",
    "training of": "training of {name}",
    "answers of": "{task}, {name}",
    "not recorded": "The training of {names} did not record its machine, versions and commit.",
    "previous stage": "{name} starts from what the stage before it left, which its settings do not name: add "
    "`model=FOLDER`.",
    "commands": "From the repository's root. A run's config.toml is a stage file with every setting in it.",
    "cv note": "Filled in from the numbers of this report and from nothing else. Leave out what you did not do.",
}
CHINESE = {
    "page language": "zh",
    "title": "{names}：训练与评测报告",
    "comma": "、",
    "and": " 与 ",
    "space": "",
    "summary trained": "**{name}** 在 {data} 上训练{train}[，训练参数 {num_trained} 个][，模型共 {num_parameters} 个]"
    "[，{steps} 步，每步 {batch_size} 段对话][，训练 {time}][，吞吐量中位数 {tokens_per_s} token/s]。",
    "summary change": "在 **{task}**（{n} 题）上，{metric}为 **{after}**[（95 % 置信区间 {interval}）]，{base} 为 "
    "{before}。",
    "summary score": "在 **{task}**（{n} 题）上，{name} 的{metric}为 **{after}**[（95 % 置信区间 {interval}）]。",
    "training": "训练了什么，用的什么数据",
    "curves": "训练曲线",
    "evaluation": "评测结果",
    "compared": "微调前后对比",
    "examples": "发生变化的回答",
    "environment": "环境",
    "reproduce": "如何复现",
    "configuration": "完整配置",
    "cv": "简历条目",
    "run": "运行",
    "data": "训练数据",
    "rows": "其中对话数",
    "held_out_data": "留出数据",
    "started from": "起点",
    "train": "训练部分",
    "num_trained": "可训练参数",
    "num_parameters": "模型参数总量",
    "steps": "优化步数",
    "epochs": "设定轮数",
    "batch_size": "每步对话数",
    "learning_rate": "峰值学习率",
    "precision": "精度",
    "parallel": "并行方式",
    "tokens": "处理的 token 数",
    "supervised_tokens": "其中参与学习的",
    "time": "各步用时合计",
    "tokens_per_s": "token/s，中位数",
    "mfu": "MFU，中位数",
    "peak_memory": "单进程内存峰值",
    "loss": "训练损失，最后 25 步",
    "held_out_loss": "留出损失，最后一次",
    "exact_match": "留出集完全匹配率，最后一次",
    "vision": "视觉编码器",
    "language": "语言模型",
    "projector": "投影层",
    "lora": "语言模型线性层旁的 LoRA（秩 {lora_rank}）与投影层",
    "lora vocabulary": "语言模型线性层旁的 LoRA（秩 {lora_rank}）、投影层、词嵌入与 lm_head",
    "full": "语言模型与投影层",
    "with vision": "{train}，并小步微调视觉编码器",
    "rates of": "{learning_rate}[，投影层 {projector_learning_rate}][，视觉编码器 {vision_learning_rate}]",
    "precision of": "{dtype}[，冻结的线性层为 {bits} 位]",
    "not trained here": "{names}：不是在这里训练的，只列出它的回答。",
    **RUN_WORDS["zh"],
    "n": "题数",
    "interval": "95 % 置信区间",
    "intervals": "区间均为按图片自助抽样（bootstrap）的 95 % 置信区间。",
    "no score": "{name}：已作答，由发布方的服务器评分。",
    "too many": "{breakdown}：共 {number} 项，一页放不下，见 scores.json。",
    "no results": "还没有评测结果：由 eval/main.py 得到。",
    "settings": "决定结果的设置",
    "a and b": "A 为 {first}，B 为 {second}。",
    "device": "设备",
    "world_size": "进程数",
    "commit": "代码提交",
    "python": "Python",
    "torch": "PyTorch",
    "threads": "线程数",
    "started": "开始时间",
    "training of": "{name} 的训练",
    "answers of": "{task}，{name}",
    "not recorded": "{names} 的训练没有记录机器、版本和代码提交。",
    "previous stage": "{name} 从前一阶段的结果开始，而其设置没有写明是哪一个：请加上 `model=文件夹`。",
    "commands": "在仓库根目录下运行。运行文件夹里的 config.toml 就是写全了所有设置的阶段文件。",
    "cv note": "只用本报告中的数字填写，没有其他来源。不是自己做的，请删去。",
}
WORDS: dict[str, Mapping[str, str]] = {"en": ENGLISH, "zh": CHINESE}


def fill(template: str, facts: Mapping[str, object]) -> str | None:
    """Fill a template's {names}; a part in [brackets] with one that is unknown is left out, else None is returned.

    A value of None counts as unknown. What is filled in is not read as a template again.
    """
    known = {name: str(value) for name, value in facts.items() if value is not None}

    def names(text: str) -> set[str]:
        return set(re.findall(r"\{(\w+)\}", text))

    kept = re.sub(r"\[([^\]]*)\]", lambda found: found[1] if names(found[1]) <= known.keys() else "", template)
    return re.sub(r"\{(\w+)\}", lambda found: known[found[1]], kept) if names(kept) <= known.keys() else None


def join_names(names: Sequence[str], words: Mapping[str, str]) -> str:
    """Return "a, b and c"."""
    return words["and"].join(filter(None, [words["comma"].join(names[:-1]), names[-1]]))
