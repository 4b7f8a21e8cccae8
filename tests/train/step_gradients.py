"""One training step's loss and gradients in several variants: started by torchrun from test_ranks.py.

python tests/train/step_gradients.py OUT_FOLDER stage.toml '{"variant": ["key=value", ...], ...}'
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from train.config import TrainConfig, load_configs  # noqa: E402
from train.parallel import Ranks, backward, fill, gather, leave_ranks, shard, start_ranks  # noqa: E402
from train.stage import build_objective, open_data  # noqa: E402
from train.start import list_sources, open_start  # noqa: E402


def main() -> None:
    out, file, variants = sys.argv[1:]
    ranks = start_ranks()
    for name, overrides in json.loads(variants).items():
        (config,) = load_configs([Path(file)], overrides)
        tensors = take_step(config, ranks)
        if ranks.is_first:
            save_file(tensors, Path(out) / f"{name}.safetensors")
    ranks.wait()
    leave_ranks(0)


def take_step(config: TrainConfig, ranks: Ranks) -> dict[str, torch.Tensor]:
    start = open_start(config, None)
    steps, _ = open_data(config, start, ranks)
    llava, objective = build_objective(config, start.config, steps.dataset)
    sources = list_sources(llava, objective, start, config.seed)
    shard(objective, objective.blocks(), config.parallel, getattr(torch, config.dtype), ranks)
    fill(objective, sources, ranks.device)
    step = steps[0]
    loss_sum = 0.0
    for index, batch in enumerate(step.micro_batches):
        loss, _ = objective(batch)
        backward(loss / step.num_supervised, objective, ranks, is_last=index + 1 == len(step.micro_batches))
        loss_sum += loss.item()
    (total,) = ranks.sum([loss_sum])
    gradients = {name: gather(p.grad) for name, p in llava.named_parameters() if p.grad is not None}
    return gradients | {"loss": torch.tensor([total], dtype=torch.float64)}


main()
