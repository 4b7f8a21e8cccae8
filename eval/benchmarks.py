"""The tasks of `eval/main.py`, by name."""

from eval import conversations, easy_vqa, mmbench, mme, pope, vqav2
from eval.task import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    **easy_vqa.BENCHMARKS,
    "vqav2": vqav2.VQAV2,
    "vqav2_test_dev": vqav2.VQAV2_TEST_DEV,
    "vqav2_test_std": vqav2.VQAV2_TEST_STD,
    "mme": mme.MME,
    "pope": pope.POPE,
    "mmbench": mmbench.MMBENCH,
    "mmbench_cn": mmbench.MMBENCH_CN,
    "conversations": conversations.CONVERSATIONS,
}
