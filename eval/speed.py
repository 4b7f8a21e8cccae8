"""Time this project beside its peers: `python eval/speed.py --suite tiny`.

Contestants take turns on the same weights, documents and precision; what is printed is medians and their ratio.
Each run is appended to `eval/results/speed.jsonl` with the machine, the versions and the commit.

`tiny`: one training step of the main job's model (forward, backward, AdamW) on 16 easy-VQA conversations, against
`transformers` on the same conversations, padded to the longest, with logits at every position. Needs
`pip install -r tests/requirements.txt` for the peer.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from data.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID  # noqa: E402
from data.dataset import ConversationDataset, RenderOptions  # noqa: E402
from data.packing import Batch, StepDataset  # noqa: E402
from data.prepare import easy_vqa  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model.config import CONFIGS  # noqa: E402
from model.llava import Llava, initialize_weights  # noqa: E402
from train.loss import NextToken  # noqa: E402  (the trainer's own step is what is timed here)

RESULTS = ROOT / "eval/results/speed.jsonl"
NUM_DOCUMENTS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["tiny"], required=True)
    parser.add_argument("--data", type=Path, default=Path("runs/easy_vqa"), help="prepared here if it is not there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each contestant, after 3 of warm-up")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file the result is appended to")
    arguments = parser.parse_args()
    if not (arguments.data / "vqa_train.json").is_file():
        easy_vqa.prepare(arguments.data)
    result = compare_tiny(arguments.data, arguments.device, arguments.repeats)
    print_result(result)
    arguments.out.parent.mkdir(exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def compare_tiny(data: Path, device: str, repeats: int) -> dict[str, Any]:
    """Time both contestants' steps in turn, then measure each one's memory in a process of its own."""
    batch = make_batch(data)
    steps = {name: make(batch, device) for name, make in CONTESTANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for repeat in range(-3, repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            loss = step()  # reading the loss waits for the device
            if repeat == -3:
                losses[name] = loss
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    real, padded = batch.cu_seqlens[-1], max(batch.lengths) * NUM_DOCUMENTS
    return {
        "suite": "tiny",
        "documents": NUM_DOCUMENTS,
        "real_tokens": real,
        "padded_tokens": padded,
        "supervised_tokens": int((batch.labels != IGNORE_INDEX).sum()),
        "first_loss": losses,
        "median_s": {name: statistics.median(values) for name, values in seconds.items()},
        "spread_s": {name: [min(values), max(values)] for name, values in seconds.items()},
        "kept_for_backward_bytes": {name: measure_kept_bytes(step) for name, step in steps.items()},
        "peak_memory_bytes": {name: measure_memory(name, data, device) for name in steps},
        "environment": describe_environment(device),
    }


def make_batch(data: Path) -> Batch:
    """Pack the conversations both contestants train on, as official LLaVA would: each turn sees those before it."""
    tokenizer = Tokenizer(ROOT / "data/tiny/tokenizer.model")
    vision = CONFIGS["tiny"].vision
    options = RenderOptions(vision.num_patches, vision.image_size, max_tokens=512)
    dataset = ConversationDataset(data / "vqa_train.json", data / "images", tokenizer, options)
    return StepDataset(dataset, NUM_DOCUMENTS, 1_000_000, seed=0, rank=0, num_ranks=1)[0].micro_batches[0]


def make_our_step(batch: Batch, device: str) -> Callable[[], float]:
    """Return this project's training step: packed, logits at supervised positions only."""
    llava = Llava(CONFIGS["tiny"])
    initialize_weights(llava, llava.config.text.hidden_size**-0.5, seed=0)
    objective = NextToken(llava, reads_images=True).to(device)
    placed = batch.to(torch.device(device))
    num_supervised = int((batch.labels != IGNORE_INDEX).sum())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        loss_sum, _ = objective(placed)
        loss = loss_sum / num_supervised
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def make_transformers_step(batch: Batch, device: str) -> Callable[[], float]:
    """Return the peer's step: LlavaForConditionalGeneration with the same weights on the padded batch."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = CONFIGS["tiny"]
    image_token = 0  # Hugging Face's placeholder must be an id of the vocabulary; <unk> occurs in no conversation
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{k: v for k, v in vars(sizes.vision).items() if k != "select_layer"}),
        text_config=LlamaConfig(**vars(sizes.text)),
        image_token_index=image_token,
        vision_feature_layer=sizes.vision.select_layer,
    )
    model: Any = LlavaForConditionalGeneration(config)  # its `to` is wrapped in a way that type checkers misread
    model = model.to(device).train()
    llava = Llava(sizes)
    initialize_weights(llava, sizes.text.hidden_size**-0.5, seed=0)
    copy_weights(llava, model)
    lengths = batch.lengths
    width = max(lengths)
    input_ids = torch.full((len(lengths), width), 2)  # any other id will do: it is masked
    labels = torch.full((len(lengths), width), IGNORE_INDEX)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    parts = zip(batch.input_ids.split(lengths), batch.labels.split(lengths), lengths, strict=True)
    for row, (ids, row_labels, length) in enumerate(parts):
        input_ids[row, :length] = torch.where(ids == IMAGE_TOKEN_ID, image_token, ids)
        labels[row, :length] = row_labels
        mask[row, :length] = 1
    assert batch.pixel_values is not None
    inputs = {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "pixel_values": batch.pixel_values}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


CONTESTANTS = {"plain-llava": make_our_step, "transformers": make_transformers_step}


@torch.no_grad()
def copy_weights(llava: Llava, model: torch.nn.Module) -> None:
    """Give the peer our weights, every one of them."""
    prefixes = {
        "model.vision_tower.embeddings.": "vision_tower.",
        "model.vision_tower.encoder.": "vision_tower.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "projector.",
        "model.language_model.": "language_model.",
        "lm_head.": "language_model.lm_head.",
    }
    ours = llava.state_dict()
    for name, parameter in model.named_parameters():
        plain = name.replace(".vision_model.", ".")  # an extra level in some versions
        prefix = next(prefix for prefix in prefixes if plain.startswith(prefix))
        tensor = ours.pop(prefixes[prefix] + plain.removeprefix(prefix))
        parameter.copy_(tensor)
    assert not ours, f"the peer has no place for {sorted(ours)}"


def measure_kept_bytes(step: Callable[[], float]) -> int:
    """Return the bytes that one step's forward pass keeps for its backward pass, each storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses from being used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:  # parameters are there anyway
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values())


def measure_memory(name: str, data: Path, device: str) -> int:
    """Return how far memory rises above the built model during three steps, in bytes, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(name, data, device, sender))
    process.start()
    sender.close()
    peak = receiver.recv()
    process.join()
    return peak


def _measure_memory(name: str, data: Path, device: str, sender: Any) -> None:
    step = CONTESTANTS[name](make_batch(data), device)
    before = current_memory_bytes(device)
    for _ in range(3):
        step()
    sender.send(peak_memory_bytes(device) - before)


def current_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_environment(device: str) -> dict[str, Any]:
    """Return hardware, versions and commit."""
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def print_result(result: dict[str, Any]) -> None:
    """Print one line per contestant, then the ratio."""
    real = result["real_tokens"]
    print(
        f"one training step on {result['documents']} conversations: {real} real tokens, {result['padded_tokens']} when"
    )
    print(f"padded, {result['supervised_tokens']} supervised; {result['environment']}\n")
    for name, median in result["median_s"].items():
        low, high = (1000 * value for value in result["spread_s"][name])
        kept, peak = (result[kind][name] / 2**20 for kind in ("kept_for_backward_bytes", "peak_memory_bytes"))
        print(f"{name:14s}{1000 * median:7.1f} ms ({low:.1f} to {high:.1f}), {real / median:.0f} real tokens/s")
        print(f"{'':14s}{kept:7.1f} MiB kept for backward; the process rises {peak:.0f} MiB above the built model")
        print(f"{'':14s}first loss {result['first_loss'][name]:.6f}")
    ours, peer = (result["median_s"][name] for name in CONTESTANTS)
    kept = [result["kept_for_backward_bytes"][name] for name in CONTESTANTS]
    print(f"\n{peer / ours:.2f} x the peer's speed, {kept[0] / kept[1]:.2f} x its memory kept for backward")


if __name__ == "__main__":
    main()
