"""What the dashboard says, in English and Chinese, and what it looks like."""

TEXTS = {
    "dashboard_intro": (
        "The runs in `{folder}/`, read from their files. A training that is going on is shown as it goes.",
        "`{folder}/` 中的训练与评测，全部读自其文件；正在进行的训练会随时更新。",
    ),
    "dashboard_empty": (
        "No run in `{folder}/` yet. This trains the tiny model, without a GPU, in minutes:",
        "`{folder}/` 中还没有训练记录。用下面这一行训练微型模型，无需 GPU，几分钟即可：",
    ),
    # The table of runs
    "dashboard_run": ("run", "名称"),
    "dashboard_train": ("trained", "训练部分"),
    "dashboard_steps": ("steps", "步数"),
    "dashboard_loss": ("loss", "损失"),
    "dashboard_held_out": ("held out", "留出损失"),
    "dashboard_speed": ("tokens/s", "token/s"),
    "dashboard_time": ("time in steps", "各步用时"),
    "dashboard_scores": ("scores", "得分"),
    "dashboard_training": ("training now", "训练中"),
    "dashboard_finished": ("finished", "已完成"),
    "dashboard_stopped": ("stopped", "已停止"),
    "dashboard_asked": ("not trained here", "非本机训练"),
    "dashboard_left": ("about {time} left", "约剩 {time}"),
    "dashboard_vision": ("vision tower", "视觉编码器"),
    "dashboard_language": ("language model", "语言模型"),
    "dashboard_projector": ("projector", "投影层"),
    "dashboard_lora": ("LoRA, rank {rank}", "LoRA，秩 {rank}"),
    "dashboard_full": ("language model + projector", "语言模型与投影层"),
    "dashboard_hidden": ("Older runs that are not shown: {count}.", "另有 {count} 个较早的记录未显示。"),
    # Curves
    "dashboard_curves": ("Curves", "曲线"),
    "dashboard_pick": ("Runs to look at (up to 6)", "查看哪些（最多 6 个）"),
    "dashboard_window": ("Smoothed over (steps)", "平滑窗口（步）"),
    "dashboard_window_auto": ("automatic", "自动"),
    "dashboard_axis": ("Axis of the loss", "损失坐标"),
    "dashboard_log": ("logarithmic", "对数"),
    "dashboard_linear": ("linear", "线性"),
    "dashboard_together": ("Losses of {names}", "{names} 的损失"),
    "dashboard_save": ("Save PNG", "保存 PNG"),
    "dashboard_no_pick": ("Pick a run above, and its curves are shown here.", "请在上面选择，曲线会显示在这里。"),
    "dashboard_no_curves": (
        "{name} has no curves: it recorded no training step.",
        "{name} 没有曲线：没有记录任何训练步。",
    ),
    "dashboard_busy": ("Drawing …", "正在绘制……"),
    "dashboard_no_font": (
        "The charts are in English: no font with Chinese is installed where this page comes from "
        "(apt install fonts-noto-cjk).",
        "图表为英文：运行本页面的机器没有安装中文字体（apt install fonts-noto-cjk）。",
    ),
    "dashboard_broken": ("{name} cannot be read: {problem}", "无法读取 {name}：{problem}"),
    # Scores
    "dashboard_evaluation": ("Scores", "评测"),
    "dashboard_no_scores": (
        "No task has been answered yet. This scores a model:",
        "还没有评测结果。用下面这一行评测模型：",
    ),
    "dashboard_task": ("Details of a task", "任务明细"),
    "dashboard_unscored": ("answered; its owner scores it", "已作答，由发布方评分"),
    "dashboard_interval_note": (
        "Below a score: its 95 % bootstrap interval over pictures, and the number of questions.",
        "得分下方为按图片自助抽样的 95 % 置信区间与题数。",
    ),
    "dashboard_headline": ("whole task", "整个任务"),
    "dashboard_bars": ("for comparison, without a model", "参照（不用模型）"),
    "dashboard_too_many": ("{count} more are in scores.json", "其余 {count} 项见 scores.json"),
    # Two runs beside each other
    "dashboard_compare": ("A beside B", "A 与 B 对比"),
    "dashboard_first": ("A, the base", "A（基准）"),
    "dashboard_second": ("B, what is compared with it", "B（与之比较）"),
    "dashboard_go": ("Compare", "对比"),
    "dashboard_compare_note": (
        "Question by question, as `eval/compare.py` does: differences with their intervals, which of them chance could "
        "have made, and answers that changed. It takes some seconds.",
        "与 `eval/compare.py` 相同，逐题对比：差异及其置信区间、是否可能出于偶然，以及发生变化的回答。需要几秒钟。",
    ),
    "dashboard_compare_two": ("Choose two different runs that have scores.", "请选择两个不同且都有得分的记录。"),
    "dashboard_compare_failed": ("These two cannot be compared: {problem}", "无法对比这两者：{problem}"),
    "dashboard_compare_page": ("Comparison of {first} and {second}", "{first} 与 {second} 的对比"),
}

CSS = """
:root, .dark { --dashboard-faint: color-mix(in srgb, var(--body-text-color) 68%, transparent); }
.dashboard-scroll { overflow-x: auto; max-width: 100%; }
.dashboard-scroll :is(table, thead, tbody, tr) { border: 0 !important; }
.dashboard-scroll table { border-collapse: collapse; width: 100%; font-size: 0.9rem; margin: 0;
  font-variant-numeric: tabular-nums; }
.dashboard-scroll th, .dashboard-scroll td { padding: 0.45rem 0.75rem; text-align: right; white-space: nowrap;
  vertical-align: top; border: 0; border-bottom: 1px solid var(--border-color-primary); }
.dashboard-scroll td { color: var(--body-text-color); }
.dashboard-scroll th { color: var(--dashboard-faint); font-weight: 600; vertical-align: bottom; }
.dashboard-scroll :is(th, td):first-child { text-align: left; position: sticky; left: 0;
  background: var(--body-background-fill); }
.dashboard-scroll :is(th, td).text { text-align: left; }
.dashboard-scroll td:first-child { max-width: 22rem; overflow-wrap: anywhere; white-space: normal; min-width: 8.5rem; }
.dashboard-scroll tr.group td { color: var(--dashboard-faint); padding-top: 1rem; }
.dashboard-scroll small, .dashboard-faint { color: var(--dashboard-faint); font-size: 0.8rem; }
.dashboard-state { display: inline-block; font-size: 0.75rem; padding: 0.05rem 0.5rem; border-radius: 1rem;
  border: 1px solid var(--border-color-primary); color: var(--dashboard-faint); white-space: nowrap; }
.dashboard-state.training { color: #fff; background: #0072b2; border-color: #0072b2; }
.dashboard-state.training::before { content: "●"; margin-right: 0.35em; animation: dashboard-pulse 1.6s infinite; }
.dashboard-state.finished { color: #00704f; border-color: #009e73; }
.dark .dashboard-state.finished { color: #4fd1a5; }
@keyframes dashboard-pulse { 50% { opacity: 0.25; } }
.dashboard-problem { color: #b3261e; white-space: normal; overflow-wrap: anywhere; margin: 0.3rem 0; }
.dark .dashboard-problem { color: #ff9a8f; }
.dashboard-grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.dashboard-curves h3 { margin: 1.2rem 0 0.5rem; }
.dashboard-chart { margin: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden; }
.dashboard-chart.wide { max-width: 56rem; }
.dashboard-chart .picture { overflow-x: auto; background: #fff; }
.dashboard-chart img { display: block; width: 100%; height: auto; margin: 0; border-radius: 0; }
.dashboard-chart.wide img { min-width: 34rem; }
.dark .dashboard-chart .picture { background: #191919; }
.dark .dashboard-chart img { filter: invert(0.9) hue-rotate(180deg) brightness(1.15); }
.dashboard-chart figcaption { display: flex; justify-content: space-between; align-items: center; gap: 1rem;
  padding: 0.35rem 0.75rem; font-size: 0.85rem; color: var(--body-text-color); }
.dashboard-chart button { font-size: 0.8rem; white-space: nowrap; cursor: pointer;
  color: var(--dashboard-faint); background: none; border: 1px solid var(--border-color-primary);
  border-radius: 6px; padding: 0.1rem 0.6rem; }
.dashboard-chart button:hover { color: var(--body-text-color); border-color: var(--dashboard-faint); }
.dashboard-page { width: 100%; height: min(85vh, 60rem); border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: #fff; }
.dark .dashboard-page { background: #17191b; }
.dashboard-command { overflow-wrap: anywhere; white-space: pre-wrap; font-family: var(--font-mono);
  background: var(--background-fill-secondary); border-radius: 6px; padding: 0.6rem 0.8rem; margin: 0.5rem 0; }
#dashboard_refresh { display: none; }
"""
