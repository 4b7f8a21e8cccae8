"""Training adapters: losses, gradients and whole trajectories are PEFT's, in fp32 and over 4 bits; dropout is shared.

A difference is max|ours - theirs| / max|theirs|. The tolerances are some four times what is measured on CPUs.

Shapes: B rows, T tokens (19), D hidden size (48), I inner size (112), r rank (6).
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.adapter_files import TARGETS, LoraSettings
from model.attention import PackedAttention
from model.llama import rotary_tables
from model.llava import Llava
from model.lora import LoraLinear, SharedDropout, add_lora, initial_factors
from model.quantize import QuantizedLinear, quantize_linears
from model.weights import load_llava
from tests.model.checkpoints import CONFIG, make_model, make_peft_model, write_hf
from tests.model.small_llava import make_pixels, make_prompt, relative_difference
from tests.model.test_parity import run_ours

LOSS_TOLERANCE = 1e-6  # measured: at most 2e-7, after 20 steps too
LOGITS_TOLERANCE = 4e-6  # 1e-6
GRADIENT_TOLERANCE = 1e-5  # 3e-6
WEIGHTS_TOLERANCE = 1.5e-5  # after 20 steps; 4e-6
NUM_PADDING_ROWS = 5
IGNORE_INDEX = -100

SETTINGS = {
    "all": LoraSettings(rank=6, alpha=9),
    "rsLoRA": LoraSettings(rank=6, alpha=4, use_rslora=True),
    "some targets": LoraSettings(rank=6, alpha=9, targets=("k_proj", "up_proj", "o_proj")),
}

Compute = Callable[[], tuple[Tensor, Tensor]]  # -> loss, logits


@pytest.fixture(scope="module")
def llava() -> Llava:
    return make_model(seed=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, llava: Llava) -> Path:
    return write_hf(tmp_path_factory.mktemp("base") / "base", llava, NUM_PADDING_ROWS, names="disk")


def peft_name(name: str) -> str:
    """Return PEFT's name of one of our parameters."""
    if name.startswith("projector."):
        return name.replace("projector", "base_model.model.model.multi_modal_projector.modules_to_save.default")
    return f"base_model.model.model.{name}.weight"


def make_pair(llava: Llava, base: Path, settings: LoraSettings, bits: int = 16) -> tuple[Llava, Any, list[str]]:
    """Return our model and PEFT's with the same base, factors and projector, and the names of what is trained."""
    ours = load_llava(base, bits=bits)
    if bits != 16:
        llava = copy.deepcopy(llava)
        for name, module in ours.named_modules():
            if isinstance(module, QuantizedLinear):
                llava.get_parameter(f"{name}.weight").data = module.dequantize(torch.float32)
    targets = rf".*language_model.*\.({'|'.join(settings.targets)})"
    theirs = make_peft_model(
        llava, NUM_PADDING_ROWS, r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora, target_modules=targets,
    )  # fmt: skip
    add_lora(ours, settings)
    trained = [name for name, _ in ours.named_parameters() if ".lora_" in name or name.startswith("projector.")]
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            parameter.data = theirs.get_parameter(peft_name(name)).detach().clone()
    assert {peft_name(name) for name in trained} == {n for n, p in theirs.named_parameters() if p.requires_grad}
    return ours, theirs, trained


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return input_ids and labels (B, T), and two images."""
    input_ids = torch.stack([make_prompt("tIttttttttt", seed=3), make_prompt("tttttIttttt", seed=4)])
    is_supervised = torch.arange(input_ids.shape[1]) % 3 != 0
    return input_ids, input_ids.masked_fill(~is_supervised | (input_ids < 0), IGNORE_INDEX), make_pixels(2)


def compute_ours(model: Llava) -> tuple[Tensor, Tensor]:
    input_ids, labels, pixel_values = make_batch()
    logits = run_ours(model, input_ids, pixel_values)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX), logits


def compute_theirs(model: Any) -> tuple[Tensor, Tensor]:
    input_ids, labels, pixel_values = make_batch()
    ids = input_ids.masked_fill(input_ids < 0, model.config.image_token_id)
    output = model(input_ids=ids, labels=labels, pixel_values=pixel_values)
    return output.loss, output.logits


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("kind", SETTINGS)
def test_logits_loss_and_gradients_agree_with_peft(llava: Llava, base: Path, kind: str, bits: int) -> None:
    """Over 4 bits PEFT runs on the same weights, rounded: there is nothing else to agree with."""
    ours, theirs, trained = make_pair(llava, base, SETTINGS[kind], bits)
    (our_loss, our_logits), (their_loss, their_logits) = compute_ours(ours), compute_theirs(theirs)
    assert relative_difference(our_logits, their_logits) < LOGITS_TOLERANCE
    assert relative_difference(our_loss, their_loss) < LOSS_TOLERANCE
    our_loss.backward()
    their_loss.backward()
    for name in trained:
        gradient, expected = ours.get_parameter(name).grad, theirs.get_parameter(peft_name(name)).grad
        assert gradient is not None
        assert relative_difference(gradient, expected) < GRADIENT_TOLERANCE, name
    assert len(trained) == 4 + 2 * 2 * len(SETTINGS[kind].targets)
    assert all(p.grad is None for n, p in ours.named_parameters() if n not in trained)


@pytest.mark.parametrize(("kind", "bits"), [("all", 16), ("rsLoRA", 16), ("some targets", 16), ("all", 4)])
def test_twenty_steps_agree_with_peft(llava: Llava, base: Path, kind: str, bits: int) -> None:
    """The loss falls, by the same steps to the same weights."""
    ours, theirs, trained = make_pair(llava, base, SETTINGS[kind], bits)
    our_losses = train(lambda: compute_ours(ours), [ours.get_parameter(name) for name in trained])
    their_losses = train(lambda: compute_theirs(theirs), [theirs.get_parameter(peft_name(n)) for n in trained])
    assert relative_difference(torch.tensor(our_losses), torch.tensor(their_losses)) < LOSS_TOLERANCE
    assert our_losses[-1] < 0.5 * our_losses[0]
    for name in trained:
        expected = theirs.get_parameter(peft_name(name))
        assert relative_difference(ours.get_parameter(name), expected) < WEIGHTS_TOLERANCE, name


def train(compute: Compute, parameters: list[nn.Parameter]) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    losses = []
    for _ in range(20):
        loss, _ = compute()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bits", [16, 4])
def test_half_precision_computes_in_it_and_learns_in_fp32(llava: Llava, base: Path, bits: int) -> None:
    ours, theirs, trained = make_pair(llava, base, SETTINGS["all"], bits)
    half = load_llava(base, dtype=torch.bfloat16, bits=bits)
    add_lora(half, SETTINGS["all"])
    half.load_state_dict({n: t if ".lora_" in n else half.state_dict()[n] for n, t in ours.state_dict().items()})
    half.projector.load_state_dict(ours.projector.state_dict())
    loss, logits = compute_ours(half)
    expected, _ = compute_theirs(theirs)
    assert logits.dtype == torch.bfloat16
    loss.backward()
    expected.backward()
    for name in trained:
        gradient = half.get_parameter(name).grad
        assert gradient is not None
        if ".lora_" in name:
            assert gradient.dtype == torch.float32
            their_gradient = theirs.get_parameter(peft_name(name)).grad
            cosine = F.cosine_similarity(gradient.flatten(), their_gradient.flatten(), dim=0)
            assert cosine > 0.99, name  # measured: at least 0.999; rounding to 8 bits, layer after layer


def test_start_values_are_pefts_and_do_not_depend_on_who_reads_them() -> None:
    """A is uniform within 1 / sqrt(inputs), B zero. Ranks read different rows, and any of them in any order."""
    with torch.device("meta"):
        model = Llava(CONFIG)
        add_lora(model, LoraSettings(rank=32, alpha=9))
    start = initial_factors(model, seed=5)
    factors = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    assert start.keys() == factors.keys()
    assert len(factors) == 2 * 2 * 7
    for name, stored in start.items():
        assert factors[name].is_meta
        assert factors[name].dtype == stored.dtype == torch.float32
        assert stored.shape == factors[name].shape
        whole = stored.load()
        assert torch.equal(stored.read(slice(7, 20)), whole[7:20])
        assert torch.equal(torch.cat([stored.read(slice(0, 13)), stored.read(slice(13, None))]), whole)
        if ".lora_B." in name:
            assert not whole.any()
            continue
        bound = whole.shape[1] ** -0.5
        assert 0.98 * bound < whole.abs().max() <= bound
        assert abs(whole.std() - bound / 3**0.5) < 0.05 * bound
        assert abs(whole.mean()) < 0.05 * bound
        assert not torch.equal(initial_factors(model, seed=6)[name].load(), whole)
    first, second = (start[f"language_model.layers.0.self_attn.{x}_proj.lora_A.default"].load() for x in "qk")
    assert not torch.equal(first, second)
    # Another process gets the same: Python's own hash of a name would not do.
    assert first[0, :2].tolist() == pytest.approx([0.13241804, 0.12695906])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fresh_factors_change_nothing(llava: Llava, base: Path, bits: int) -> None:
    model = load_llava(base, bits=bits)
    _, before = compute_ours(model)
    add_lora(model, LoraSettings(rank=6, alpha=9, dropout=0.5))
    _, after = compute_ours(model)
    assert torch.equal(after, before)
    assert not any(module.training for module in model.modules())
    layers = model.language_model.layers.named_parameters()
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in layers if "_proj" in name)
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 2 * 7
    with pytest.raises(ValueError, match=r"layer 0's self_attn.q_proj is a LoraLinear: LoRA is added to a base"):
        add_lora(model, LoraSettings(rank=6, alpha=9))


def test_a_model_without_memory_gets_its_adapters_and_its_values_later() -> None:
    """Sharding wants it so: 13B's weights fit no rank. Dropout leaves no names behind."""
    with torch.device("meta"):
        model = Llava(CONFIG).to(torch.bfloat16)
        quantize_linears(model, 4)
        add_lora(model, LoraSettings(rank=6, alpha=9, dropout=0.1, targets=("q_proj", "v_proj")))
    prefix = "language_model.layers.1.self_attn."
    names = {name.removeprefix(prefix) for name in model.state_dict() if name.startswith(prefix)}
    quantized = ("weight_codes", "weight_scale", "weight_zero")
    assert names == {
        *(f"{linear}_proj.base_layer.{part}" for linear in "qv" for part in quantized),
        *(f"{linear}_proj.{part}" for linear in "ko" for part in quantized),
        *(f"{linear}_proj.lora_{side}.default" for linear in "qv" for side in "AB"),
    }
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "LoRA rank = 0, expected at least 1"),
        ({"alpha": 0.0}, "LoRA alpha = 0.0, expected a number above 0"),
        ({"dropout": 1.0}, "LoRA dropout = 1.0 is a share, expected at least 0 and below 1"),
        ({"dropout": -0.1}, "LoRA dropout = -0.1"),
        ({"targets": ("q_proj", "fc1")}, "LoRA targets fc1 are unknown, choose from q_proj, k_proj"),
        ({"targets": ()}, "no LoRA targets"),
    ],
)
def test_settings_that_make_no_lora_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**{"rank": 6, "alpha": 9, **changes})


def test_scaling() -> None:
    assert LoraSettings(rank=16, alpha=8).scaling == 0.5
    assert LoraSettings(rank=16, alpha=8, use_rslora=True).scaling == 2.0


DROPOUT = LoraSettings(rank=6, alpha=9, dropout=0.4)


def test_dropout_trains_as_peft_does_with_the_same_masks(llava: Llava, base: Path) -> None:
    """q, k and v share a mask, so do gate and up: PEFT is given these masks in the place of its own."""
    ours, theirs, trained = make_pair(llava, base, DROPOUT)
    masks: dict[nn.Module, list[Tensor]] = {}

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        masks.setdefault(module, []).append(output)

    for module in ours.modules():
        if isinstance(module, SharedDropout):
            module.register_forward_hook(record)
    torch.manual_seed(3)
    our_loss, _ = compute_ours(ours.train())
    assert len(masks) == 2 * 4
    assert sorted(len(outputs) for outputs in masks.values()) == [1, 1, 1, 1, 2, 2, 3, 3]
    for outputs in masks.values():
        assert all(output is outputs[0] for output in outputs)
        assert 0.3 < (outputs[0] == 0).float().mean() < 0.5
    for name, module in ours.named_modules():
        if isinstance(module, LoraLinear):
            mask = (masks[module.dropout][0] != 0) / (1 - DROPOUT.dropout)
            theirs.get_submodule(f"base_model.model.model.{name}").lora_dropout["default"] = Mask(mask)
    their_loss, _ = compute_theirs(theirs)
    assert relative_difference(our_loss, their_loss) < LOSS_TOLERANCE
    our_loss.backward()
    their_loss.backward()
    for name in trained:
        gradient, expected = ours.get_parameter(name).grad, theirs.get_parameter(peft_name(name)).grad
        assert gradient is not None
        assert relative_difference(gradient, expected) < GRADIENT_TOLERANCE, name


class Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class Layer:
    """A decoder layer in training, of which only the factors learn; two documents are packed in its row."""

    def __init__(self, settings: LoraSettings) -> None:
        model = make_model(seed=1, dtype=torch.float32).train()
        add_lora(model, settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if ".lora_" in name:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        self.module = model.language_model.layers[1]
        positions = torch.arange(19)[None]
        self.cos, self.sin = rotary_tables(positions, CONFIG.text.head_size, 10000.0, torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x, self.cos, self.sin, PackedAttention([0, 7, 19]))

    def list_held(self) -> list[Tensor]:
        """Return what the dropout modules hold on to."""
        dropouts = [module for module in self.module.modules() if isinstance(module, SharedDropout)]
        assert dropouts
        return [tensor for dropout in dropouts for tensor in (dropout.x, dropout.dropped) if tensor is not None]


def make_hidden() -> Tensor:
    return torch.randn(1, 19, 48, generator=torch.Generator().manual_seed(8)).requires_grad_()


def count_saved_bytes(layer: Layer) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, each storage once, parameters left out."""
    parameters = {parameter.data_ptr() for parameter in layer.module.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that none is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(make_hidden())
    return sum(storage.nbytes() for storage in storages.values())


def test_dropout_keeps_no_more_than_its_masks() -> None:
    """A byte for each number of the four tensors that the seven linears read; PEFT keeps masks and copies for seven."""
    without, with_dropout = (count_saved_bytes(Layer(s)) for s in (LoraSettings(rank=6, alpha=9), DROPOUT))
    assert without > 0
    assert with_dropout - without == 19 * (48 + 48 + 48 + 112)


@pytest.mark.parametrize(
    "targets", [TARGETS, ("q_proj", "v_proj"), ("k_proj", "gate_proj", "down_proj")], ids=["all", "qv", "kgd"]
)
def test_dropout_under_activation_checkpointing(targets: tuple[str, ...]) -> None:
    """The recomputation draws the masks of the first run, and nothing is held on to when a pass is over."""
    settings = LoraSettings(rank=6, alpha=9, dropout=0.4, targets=targets)
    results = []
    for is_checkpointed in (False, True):
        layer, x = Layer(settings), make_hidden()
        torch.manual_seed(11)
        y = checkpoint(layer, x, use_reentrant=False) if is_checkpointed else layer(x)
        assert layer.list_held() == []
        torch.manual_seed(12)  # what else draws numbers in between must not matter
        (y * torch.arange(48)).sum().backward()
        assert layer.list_held() == []
        assert x.grad is not None
        gradients = [p.grad for n, p in layer.module.named_parameters() if ".lora_" in n]
        assert len(gradients) == 2 * len(targets)
        results.append([y.detach(), x.grad, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_dropout_is_off_in_evaluation_and_drawn_anew_in_training() -> None:
    layer, x = Layer(DROPOUT), make_hidden()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.module.eval()
    plain = Layer(LoraSettings(rank=6, alpha=9))
    assert torch.equal(layer(x), plain(x))
