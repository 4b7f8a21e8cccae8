"""Looking inside changes nothing, and shows what other implementations show.

Shapes: T tokens, A tokens of the answer, L layers, H heads, P patches, V vocabulary.
"""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import inside as inside_module
from model.adapter_files import LoraSettings
from model.attention import Attend, CausalAttention
from model.generate import generate
from model.inside import look_inside
from model.llava import Llava
from model.lora import add_lora, use_adapters
from model.quantize import quantize_linears
from tests.model.hugging_face import LLAVA_PREFIXES, copy_to_oracle, make_llava_oracle, to_hf_ids
from tests.model.small_llava import CONFIG, make_pixels, make_prompt, randomize_weights

# Three layers of 4 heads, 9 patches and an answer of 5 tokens: no two are equal.
NUM_LAYERS, NUM_HEADS, NUM_PATCHES, NUM_ANSWER = 3, 4, 9, 5
NO_TOKEN_ID = -1  # as EOS: an answer never ends early


@pytest.fixture
def llava() -> Llava:
    model = Llava(replace(CONFIG, text=replace(CONFIG.text, num_hidden_layers=NUM_LAYERS, num_padding_rows=1)))
    randomize_weights(model, seed=4)
    return model.eval()


def answer(model: Llava, layout: str = "ttItt") -> tuple[Tensor, Tensor | None]:
    """Return a prompt with the model's own answer (T,), and the picture."""
    prompt = make_prompt(layout, seed=2)
    pixels = make_pixels(1) if "I" in layout else None
    (tokens,) = generate(model, [prompt], pixels, NO_TOKEN_ID, NUM_ANSWER)
    return torch.cat([prompt, torch.tensor(tokens)]), pixels


@torch.no_grad()
def run_plain(model: Llava, input_ids: Tensor, pixels: Tensor | None) -> Tensor:
    """Return the logits that chose the answer's tokens (A, V), without any recording."""
    features = None if pixels is None else model.encode_images(pixels)
    hidden_states = model(input_ids[None], torch.arange(len(input_ids))[None], CausalAttention(), features)
    return model.language_model.lm_head(hidden_states[0, -NUM_ANSWER - 1 : -1])[:, : model.config.text.num_words]


@pytest.mark.parametrize("layout", ["ttItt", "Ittt", "tttt"])
def test_it_sees_the_model_that_answered(llava: Llava, layout: str) -> None:
    """Each token of a greedy answer is the likeliest one, and probabilities are those of the plain path."""
    input_ids, pixels = answer(llava, layout)
    inside = look_inside(llava, input_ids, pixels, NUM_ANSWER)
    expected = run_plain(llava, input_ids, pixels).softmax(-1)
    assert inside.chosen_ids.tolist() == input_ids[-NUM_ANSWER:].tolist() == inside.candidate_ids[:, 0].tolist()
    assert inside.chosen_ranks.tolist() == [1] * NUM_ANSWER
    torch.testing.assert_close(inside.candidate_probabilities, expected.sort(-1, descending=True).values[:, :10])
    assert torch.equal(inside.chosen_probabilities, inside.candidate_probabilities[:, 0])
    num_patches = NUM_PATCHES if "I" in layout else 0
    assert inside.attention.shape == (NUM_ANSWER, NUM_LAYERS, NUM_HEADS, num_patches)
    assert inside.picture_share.shape == (NUM_ANSWER, NUM_LAYERS, NUM_HEADS)
    torch.testing.assert_close(inside.attention.float().sum(-1), inside.picture_share, rtol=0, atol=1e-3)
    assert bool(inside.picture_share.any()) == bool(num_patches)


def test_hidden_states_are_the_plain_ones(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: what is recorded is not what the model computes with."""
    input_ids, pixels = answer(llava)
    seen = []

    def remember(model: Llava, ids: Tensor, position_ids: Tensor, attend: Attend, features: Tensor | None) -> Tensor:
        seen.append(Llava.forward(model, ids, position_ids, attend, features))
        seen.append(Llava.forward(model, ids, position_ids, CausalAttention(), features))
        return seen[0]

    monkeypatch.setattr(llava, "forward", remember.__get__(llava))
    look_inside(llava, input_ids, pixels, NUM_ANSWER)
    assert torch.equal(*seen)


def test_weights_are_those_of_hugging_face(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eager attention writes the whole table down, (T, T) for every layer and head."""
    in_fp32 = functools.partial(inside_module.RecordingAttention, dtype=torch.float32)
    monkeypatch.setattr(inside_module, "RecordingAttention", in_fp32)
    input_ids, pixels = answer(llava)
    inside = look_inside(llava, input_ids, pixels, NUM_ANSWER)
    oracle = make_llava_oracle(llava.config)
    copy_to_oracle(llava, oracle, LLAVA_PREFIXES)
    with torch.no_grad():
        out = oracle(to_hf_ids(input_ids)[None], pixel_values=pixels, output_attentions=True)
    asking = torch.arange(len(input_ids) - NUM_ANSWER - 1, len(input_ids) - 1)
    patches = (input_ids < 0).nonzero()[:, 0]
    expected = torch.stack([table[0][:, asking][:, :, patches] for table in out.attentions])  # (L, H, A, P)
    torch.testing.assert_close(inside.attention, expected.permute(2, 0, 1, 3), rtol=0, atol=1e-5)


def test_a_long_answer_is_looked_at_from_its_beginning(llava: Llava) -> None:
    input_ids, pixels = answer(llava)
    whole, first = (look_inside(llava, input_ids, pixels, NUM_ANSWER, max_tokens=n) for n in (64, 2))
    for name, value in vars(first).items():
        expected = getattr(whole, name)
        torch.testing.assert_close(value, expected if name == "patch_similarity" else expected[:2])


def test_an_answer_that_the_model_did_not_give(llava: Llava) -> None:
    """Ranks and probabilities are those of the answer's words, however unlikely."""
    input_ids, pixels = answer(llava)
    input_ids[-2] = int(run_plain(llava, input_ids, pixels)[-2].argsort(descending=True)[6])
    inside = look_inside(llava, input_ids, pixels, NUM_ANSWER, num_candidates=7)
    assert inside.chosen_ranks[:-1].tolist() == [1, 1, 1, 7]
    assert inside.candidate_ids.shape == (NUM_ANSWER, 7)
    assert inside.candidate_ids[-2, -1] == input_ids[-2]
    assert inside.candidate_probabilities[-2, -1] == inside.chosen_probabilities[-2]


def test_patches_are_compared_as_the_tower_hands_them_on(llava: Llava) -> None:
    input_ids, pixels = answer(llava)
    inside = look_inside(llava, input_ids, pixels, NUM_ANSWER)
    with torch.no_grad():
        features = llava.vision_tower(pixels)[0]
    expected = F.cosine_similarity(features[:, None], features[None], dim=-1)
    torch.testing.assert_close(inside.patch_similarity.float(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_models_are_looked_into(llava: Llava, bits: int, dtype: torch.dtype) -> None:
    quantize_linears(llava.to(dtype), bits)
    input_ids, pixels = answer(llava)
    inside = look_inside(llava, input_ids, pixels, NUM_ANSWER)
    assert inside.attention.shape == (NUM_ANSWER, NUM_LAYERS, NUM_HEADS, NUM_PATCHES)
    assert inside.candidate_probabilities.dtype == torch.float32
    expected = run_plain(llava, input_ids, pixels).float().softmax(-1)
    torch.testing.assert_close(inside.candidate_probabilities[:, 0], expected.amax(-1))


def test_the_chosen_adapter_is_looked_into(llava: Llava) -> None:
    input_ids, pixels = answer(llava)
    base = look_inside(llava, input_ids, pixels, NUM_ANSWER)
    add_lora(llava, LoraSettings(rank=3, alpha=5))
    for name, parameter in llava.named_parameters():
        if "lora_B" in name:  # which is zero at first
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(6))
    tuned = look_inside(llava, input_ids, pixels, NUM_ANSWER)
    with use_adapters(llava, None):
        again = look_inside(llava, input_ids, pixels, NUM_ANSWER)
    assert torch.equal(again.attention, base.attention)
    assert not torch.equal(tuned.attention, base.attention)


@pytest.mark.parametrize(
    ("num_answer", "num_pictures", "layout", "message"),
    [
        (0, 1, "ttItt", "an answer of 0 tokens"),
        (13, 1, "ttItt", "an answer of 13 tokens in 13"),
        (9, 1, "ttItt", "the answer holds image placeholders"),
        (2, 2, "ttItItt", "2 pictures, expected one"),
        (2, 0, "ttItt", "9 image placeholders for 0 images"),
        (2, 1, "tttt", "0 image placeholders for 1 images"),
        (2, 0, "t" * 163, "162 tokens exceed the model's 160 positions"),
    ],
)
def test_mistakes(llava: Llava, num_answer: int, num_pictures: int, layout: str, message: str) -> None:
    pixels = make_pixels(num_pictures) if num_pictures else None
    with pytest.raises(ValueError, match=message):
        look_inside(llava, make_prompt(layout, seed=1), pixels, num_answer)
