"""Sampling: the probabilities are those of Hugging Face's `generate`, to the bit, and draws follow them.

Shapes: B rows, V words of the vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from model.sampling import GREEDY, Sampling, adjust_logits, choose_tokens, make_draws
from tests.model.hugging_face import LLAMA_PREFIXES, copy_to_oracle, make_llama_oracle
from tests.model.small_llava import CONFIG, make_llava, make_prompt

B, V = 3, 97


def make_logits(seed: int, has_ties: bool) -> Tensor:
    """Make logits (B, V), rounded to halves where they shall have ties."""
    logits = 3 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed))
    return (2 * logits).round() / 2 if has_ties else logits


def make_history(seed: int) -> Tensor:
    """Make the ids (B, 40) of prompts and answers; some occur twice."""
    return torch.randint(V, (B, 40), generator=torch.Generator().manual_seed(seed))


def find_seen(input_ids: Tensor, num_words: int) -> Tensor:
    """(B, T) -> (B, V), True for the ids that occur in the row."""
    return torch.zeros(len(input_ids), num_words, dtype=torch.bool).scatter(1, input_ids, True)


def adjust_as_transformers(logits: Tensor, sampling: Sampling, input_ids: Tensor) -> Tensor:
    """Run the processors that `transformers` would choose for these settings, in its order."""
    processors: Any = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        processors.append(hf.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            processors.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(hf.TopPLogitsWarper(sampling.top_p))
    return processors(input_ids, logits)


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3, 0.6])
@pytest.mark.parametrize("temperature", [0.001, 0.3, 1.0, 2.5])
def test_probabilities_are_those_of_transformers(temperature: float, repetition_penalty: float, has_ties: bool) -> None:
    """Every one of them, to the bit."""
    num_cut = 0
    for seed in range(3):
        logits, input_ids = make_logits(seed, has_ties), make_history(seed)
        seen = find_seen(input_ids, V)
        for top_k in (0, 1, 2, 9, V - 1, V, V + 5):
            for top_p in (1e-9, 0.03, 0.5, 0.9, 0.999, 1.0):
                sampling = Sampling(temperature, top_p, top_k=top_k, repetition_penalty=repetition_penalty)
                ours = adjust_logits(logits, sampling, seen).softmax(dim=-1)
                theirs = adjust_as_transformers(logits, sampling, input_ids).softmax(dim=-1)
                assert torch.equal(ours, theirs), sampling
                num_cut += int((ours == 0).any())
    assert num_cut > 50  # most settings left something out


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.7, 0.6])
def test_greedy_logits_are_those_of_transformers(repetition_penalty: float) -> None:
    """Without temperature, neither top-k nor top-p counts, but the penalty does."""
    logits, input_ids = make_logits(1, has_ties=False), make_history(1)
    sampling = Sampling(0.0, top_p=0.5, top_k=1, repetition_penalty=repetition_penalty)
    ours = adjust_logits(logits, sampling, find_seen(input_ids, V))
    assert torch.equal(ours, adjust_as_transformers(logits, sampling, input_ids))


def test_order_of_the_steps_is_that_of_generate() -> None:
    """Here `transformers` chooses its processors itself, and hands out the logits before and behind them."""
    llama = make_llava(seed=1).language_model
    oracle: Any = make_llama_oracle(CONFIG.text)
    copy_to_oracle(llama, oracle, LLAMA_PREFIXES)
    input_ids = torch.stack([make_prompt("ttttttt", seed=1), make_prompt("ttttttt", seed=2)])
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.4)
    output = oracle.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), do_sample=True, temperature=0.7, top_p=0.8, top_k=20,
        repetition_penalty=1.4, max_new_tokens=12, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, output_scores=True,
    )  # fmt: skip
    for index, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        seen = find_seen(output.sequences[:, : 7 + index], CONFIG.text.vocab_size)
        assert torch.equal(adjust_logits(logits, sampling, seen), scores)
    assert index == 11


def test_low_precision_logits_are_adjusted_in_fp32() -> None:
    logits, seen = make_logits(2, has_ties=False).bfloat16(), find_seen(make_history(2), V)
    sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    assert torch.equal(adjust_logits(logits, sampling, seen), adjust_logits(logits.float(), sampling, seen))


def draw(probabilities: Sequence[float], sampling: Sampling, num_draws: int = 20_000) -> Tensor:
    """Return how often each token is drawn, as a share of all draws (V,)."""
    logits = torch.tensor(probabilities).log().expand(num_draws, -1)
    draws = make_draws(sampling, 20, num_draws // 20, torch.device("cpu")).flatten()
    tokens = choose_tokens(logits, sampling, torch.zeros_like(logits, dtype=torch.bool), draws)
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
    shares = draw([0.05, 0.5, 0.15, 0.3], Sampling(temperature=1.0, top_p=top_p))
    expected = torch.tensor(kept) / sum(kept)
    assert torch.equal(shares > 0, expected > 0)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)  # four standard deviations


def test_top_k_keeps_the_likeliest() -> None:
    shares = draw([0.05, 0.5, 0.15, 0.3], Sampling(temperature=1.0, top_k=3))
    torch.testing.assert_close(shares, torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95, atol=0.015, rtol=0)
    assert shares[0] == 0


def test_temperature_divides_the_logits() -> None:
    """At 0.5 probabilities are squared before they are normalised: 1 : 9 becomes 1 : 81, 0.25 : 0.75 becomes 1 : 9."""
    shares = draw([0.25, 0.75], Sampling(temperature=0.5))
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.9]), atol=0.01, rtol=0)


def test_every_row_is_cut_by_itself() -> None:
    logits = torch.tensor([[0.9, 0.06, 0.04], [0.04, 0.48, 0.48]]).log().repeat(500, 1)
    sampling = Sampling(temperature=1.0, top_p=0.8)
    draws = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = choose_tokens(logits, sampling, torch.zeros_like(logits, dtype=torch.bool), draws).view(500, 2)
    assert set(tokens[:, 0].tolist()) == {0}
    assert set(tokens[:, 1].tolist()) == {1, 2}


def test_no_draw_gives_an_impossible_token() -> None:
    """The smallest and the largest draw, with impossible tokens at both ends and between."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens = choose_tokens(logits, Sampling(temperature=1.0), torch.zeros_like(logits, dtype=torch.bool), draws)
    assert tokens.tolist() == [1, 3]


def test_temperature_0_is_the_likeliest_token() -> None:
    logits = make_logits(0, has_ties=False)
    draws = torch.rand(B, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = choose_tokens(logits, GREEDY, torch.zeros_like(logits, dtype=torch.bool), draws)
    assert torch.equal(tokens, logits.argmax(dim=-1))


def test_draws_of_a_row_do_not_depend_on_the_batch() -> None:
    """Nor on how many steps there may be: a longer answer begins as the shorter one."""
    cpu = torch.device("cpu")
    draws = make_draws(Sampling(seed=7), num_rows=4, num_steps=37, device=cpu)
    for row in range(4):
        assert torch.equal(draws[:11, row : row + 1], make_draws(Sampling(seed=7 + row), 1, 11, cpu))
    assert len(draws.unique()) == draws.numel()
    first = make_draws(Sampling(), num_rows=2000, num_steps=1, device=cpu).flatten().sort().values
    expected = (torch.arange(2000) + 0.5) / 2000
    assert (first - expected).abs().max() < 0.036  # Kolmogorov-Smirnov at 1 %: neighbouring seeds are independent


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1, expected 0 .* or at least 0.001"),
        ({"temperature": 1e-4}, "temperature = 0.0001, expected 0 .* or at least 0.001"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"seed": -1}, r"seed = -1, expected at least 0 and below 2\*\*62"),
        ({"top_k": -1}, "top_k = -1, expected at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0, expected above 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty = nan"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf"),
    ],
)
def test_impossible_sampling_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampling(**values)
