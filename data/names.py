"""What scores, breakdowns and bars are called in Chinese. Subtasks and question types keep their owners' names."""

CHINESE = {
    "all": "全部",
    "type": "题型",
    "subtask": "子任务",
    "answer type": "答案类型",
    "question type": "问题类型",
    "category": "类别",
    "l2-category": "二级类别",
    "split": "子集",
    "kind": "类型",
    "source": "来源",
    "turn": "轮次",
    "answers": "回答",
    "exact match": "完全匹配率",
    "accuracy": "准确率",
    "precision": "精确率",
    "recall": "召回率",
    "yes ratio": "答“是”的比例",
    "VQA accuracy": "VQA 准确率",
    "character F1": "字符 F1",
    "circular accuracy": "循环准确率",
    "MME perception": "MME 感知得分",
    "perception": "感知",
    "cognition": "认知",
    "POPE F1": "POPE F1",
    "exact match; character F1 for Chinese": "完全匹配率（中文为字符 F1）",
    "neither yes nor no": "既非 yes 也非 no",
    "always the commonest answer": "总答最常见的答案",
    "best without looking at the picture": "不看图片最多能得",
    "always yes": "总答 yes",
}


def translate(name: str, language: str) -> str:
    return CHINESE.get(name, name) if language == "zh" else name
