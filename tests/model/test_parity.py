"""Every component computes what Hugging Face's does: fp32, random weights, sizes that differ pairwise.

A difference is max|ours - theirs| / max|theirs|. The tolerances are some four times what is measured on CPUs.

Shapes: B rows, T tokens, N images, P patches per image, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration

from model.attention import CausalAttention, PackedAttention
from model.config import VIT_L_14_336
from model.generate import generate
from model.llama import Llama
from model.llava import Llava
from model.vision import VisionTower
from tests.model.hugging_face import (
    LLAMA_PREFIXES,
    LLAVA_PREFIXES,
    VISION_PREFIXES,
    answer_greedily,
    copy_from_oracle,
    copy_to_oracle,
    make_llama_oracle,
    make_llava_oracle,
    make_vision_oracle,
    match_names,
    to_hf_ids,
)
from tests.model.small_llava import (
    CONFIG,
    make_llava,
    make_pixels,
    make_prompt,
    randomize_weights,
    read_gradients,
    relative_difference,
)

TOLERANCE = 3e-6
GRADIENT_TOLERANCE = 5e-6
IGNORE_INDEX = -100
NO_TOKEN_ID = -1  # as EOS: an answer never ends early

Pair = tuple[Llava, LlavaForConditionalGeneration]

# Rows of a batch ("t" a word, "I" an image). One case for each thing that can be put in the wrong place.
LAYOUTS = {
    "text only": ["ttttttt", "ttttttt"],
    "one image": ["ttItttt"],
    "two images in one row": ["tIttttItt"],
    "image last": ["ttttI"],
    "rows of different lengths": ["tttItIttttt", "tttt", "Ittttt", "tttttttttttttttt"],
}


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Our small model and Hugging Face's, with the same weights."""
    model, oracle = make_llava(seed=7), make_llava_oracle(CONFIG)
    copy_to_oracle(model, oracle, LLAVA_PREFIXES)
    return model, oracle


def make_batch(layouts: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return input_ids (B, T) padded on the right, which of them are tokens (B, T), and the images' pixels."""
    rows = [make_prompt(layout, seed=10 + index) for index, layout in enumerate(layouts)]
    is_token = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    num_images = "".join(layouts).count("I")
    pixel_values = make_pixels(num_images, seed=2) if num_images else None
    return pad_sequence(rows, batch_first=True), is_token, pixel_values


def make_labels(input_ids: Tensor, is_token: Tensor) -> Tensor:
    """Supervise two of three words, never a placeholder or padding, so that a shifted label changes the loss."""
    is_supervised = torch.arange(input_ids.shape[1]) % 3 != 0
    return input_ids.masked_fill(~(is_supervised & is_token & (input_ids >= 0)), IGNORE_INDEX)


def run_ours(model: Llava, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
    """Return logits (B, T, V)."""
    position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    features = None if pixel_values is None else model.encode_images(pixel_values)
    return model.language_model.lm_head(model(input_ids, position_ids, CausalAttention(), features))


def test_weights_survive_the_way_to_hugging_face_and_back() -> None:
    """The table of prefixes is one to one: otherwise the tests below could compare a model with itself."""
    oracle, model, second_oracle = make_llava_oracle(CONFIG), make_llava(seed=3), make_llava_oracle(CONFIG)
    randomize_weights(oracle, seed=4)
    copy_from_oracle(oracle, model, LLAVA_PREFIXES)
    copy_to_oracle(model, second_oracle, LLAVA_PREFIXES)
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(second_oracle.state_dict()[name], tensor), name


@pytest.mark.parametrize("select_layer", [-1, -2, -3, -4])
def test_vision_features_agree(select_layer: int) -> None:
    """`select_layer` counts as Hugging Face's list of hidden states does; -4 is what enters the first layer."""
    tower = VisionTower(replace(CONFIG.vision, select_layer=select_layer))
    randomize_weights(tower, seed=4)
    oracle = make_vision_oracle(CONFIG.vision)
    copy_to_oracle(tower, oracle, VISION_PREFIXES)
    pixel_values = make_pixels(3)
    with torch.no_grad():
        theirs = oracle(pixel_values, output_hidden_states=True).hidden_states[select_layer][:, 1:]
        assert relative_difference(tower(pixel_values), theirs) < TOLERANCE


def test_layers_that_llava_does_not_run_agree(pair: Pair) -> None:
    """They are part of CLIP's checkpoints, so a model that is written again must still hold them rightly."""
    model, oracle = pair
    pixel_values = make_pixels(3)
    with torch.no_grad():
        theirs = oracle.model.vision_tower(pixel_values).pooler_output
        tower = model.vision_tower
        class_token = tower.encode(pixel_values, tower.config.num_hidden_layers)[:, 0]
        assert relative_difference(tower.post_layernorm(class_token), theirs) < TOLERANCE


def test_full_size_vision_tower_agrees() -> None:
    """The sizes of the real tower: 577 tokens and 24 layers, where rounding adds up."""
    with torch.device("meta"):
        tower = VisionTower(VIT_L_14_336)
    tower.to_empty(device="cpu")
    randomize_weights(tower, seed=5)
    oracle = make_vision_oracle(VIT_L_14_336)
    copy_to_oracle(tower, oracle, VISION_PREFIXES)
    pixel_values = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        theirs = oracle(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert relative_difference(tower(pixel_values), theirs) < TOLERANCE


def test_projector_agrees(pair: Pair) -> None:
    model, oracle = pair
    features = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        theirs = oracle.model.multi_modal_projector(features)
        assert relative_difference(model.projector(features), theirs) < TOLERANCE


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_llama_logits_agree(num_key_value_heads: int) -> None:
    """Which query heads share which key head: 1 is multi-query, 2 grouped, 4 plain attention."""
    config = replace(CONFIG.text, num_key_value_heads=num_key_value_heads)
    model, oracle = Llama(config), make_llama_oracle(config)
    randomize_weights(model, seed=8)
    copy_to_oracle(model, oracle, LLAMA_PREFIXES)
    input_ids = torch.stack([make_prompt("t" * 23, seed=9), make_prompt("t" * 23, seed=10)])
    position_ids = torch.arange(23).expand_as(input_ids)
    with torch.no_grad():
        ours = model.lm_head(model(model.embed_tokens(input_ids), position_ids, CausalAttention()))
        assert relative_difference(ours, oracle(input_ids).logits) < TOLERANCE


def test_packed_llama_agrees() -> None:
    """Hugging Face reads a row's positions as borders: where they restart, a document starts."""
    model, oracle = Llama(CONFIG.text), make_llama_oracle(CONFIG.text)
    randomize_weights(model, seed=8)
    copy_to_oracle(model, oracle, LLAMA_PREFIXES)
    input_ids = make_prompt("t" * 16, seed=11)[None]
    position_ids = torch.cat([torch.arange(length) for length in (5, 8, 3)])[None]
    attend = PackedAttention([0, 5, 13, 16])
    with torch.no_grad():
        ours = model.lm_head(model(model.embed_tokens(input_ids), position_ids, attend))
        theirs = oracle(input_ids, position_ids=position_ids, use_cache=False).logits
        assert relative_difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_llava_logits_agree(pair: Pair, layouts: list[str]) -> None:
    model, oracle = pair
    input_ids, is_token, pixel_values = make_batch(layouts)
    with torch.no_grad():
        ours = run_ours(model, input_ids, pixel_values)
        theirs = oracle(to_hf_ids(input_ids), pixel_values, attention_mask=is_token.long()).logits
    assert relative_difference(ours[is_token], theirs[is_token]) < TOLERANCE


def test_loss_and_every_gradient_agree(pair: Pair) -> None:
    """The tower is not frozen here, so its gradients are compared too."""
    model, oracle = pair
    input_ids, is_token, pixel_values = make_batch(LAYOUTS["rows of different lengths"])
    labels = make_labels(input_ids, is_token)
    model.zero_grad()
    oracle.zero_grad()
    logits = run_ours(model, input_ids, pixel_values)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    hf_ids = to_hf_ids(input_ids)
    hf_loss = oracle(hf_ids, pixel_values, attention_mask=is_token.long(), labels=labels).loss
    hf_loss.backward()
    assert relative_difference(loss, hf_loss) < TOLERANCE

    names = match_names(model, oracle, LLAVA_PREFIXES)
    ours = read_gradients(model)
    theirs = {names[hf_name]: gradient for hf_name, gradient in read_gradients(oracle).items()}
    unused = ("vision_tower.layers.2.", "vision_tower.post_layernorm.")  # behind the layer whose output is read
    assert set(ours) == set(theirs) == {name for name in model.state_dict() if not name.startswith(unused)}
    # A bias on all keys shifts a query's scores alike, which softmax does not see: the gradient of k_proj.bias is
    # rounding noise around 0, and is measured by the size of q_proj.bias's.
    differences = {
        name: (ours[name] - theirs[name]).abs().max() / theirs[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        for name in ours
    }
    assert not {name: float(value) for name, value in differences.items() if value > GRADIENT_TOLERANCE}


@pytest.mark.parametrize("layouts", [["tttttt"], ["ttIttt"], LAYOUTS["rows of different lengths"]])
def test_greedy_answers_agree(pair: Pair, layouts: list[str]) -> None:
    """64 tokens, token for token; rows of different lengths are padded left over there, right over here.

    The best two logits are never closer than 6e-4 of the largest, hundreds of times the tolerance: no tie decides.
    """
    model, oracle = pair
    prompts = [make_prompt(layout, seed=20 + index) for index, layout in enumerate(layouts)]
    num_images = "".join(layouts).count("I")
    pixel_values = make_pixels(num_images) if num_images else None
    ours = generate(model, prompts, pixel_values, eos_token_id=NO_TOKEN_ID, max_new_tokens=64)
    assert ours == answer_greedily(oracle, prompts, pixel_values, max_new_tokens=64)
