"""What every source of `data.prepare` is told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Random choices are made picture by picture, each from a generator of its own that the seed and the id start."""

    seed: int = 0
    language: str = "en"  # of the prompts, "en" or "zh"
