"""What the charts of runs say, in English and Chinese, and how their numbers are written."""

from collections.abc import Mapping

GIB = 2**30
RUN_WORDS: dict[str, dict[str, str]] = {
    "en": {
        "loss chart": "Loss",
        "learning_rates chart": "Learning rates",
        "throughput chart": "Speed",
        "mfu chart": "MFU: the share of the cards' arithmetic that training used",
        "waits chart": "Time spent waiting",
        "memory chart": "Memory",
        "gpu_use chart": "Use of the GPUs",
        "gpu_power chart": "Power of the GPUs",
        "step": "optimizer step",
        "every step": "every step",
        "one step in many": "one step in {stride}",
        "smoothed": "smoothed",
        "held out": "held out",
        "nats": "loss per learned token (nats)",
        "rates": "learning rate",
        "tokens/s": "tokens/s, all ranks",
        "use": "GPU utilisation",
        "power": "power of a GPU",
        "median": "median",
        "data_wait_s": "waiting for data",
        "rank_wait_s": "waiting for other ranks",
        "share of step": "share of the step (%)",
        "rank": "rank {rank}",
        "allocated, reserved dashed": "allocated, reserved dashed",
        "resident": "resident",
        "peak GiB": "highest so far (GiB)",
        "from to": "{low} to {high}",
        "seconds": "{seconds} s",
        "minutes": "{minutes} min {seconds} s",
        "hours": "{hours} h {minutes} min",
    },
    "zh": {
        "loss chart": "损失",
        "learning_rates chart": "学习率",
        "throughput chart": "速度",
        "mfu chart": "MFU：训练用到的显卡算力比例",
        "waits chart": "等待时间",
        "memory chart": "内存",
        "gpu_use chart": "GPU 利用率",
        "gpu_power chart": "GPU 功率",
        "step": "优化步",
        "every step": "每一步",
        "one step in many": "每 {stride} 步取一步",
        "smoothed": "平滑后",
        "held out": "留出集",
        "nats": "每个学习 token 的损失（nat）",
        "rates": "学习率",
        "tokens/s": "token/s，所有进程合计",
        "use": "GPU 利用率",
        "power": "单卡功率",
        "median": "中位数",
        "data_wait_s": "等待数据",
        "rank_wait_s": "等待其他进程",
        "share of step": "占一步时间的比例（%）",
        "rank": "进程 {rank}",
        "allocated, reserved dashed": "已分配，虚线为已保留",
        "resident": "常驻内存",
        "peak GiB": "至今峰值（GiB）",
        "from to": "{low} 至 {high}",
        "seconds": "{seconds} 秒",
        "minutes": "{minutes} 分 {seconds} 秒",
        "hours": "{hours} 小时 {minutes} 分",
    },
}


def show_count(number: float | None) -> str | None:
    return None if number is None else f"{number:,.0f}"


def show_size(number: int | None) -> str | None:
    """Return a number of parameters: 346,752 or 7.06 B."""
    if number is None or number < 10_000_000:
        return show_count(number)
    return f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:,.2f} B"


def show_percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def show_score(score: float | None, best: float = 1.0) -> str | None:
    """Return a score in percent, or on the benchmark's own scale where that is another."""
    if score is None or best == 1:
        return show_percent(score)
    return f"{score:,.1f}"


def show_interval(interval: list[float] | None, best: float, words: Mapping[str, str]) -> str | None:
    if interval is None:
        return None
    low, high = (str(show_score(end, best)) for end in interval)
    return words["from to"].format(low=low.removesuffix(" %"), high=high)


def show_bytes(number: float | None) -> str | None:
    return None if number is None else f"{number / GIB:.2f} GiB"


def show_time(seconds: float | None, words: Mapping[str, str]) -> str | None:
    if seconds is None:
        return None
    if seconds < 60:
        return words["seconds"].format(seconds=int(seconds))
    if seconds < 3600:
        return words["minutes"].format(minutes=int(seconds // 60), seconds=int(seconds % 60))
    return words["hours"].format(hours=int(seconds // 3600), minutes=int(seconds % 3600 // 60))
