"""LoRA: a frozen linear layer learns through two thin matrices beside it, y = W x + s B A x.

To train: `add_lora`, with the start values of `initial_factors`. To answer: `attach_adapter` puts one adapter or
several beside a base of any number of bits, `use_adapters` tells each row of a batch which; `merge_lora` makes one part
of the weights. How adapters lie on disk is in `model/adapter_files.py`.

Source: Hu et al. 2021. The initial values are PEFT's.
Shapes: B rows, T tokens, I inputs, O outputs, r rank.
"""

import copy
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapter_files import Adapter, LoraSettings, merge_weight, split_whole
from model.files import StoredTensor
from model.llava import Llava
from model.quantize import QuantizedLinear

DEFAULT = "default"  # PEFT's name for the only adapter

# The linears of a layer that read the same tensor, and can share what dropout leaves of it.
_SAME_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class AdapterChoice:
    """Which adapter each row of a batch runs through: one object, which all adapted modules of a model look at."""

    def __init__(self) -> None:
        self.known: list[str] = []
        self.merged: str | None = None  # the adapter that is part of the weights now
        self.name: str | None = None  # the adapter of every row
        self.num_rows: int | None = None  # where each row was given a name
        self.mixed: list[tuple[str | None, Tensor]] = []  # where those differ: each name, None for no adapter, its rows

    def introduce(self, name: str) -> None:
        """Make an adapter known; the first one is used from now on.

        Raises: ValueError for a name that is taken, or cannot be part of a parameter's name.
        """
        if name in self.known:
            raise ValueError(f"the model has an adapter {name!r} already: give the second another name")
        if not name or "." in name or hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"an adapter cannot be called {name!r}: give it a name without dots, as 'tuned'")
        self.known.append(name)
        if len(self.known) == 1:
            self.name = name

    def select(self, names: str | Sequence[str | None] | None, device: torch.device) -> None:
        """Use other adapters from now on: one for all rows, or one for each; None is none.

        Raises: ValueError for an adapter the model does not have, or any but a merged one.
        """
        per_row = [names] if names is None or isinstance(names, str) else list(names)
        distinct = list(dict.fromkeys(per_row))
        if unknown := [name for name in distinct if name is not None and name not in self.known]:
            raise ValueError(f"no adapter {', '.join(map(repr, unknown))}: the model has {', '.join(self.known)}")
        if self.merged is not None and distinct != [self.merged]:
            raise ValueError(f"adapter {self.merged!r} is merged into the weights, every row uses it: unmerge_lora it")
        self.num_rows = None if names is None or isinstance(names, str) else len(per_row)
        self.name = distinct[0] if len(distinct) == 1 else None
        self.mixed = []
        if len(distinct) > 1:
            for name in distinct:
                rows = [row for row, other in enumerate(per_row) if other == name]
                self.mixed.append((name, torch.tensor(rows, device=device)))

    def check(self, num_rows: int) -> None:
        """Compare a batch's rows with the choice's.

        Raises: ValueError when adapters were chosen for another number of rows.
        """
        if self.num_rows is not None and self.num_rows != num_rows:
            raise ValueError(
                f"adapters were chosen for {self.num_rows} rows, but {num_rows} came (of text, or images where each "
                "row must have one): give one name per row, or one for all"
            )


class SharedDropout(nn.Module):
    """Dropout for linears that read the same tensor: they share one mask, and what it leaves is kept once.

    Note: PEFT draws a mask for each linear: of a layer it keeps seven masks and seven inputs, here it is four.
    """

    def __init__(self, p: float, num_users: int) -> None:
        super().__init__()
        self.p, self.num_users = p, num_users
        self.num_left = 0
        self.x: Tensor | None = None
        self.dropped: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the first of the users got for the same tensor; the last one takes it away.

        Counted, not a weak reference: under activation checkpointing nothing else holds the tensor, and the first run
        and the recomputation must draw the same masks.
        """
        if not self.training:
            return x
        if self.x is not x or self.dropped is None:
            # This one keeps a mask of one byte a number on CPUs, too, where F.dropout keeps it in x's dtype.
            dropped, _ = torch.native_dropout(x, self.p, True)
            self.x, self.dropped, self.num_left = x, dropped, self.num_users
        dropped = self.dropped
        self.num_left -= 1
        if self.num_left == 0:
            self.x = self.dropped = None
        return dropped


class LoraLinear(nn.Module):
    """A frozen linear layer, of any number of bits, with adapters beside it."""

    def __init__(self, base_layer: nn.Module, choice: AdapterChoice, dropout: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.choice, self.dropout = choice, dropout
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's: others read a model's dtype and device from it."""
        return self.base_layer.get_parameter("weight")

    def add(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Shapes: lora_A (r, I), lora_B (O, r)."""
        self.lora_A[name], self.lora_B[name], self.scaling[name] = nn.Parameter(lora_A), nn.Parameter(lora_B), scaling

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, I) -> (B, T, O).

        Raises: ValueError when adapters were chosen for another number of rows.
        """
        y, choice = self.base_layer(x), self.choice
        choice.check(len(x))
        if choice.merged is not None or (choice.name is None and not choice.mixed):
            return y
        x = self.dropout(x)
        if choice.name in self.scaling:
            return y + self._update(x, choice.name)
        for name, rows in choice.mixed:
            if name in self.scaling:
                y = y.index_add(0, rows, self._update(x[rows], name))
        return y

    def _update(self, x: Tensor, name: str) -> Tensor:
        """Return s B A x, in x's dtype whatever the factors are stored in. Scaled where it is thinnest."""
        low = F.linear(x, self.lora_A[name].to(x.dtype)) * self.scaling[name]  # (B, T, r)
        return F.linear(low, self.lora_B[name].to(x.dtype))


class SwitchedModule(nn.Module):
    """A module of the base with the copies that adapters have trained whole: PEFT's `modules_to_save`."""

    def __init__(self, base_layer: nn.Module, choice: AdapterChoice) -> None:
        super().__init__()
        self.base_layer, self.choice = base_layer, choice
        self.tuned = nn.ModuleDict()
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's, of embeddings or head: others read a model's dtype and device from it."""
        return self.base_layer.get_parameter("weight")

    @property
    def linear_1(self) -> nn.Module:
        """The base's, of a projector: others read its dtype."""
        return self.base_layer.get_submodule("linear_1")

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, ...) -> (B, ...); before the projector each row of the batch is an image.

        Raises: ValueError when rows differ in their adapters, and these were chosen for another number of rows.
        """
        choice = self.choice
        if choice.merged is not None or not choice.mixed:
            return self._find(choice.merged or choice.name)(x)
        choice.check(len(x))
        outputs = torch.cat([self._find(name)(x[rows]) for name, rows in choice.mixed])
        return outputs[torch.cat([rows for _, rows in choice.mixed]).argsort()]

    def _find(self, name: str | None) -> nn.Module:
        return self.base_layer if name is None or name not in self.tuned else self.tuned[name]


def add_lora(model: Llava, settings: LoraSettings) -> None:
    """Put fresh factors, in fp32, beside the linears of the language model's layers, to be trained as "default".

    On the meta device they have no values yet: see `initial_factors`. The rest of the model stays as it is.
    Raises: ValueError when a linear has adapters already.
    """
    choice = AdapterChoice()
    choice.introduce(DEFAULT)
    for index, layer in enumerate(model.language_model.layers):
        for group in _SAME_INPUT:
            names = [name for name in group if name.rpartition(".")[2] in settings.targets]
            dropout = SharedDropout(settings.dropout, len(names)) if settings.dropout else nn.Identity()
            for name in names:
                linear = layer.get_submodule(name)
                if not isinstance(linear, nn.Linear | QuantizedLinear):
                    raise ValueError(f"layer {index}'s {name} is a {type(linear).__name__}: LoRA is added to a base")
                device = next(linear.parameters()).device
                lora_A = torch.empty(settings.rank, linear.in_features, dtype=torch.float32, device=device)
                lora_B = torch.zeros(linear.out_features, settings.rank, dtype=torch.float32, device=device)
                adapted = LoraLinear(linear, choice, dropout)
                adapted.add(DEFAULT, _draw(lora_A, None), lora_B, settings.scaling)
                _replace(layer, name, adapted)


def initial_factors(model: nn.Module, seed: int) -> dict[str, StoredTensor]:
    """Return the start values of all factors by parameter name: A as PEFT draws it, B zero.

    Each is drawn when it is read, from a generator of its own, so that whoever reads which rows gets the same numbers.
    """
    start: dict[str, StoredTensor] = {}
    for layer, linear in _adapted_linears(model).items():
        for adapter in linear.scaling:
            lora_A, lora_B = f"{layer}.lora_A.{adapter}", f"{layer}.lora_B.{adapter}"
            start[lora_A] = _draw_on_demand(lora_A, tuple(linear.lora_A[adapter].shape), seed)
            zeros = torch.zeros(()).expand(linear.lora_B[adapter].shape)  # takes no memory
            start[lora_B] = StoredTensor.wrap(zeros, f"start of {lora_B}")
    return start


def _draw_on_demand(name: str, shape: tuple[int, ...], seed: int) -> StoredTensor:
    def read(rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return _draw(torch.empty(shape), generator)[rows]

    return StoredTensor(shape, torch.float32, f"start of {name}", read)


def _draw(lora_A: Tensor, generator: torch.Generator | None) -> Tensor:
    return nn.init.kaiming_uniform_(lora_A, a=5**0.5, generator=generator)


def attach_adapter(
    model: Llava, adapter: Adapter, dtype: torch.dtype, device: str | torch.device, name: str = DEFAULT
) -> None:
    """Put an adapter beside a model's weights, of any number of bits; they stay as they are.

    What it trained whole becomes a copy beside the base's. The adapter attached first is the one that is used until
    `use_adapters` says otherwise:

        model = load_llava(base)
        attach_adapter(model, load_adapter(folder), dtype, device, name="tuned")
        with use_adapters(model, [None, "tuned"]): ...  # the first row asks the base, the second the tuned model

    Raises: ValueError for a name that is taken, or an adapter that does not fit the model; it is then unchanged.
    """
    whole = split_whole(adapter)
    check_adapter(model, adapter)
    choice = _find_choice(model) or AdapterChoice()
    choice.introduce(name)
    for layer, factors in adapter.factors.items():
        linear = model.get_submodule(layer)
        if not isinstance(linear, LoraLinear):
            linear = LoraLinear(linear, choice, nn.Identity())
            _replace(model, layer, linear)
        lora_A, lora_B = (side.load().to(device, dtype) for side in (factors.lora_A, factors.lora_B))
        linear.add(name, lora_A, lora_B, factors.scaling)
    for part, tensors in whole.items():
        switched = model.get_submodule(part)
        if not isinstance(switched, SwitchedModule):
            switched = SwitchedModule(switched, choice)
            _replace(model, part, switched)
        base = switched.base_layer
        # The copy shares the base's parameters until it is given its own: a vocabulary is not copied for nothing.
        tuned = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        tuned.load_state_dict({key: tensor.load().to(device, dtype) for key, tensor in tensors.items()}, assign=True)
        switched.tuned[name] = tuned


def check_adapter(model: Llava, adapter: Adapter) -> None:
    """Compare an adapter's sizes with the model's. Raises: ValueError that lists all that does not fit."""
    problems = []
    modules = dict(model.named_modules())
    for layer, factors in adapter.factors.items():
        linear = modules.get(layer)
        linear = linear.base_layer if isinstance(linear, LoraLinear) else linear
        fits = (factors.lora_B.shape[0], factors.lora_A.shape[1])
        if not isinstance(linear, nn.Linear | QuantizedLinear):
            problems.append(f"{layer} is no linear layer of the model, the adapter was trained on {fits}")
        elif (shape := (linear.out_features, linear.in_features)) != fits:
            problems.append(f"{layer} is {shape} in the base, the adapter was trained on {fits}")
    for part, tensors in split_whole(adapter).items():
        module = modules[part]
        base = module.base_layer if isinstance(module, SwitchedModule) else module
        wanted = {key: tuple(tensor.shape) for key, tensor in base.state_dict().items()}
        found = {key: tensor.shape for key, tensor in tensors.items()}
        if wanted != found:
            problems.append(f"{part} is {wanted} in the base, {found} in the adapter")
    if problems:
        raise ValueError(
            f"the adapter {adapter.folder} does not fit its base:\n  " + "\n  ".join(problems)
            + "\nlikely cause: it was trained on a base of another size (7B and 13B are not exchangeable)"
        )  # fmt: skip


def has_adapters(model: nn.Module) -> bool:
    """Tell whether there is anything that `use_adapters` could choose."""
    return _find_choice(model) is not None


@contextmanager
def use_adapters(model: nn.Module, names: str | Sequence[str | None] | None) -> Iterator[None]:
    """Run what the block runs through other adapters; afterwards the choice is what it was.

    The choice is the model's: two threads that want different adapters must take turns, or share a batch.

    Args:
        names: one adapter for all rows, None for the base alone, or one of these for each row of the batch. Where rows
            differ, and adapters have projectors of their own, each row has one image.
    Raises: ValueError for an adapter the model does not have, or any but the one that is merged.
    """
    choice = _require_choice(model)
    before = choice.name, choice.num_rows, choice.mixed
    choice.select(names, next(model.parameters()).device)
    try:
        yield
    finally:
        choice.name, choice.num_rows, choice.mixed = before


def merge_lora(model: nn.Module, name: str = DEFAULT) -> None:
    """Add an adapter to the base weights, in fp32: all rows then use it, at no cost.

    Raises: ValueError over quantised weights, while another adapter is merged, or for one the model does not have.
    """
    choice = _require_choice(model)
    if name not in choice.known:
        raise ValueError(f"no adapter {name!r}: the model has {', '.join(choice.known)}")
    if choice.merged is not None:
        raise ValueError(f"adapter {choice.merged!r} is merged already: unmerge_lora it first")
    for layer, linear in _adapted_linears(model).items():
        if name in linear.scaling and not isinstance(linear.base_layer, nn.Linear):
            raise ValueError(
                f"{layer} is a {type(linear.base_layer).__name__}, which cannot take an adapter in: leave it beside, "
                "or load the base with bits=16"
            )
    _add_to_weights(model, name, 1.0)
    choice.merged = name


def unmerge_lora(model: nn.Module, name: str = DEFAULT) -> None:
    """Subtract a merged adapter from the base weights; it stays beside them, switched as it was before.

    Note: weights come back to rounding: in fp32 to 1e-6, but a bf16 keeps 8 bits of every sum, and what an update
        larger than the weight pushed out is gone. A copy of the base would undo it exactly, at twice the memory: who
        needs that loads the base again, or does not merge.
    Raises: ValueError unless this adapter is merged.
    """
    choice = _require_choice(model)
    if choice.merged != name:
        raise ValueError(f"adapter {name!r} is not merged, merged is {choice.merged!r}")
    _add_to_weights(model, name, -1.0)
    choice.merged = None


@torch.no_grad()
def _add_to_weights(model: nn.Module, name: str, sign: float) -> None:
    for linear in _adapted_linears(model).values():
        if name in linear.scaling:
            weight = linear.base_layer.get_parameter("weight")
            # A new tensor: the old one may be a mapped file, or shared with another model.
            weight.data = merge_weight(weight, linear.lora_A[name], linear.lora_B[name], sign * linear.scaling[name])


def _adapted_linears(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _find_choice(model: nn.Module) -> AdapterChoice | None:
    adapted = (module for module in model.modules() if isinstance(module, LoraLinear | SwitchedModule))
    return next((module.choice for module in adapted), None)


def _require_choice(model: nn.Module) -> AdapterChoice:
    choice = _find_choice(model)
    if choice is None:
        raise ValueError("the model has no adapter: attach_adapter or add_lora first")
    return choice


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
