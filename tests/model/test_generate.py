"""Generation: the cache is a shortcut, never another answer; sampling draws from the right tokens.

Shapes: B rows, T tokens, N images, V vocabulary.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.attention import CausalAttention
from model.config import LlavaConfig
from model.generate import KVCache, Sampling, collect, decode, generate, generate_stream, prefill, sample
from model.llama import LlamaConfig
from model.llava import Llava
from model.vision import VisionConfig
from tests.model.small_llava import CONFIG, make_llava, make_pixels, make_prompt, relative_difference

TOLERANCE = 3e-6  # of logits, by the largest: the cache sums over other shapes than the full pass
NO_TOKEN_ID = -1  # as EOS: an answer never ends early
EOS_TOKEN_ID = 9  # of the counting model


@pytest.fixture(scope="module")
def llava() -> Llava:
    return make_llava(seed=1)


@pytest.fixture(scope="module")
def counter() -> Llava:
    """A model that counts, so that answers can be written by hand: after token n the likeliest is n + 1.

    Its layers add nothing, every token's embedding is an axis of its own, and `lm_head` turns each axis by one.
    """
    text = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=20, rms_norm_eps=1e-5, rope_theta=100.0,
    )  # fmt: skip
    vision = VisionConfig(
        image_size=4, patch_size=2, hidden_size=6, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, layer_norm_eps=1e-5, select_layer=-1,
    )  # fmt: skip
    model = Llava(LlavaConfig(vision, text))
    llama = model.language_model
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        llama.embed_tokens.weight.copy_(torch.eye(11, 16))
        llama.lm_head.weight.copy_(torch.eye(11, 16).roll(1, dims=0))
    return model.eval()


def make_cache(num_rows: int, capacity: int) -> KVCache:
    return KVCache(CONFIG.text, num_rows, capacity, torch.float32, torch.device("cpu"))


@torch.inference_mode()
def recompute(model: Llava, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
    """Return all logits (T, V) of one row without a cache."""
    position_ids = torch.arange(len(input_ids))[None]
    return model.language_model.lm_head(model(input_ids[None], position_ids, CausalAttention(), image_features))[0]


def answer_without_cache(model: Llava, prompt: Tensor, pixel_values: Tensor | None, num_tokens: int) -> list[int]:
    """Answer greedily by running the whole text again for every token."""
    features = None if pixel_values is None else model.encode_images(pixel_values)
    for _ in range(num_tokens):
        prompt = torch.cat([prompt, recompute(model, prompt, features)[-1:].argmax(dim=-1)])
    return prompt[-num_tokens:].tolist()


def test_cached_logits_equal_a_full_recompute(llava: Llava) -> None:
    """In pieces of every kind: an image and words, then one token at a time, then several again."""
    input_ids = make_prompt("ttItttttttttt", seed=1)
    features = llava.encode_images(make_pixels(1))
    expected = recompute(llava, input_ids, features)
    cache = make_cache(1, capacity=len(input_ids))
    pieces = input_ids.split([13, 1, 1, 1, 5])
    end = 0
    for piece in pieces:
        logits = prefill(llava, cache, [piece], features if (piece < 0).any() else None)
        end += len(piece)
        assert relative_difference(logits[0], expected[end - 1]) < TOLERANCE
    assert end == len(input_ids)


def test_answers_equal_those_without_cache(llava: Llava) -> None:
    prompt, pixel_values = make_prompt("tIttIt", seed=2), make_pixels(2)
    (answer,) = generate(llava, [prompt], pixel_values, NO_TOKEN_ID, max_new_tokens=30)
    assert answer == answer_without_cache(llava, prompt, pixel_values, 30)
    assert len(set(answer)) > 10  # a model that repeats one token would prove little


def test_batch_of_different_lengths_equals_one_by_one(llava: Llava) -> None:
    """The images go to the rows in reading order, and the padding of the short rows is never seen."""
    prompts = [make_prompt(layout, seed=index) for index, layout in enumerate(["ttttt", "tItIttt", "t", "Itttttttttt"])]
    pixels = [None, make_pixels(2, seed=1), None, make_pixels(1, seed=2)]
    answers = generate(llava, prompts, torch.cat([p for p in pixels if p is not None]), NO_TOKEN_ID, max_new_tokens=24)
    alone = [generate(llava, [p], x, NO_TOKEN_ID, max_new_tokens=24)[0] for p, x in zip(prompts, pixels, strict=True)]
    assert answers == alone


def test_second_piece_of_ragged_rows_continues_each_row(llava: Llava) -> None:
    """Padding that the first piece wrote behind a short row must be overwritten, not attended to."""
    rows = [make_prompt("t" * 12, seed=1), make_prompt("t" * 9, seed=2)]
    cache = make_cache(2, capacity=14)
    prefill(llava, cache, [rows[0][:8], rows[1][:3]])
    logits = prefill(llava, cache, [rows[0][8:], rows[1][3:]])
    for row, row_logits in zip(rows, logits, strict=True):
        assert relative_difference(row_logits, recompute(llava, row, None)[-1]) < TOLERANCE


def test_questions_behind_a_shared_trunk_equal_whole_prompts(llava: Llava) -> None:
    """Two images' trunks run once; two and three questions of different lengths follow them."""
    trunks = [make_prompt("tItt", seed=1), make_prompt("ttttIt", seed=2)]
    questions = [make_prompt("t" * length, seed=length) for length in (4, 2, 7, 3, 1)]
    pixel_values, owners = make_pixels(2), [0, 0, 1, 1, 1]
    whole = [torch.cat([trunks[owner], question]) for owner, question in zip(owners, questions, strict=True)]
    expected = generate(llava, whole, pixel_values[owners], NO_TOKEN_ID, max_new_tokens=20)

    trunk_cache = make_cache(2, capacity=max(map(len, trunks)))
    prefill(llava, trunk_cache, trunks, llava.encode_images(pixel_values))
    kept = trunk_cache.keys.clone()
    cache = trunk_cache.repeat(torch.tensor([2, 3]), capacity=60)
    logits = prefill(llava, cache, questions)
    for row, prompt, owner in zip(logits, whole, owners, strict=True):
        features = llava.encode_images(pixel_values[owner : owner + 1])
        assert relative_difference(row, recompute(llava, prompt, features)[-1]) < TOLERANCE
    assert collect(decode(llava, cache, logits, NO_TOKEN_ID, max_new_tokens=20), NO_TOKEN_ID) == expected
    assert torch.equal(trunk_cache.keys, kept)  # the trunk can serve more questions


def draw(probabilities: Sequence[float], temperature: float, top_p: float, num_draws: int = 20_000) -> Tensor:
    """Return how often each token is drawn, as a share of all draws (V,)."""
    logits = torch.tensor(probabilities).log().expand(num_draws, -1)
    tokens = sample(logits, Sampling(temperature, top_p), torch.Generator().manual_seed(0))
    return tokens.bincount(minlength=len(probabilities)) / num_draws


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1.0, [0.05, 0.5, 0.15, 0.3]),
        (0.96, [0.05, 0.5, 0.15, 0.3]),
        (0.94, [0, 0.5, 0.15, 0.3]),
        (0.81, [0, 0.5, 0.15, 0.3]),
        (0.79, [0, 0.5, 0, 0.3]),
        (0.51, [0, 0.5, 0, 0.3]),
        (0.49, [0, 0.5, 0, 0]),
        (0.01, [0, 0.5, 0, 0]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[float]) -> None:
    """By hand: the mass in front of 0.5, 0.3, 0.15, 0.05 is 0, 0.5, 0.8, 0.95. Tokens are not in that order."""
    shares = draw([0.05, 0.5, 0.15, 0.3], temperature=1.0, top_p=top_p)
    expected = torch.tensor(kept) / sum(kept)
    assert torch.equal(shares > 0, expected > 0)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)  # four standard deviations


def test_top_p_cuts_every_row_by_itself() -> None:
    logits = torch.tensor([[0.9, 0.06, 0.04], [0.04, 0.48, 0.48]]).log().repeat(500, 1)
    tokens = sample(logits, Sampling(temperature=1.0, top_p=0.8), torch.Generator().manual_seed(0)).view(500, 2)
    assert set(tokens[:, 0].tolist()) == {0}
    assert set(tokens[:, 1].tolist()) == {1, 2}


def test_temperature_divides_the_logits() -> None:
    """At 0.5 probabilities are squared before they are normalised: 1 : 9 becomes 1 : 81, 0.25 : 0.75 becomes 1 : 9."""
    shares = draw([0.25, 0.75], temperature=0.5, top_p=1.0)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.9]), atol=0.01, rtol=0)


def test_temperature_0_is_the_likeliest_token() -> None:
    logits = torch.randn(7, 131, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits, Sampling(temperature=0, top_p=0.5), torch.Generator().manual_seed(0))
    assert torch.equal(tokens, logits.argmax(dim=-1))


@pytest.mark.parametrize(
    "values", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_sampling_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="temperature is at least 0, top_p above 0 and at most 1"):
        Sampling(**values)  # type: ignore[arg-type]


def test_seed_decides_the_answer(llava: Llava) -> None:
    prompts = [make_prompt("ttttt", seed=1), make_prompt("ttt", seed=2)]
    first, again, other = (
        generate(llava, prompts, None, NO_TOKEN_ID, max_new_tokens=20, sampling=Sampling(1.0, 0.9, seed))
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    assert first != generate(llava, prompts, None, NO_TOKEN_ID, max_new_tokens=20)


def test_answer_ends_before_eos(counter: Llava) -> None:
    """Rows that have ended yield EOS while others go on; the last row to end ends the stream."""
    prompts = [torch.tensor([2, 5]), torch.tensor([7]), torch.tensor([1, 1, 8])]
    steps = list(generate_stream(counter, prompts, None, EOS_TOKEN_ID, max_new_tokens=12))
    assert [step.tolist() for step in steps] == [[6, 8, 9], [7, 9, 9], [8, 9, 9], [9, 9, 9]]
    assert generate(counter, prompts, None, EOS_TOKEN_ID, max_new_tokens=12) == [[6, 7, 8], [8], []]


def test_answer_without_eos_has_max_new_tokens(counter: Llava) -> None:
    assert generate(counter, [torch.tensor([3]), torch.tensor([7])], None, EOS_TOKEN_ID, 3) == [[4, 5, 6], [8]]
    assert len(list(generate_stream(counter, [torch.tensor([3])], None, EOS_TOKEN_ID, max_new_tokens=1))) == 1


def test_answer_may_fill_the_model_to_its_last_position(counter: Llava) -> None:
    """20 positions: 17 and 3 fit, 17 and 4 do not."""
    prompt = torch.ones(17, dtype=torch.long)
    assert generate(counter, [prompt], None, EOS_TOKEN_ID, max_new_tokens=3) == [[2, 3, 4]]
    message = "a prompt of 17 tokens and an answer of 4 exceed the model's 20 positions: shorten one of them"
    with pytest.raises(ValueError, match=message):
        generate(counter, [prompt[:2], prompt], None, EOS_TOKEN_ID, max_new_tokens=4)


def test_full_cache_says_so(llava: Llava) -> None:
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5: shorten the prompt or answer"):
        prefill(llava, make_cache(2, capacity=5), [make_prompt("ttt", seed=1), make_prompt("t" * 6, seed=2)])
    cache = make_cache(1, capacity=5)
    logits = prefill(llava, cache, [make_prompt("ttt", seed=1)])
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5"):
        list(decode(llava, cache, logits, NO_TOKEN_ID, max_new_tokens=9))


@pytest.mark.parametrize(
    ("layouts", "num_images", "counts"),
    [
        (["tItt", "ttt"], 2, "9 image placeholders for 2 images"),
        (["tItt", "ttI"], 1, "18 image placeholders for 1 images"),
        (["tttt"], 1, "0 image placeholders for 1 images"),
        (["tItt"], 0, "9 image placeholders for 0 images"),
    ],
)
def test_images_must_match_placeholders(llava: Llava, layouts: list[str], num_images: int, counts: str) -> None:
    """Too few features would be an error of `masked_scatter`; too many would go unnoticed."""
    prompts = [make_prompt(layout, seed=1) for layout in layouts]
    pixel_values = make_pixels(num_images) if num_images else None
    message = f"^{counts} of 9 patches each: every image needs exactly one <image> marker$"
    with pytest.raises(ValueError, match=message):
        generate(llava, prompts, pixel_values, NO_TOKEN_ID, max_new_tokens=2)
