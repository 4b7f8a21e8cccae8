"""Generation: cache, batch and compiler are shortcuts, never another answer; answers end where they should.

Shapes: B rows, T tokens, N images, V vocabulary.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import model.generate
from model.attention import CausalAttention
from model.config import LlavaConfig
from model.generate import (
    BRANCH_SLOTS,
    BranchedCache,
    KVCache,
    compile_step,
    decode,
    extend_branches,
    generate,
    generate_stream,
    prefill,
    prefill_trunks,
    step,
)
from model.llama import LlamaConfig
from model.llava import Llava
from model.sampling import Sampling, adjust_logits
from model.vision import VisionConfig
from tests.model.hugging_face import LLAMA_PREFIXES, copy_to_oracle, make_llama_oracle
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


@torch.inference_mode()
def recompute(model: Llava, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
    """Return all logits (T, V) of one row without a cache."""
    position_ids = torch.arange(len(input_ids))[None]
    return model.language_model.lm_head(model(input_ids[None], position_ids, CausalAttention(), image_features))[0]


def answer_without_cache(
    model: Llava, prompt: Tensor, pixel_values: Tensor | None, num_tokens: int, repetition_penalty: float = 1.0
) -> list[int]:
    """Answer greedily by running the whole text again for every token."""
    features = None if pixel_values is None else model.encode_images(pixel_values)
    for _ in range(num_tokens):
        logits = recompute(model, prompt, features)[-1:]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, prompt[prompt >= 0]] = True
        logits = adjust_logits(logits, Sampling(repetition_penalty=repetition_penalty), seen)
        prompt = torch.cat([prompt, logits.argmax(dim=-1)])
    return prompt[-num_tokens:].tolist()


def test_cached_logits_equal_a_full_recompute(llava: Llava) -> None:
    """In pieces of every kind: an image and words, then one token at a time, then several again."""
    input_ids = make_prompt("ttItttttttttt", seed=1)
    features = llava.encode_images(make_pixels(1))
    expected = recompute(llava, input_ids, features)
    cache = KVCache(llava.language_model, 1, capacity=len(input_ids))
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


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=1.0, top_p=0.9, seed=5),
        Sampling(temperature=1.3, seed=6, top_k=20, repetition_penalty=1.2),
    ],
)
def test_batch_of_different_lengths_equals_one_by_one(llava: Llava, sampling: Sampling) -> None:
    """The images go to the rows in reading order, and the padding of the short rows is never seen.

    Row i draws with seed + i, so what it draws does not depend on the others.
    """
    prompts = [make_prompt(layout, seed=index) for index, layout in enumerate(["ttttt", "tItIttt", "t", "Itttttttttt"])]
    pixels = [None, make_pixels(2, seed=1), None, make_pixels(1, seed=2)]
    all_pixels = torch.cat([x for x in pixels if x is not None])
    answers = generate(llava, prompts, all_pixels, NO_TOKEN_ID, 24, sampling)
    for row, (prompt, x, answer) in enumerate(zip(prompts, pixels, answers, strict=True)):
        alone = dataclasses.replace(sampling, seed=sampling.seed + row)
        assert generate(llava, [prompt], x, NO_TOKEN_ID, 24, alone) == [answer]
    assert generate(llava, prompts[:2], pixels[1], NO_TOKEN_ID, 24, sampling) == answers[:2]


def test_rows_of_one_length_equal_a_full_recompute(llava: Llava) -> None:
    """They take the way without mask and index."""
    rows = [make_prompt("t" * 9, seed=seed) for seed in range(3)]
    cache = KVCache(llava.language_model, 3, capacity=12)
    prefill(llava, cache, [row[:6] for row in rows])
    for end in (7, 8, 9):
        logits = prefill(llava, cache, [row[end - 1 : end] for row in rows])
        for row, row_logits in zip(rows, logits, strict=True):
            assert relative_difference(row_logits, recompute(llava, row[:end], None)[-1]) < TOLERANCE


def test_rows_that_come_to_one_length_do_not_see_padding(llava: Llava) -> None:
    """8 + 2 and 3 + 7 tokens: the second piece of the first row left 5 slots of padding behind the tenth."""
    rows = [make_prompt("t" * 11, seed=seed) for seed in (1, 2)]
    cache = KVCache(llava.language_model, 2, capacity=15)
    prefill(llava, cache, [rows[0][:8], rows[1][:3]])
    prefill(llava, cache, [rows[0][8:10], rows[1][3:10]])
    logits = prefill(llava, cache, [row[10:] for row in rows])
    for row, row_logits in zip(rows, logits, strict=True):
        assert relative_difference(row_logits, recompute(llava, row, None)[-1]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_cache_equals_a_full_recompute(dtype: torch.dtype) -> None:
    model = make_llava(seed=1).to(dtype)
    input_ids = make_prompt("ttItttttttttt", seed=1)
    features = model.encode_images(make_pixels(1))
    cache = KVCache(model.language_model, 1, capacity=len(input_ids))
    prefill(model, cache, [input_ids[:-1]], features)
    logits = prefill(model, cache, [input_ids[-1:]])
    assert logits.dtype == dtype
    assert relative_difference(logits[0], recompute(model, input_ids, features)[-1]) < 4 * torch.finfo(dtype).eps


def test_repetition_penalty_counts_words_of_prompt_and_answer(llava: Llava) -> None:
    """Not the image placeholders: those are no words."""
    prompt, pixel_values = make_prompt("tttItt", seed=2), make_pixels(1)
    sampling = Sampling(repetition_penalty=3.0)
    (answer,) = generate(llava, [prompt], pixel_values, NO_TOKEN_ID, 30, sampling)
    assert answer == answer_without_cache(llava, prompt, pixel_values, 30, repetition_penalty=3.0)
    assert answer != answer_without_cache(llava, prompt, pixel_values, 30)


def test_repetition_penalty_answers_as_transformers(llava: Llava) -> None:
    oracle: Any = make_llama_oracle(CONFIG.text)
    copy_to_oracle(llava.language_model, oracle, LLAMA_PREFIXES)
    prompt = make_prompt("t" * 10, seed=3)
    expected = oracle.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False, repetition_penalty=2.0,
        max_new_tokens=40, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert generate(llava, [prompt], None, NO_TOKEN_ID, 40, Sampling(repetition_penalty=2.0)) == [
        expected[0, 10:].tolist()
    ]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=5.0)])
def test_rows_that_pad_the_vocabulary_are_never_answered(sampling: Sampling) -> None:
    """The last 40 of 131 rows have no word. Here they are the likeliest by far."""
    model = Llava(dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_padding_rows=40))).eval()
    unpadded = make_llava(seed=1)
    model.load_state_dict(unpadded.state_dict())
    with torch.no_grad():
        model.language_model.lm_head.weight[91:] *= 20
    prompts = [make_prompt("tttt", seed=1) % 91, make_prompt("tt", seed=2) % 91]
    answers = generate(model, prompts, None, NO_TOKEN_ID, 30, sampling)
    assert max(map(max, answers)) < 91
    assert max(map(max, generate(unpadded, prompts, None, NO_TOKEN_ID, 30, sampling))) >= 91


def test_second_piece_of_ragged_rows_continues_each_row(llava: Llava) -> None:
    """Padding that the first piece wrote behind a short row must be overwritten, not attended to."""
    rows = [make_prompt("t" * 12, seed=1), make_prompt("t" * 9, seed=2)]
    cache = KVCache(llava.language_model, 2, capacity=14)
    prefill(llava, cache, [rows[0][:8], rows[1][:3]])
    logits = prefill(llava, cache, [rows[0][8:], rows[1][3:]])
    for row, row_logits in zip(rows, logits, strict=True):
        assert relative_difference(row_logits, recompute(llava, row, None)[-1]) < TOLERANCE


def test_branches_of_shared_trunks_equal_whole_prompts(llava: Llava) -> None:
    """Trunks 2 and 0 of three are filled, and branches of different lengths grow on them, not all in the same step.

    Branch 1 ends, and another one takes its row, longer than what the cache had room for.
    """
    trunk, pixel_values = make_prompt("tItt", seed=1), make_pixels(2)
    rows = {5: (0, 4), 1: (1, 2), 4: (0, 7), 0: (1, 3)}  # row: (picture, length); rows 4 and 5 are trunk 2's
    branches = {row: make_prompt("t" * length, seed=length) for row, (_, length) in rows.items()}
    cache = BranchedCache(llava.language_model, num_trunks=3, num_branches=2, trunk_length=len(trunk))
    prefill_trunks(llava, cache, [2, 0], trunk, llava.encode_images(pixel_values))
    kept = [keys.clone() for keys in cache.trunk_keys]
    assert [keys.shape for keys in kept] == [(3, 2, len(trunk), 12)] * 2  # however many branches there are

    def check(logits: Tensor, asked: list[int]) -> list[list[int]]:
        for row, row_logits in zip(asked, logits, strict=True):
            picture = rows[row][0]
            features = llava.encode_images(pixel_values[picture : picture + 1])
            expected = recompute(llava, torch.cat([trunk, branches[row]]), features)[-1]
            assert relative_difference(row_logits, expected) < TOLERANCE
        for row, token in zip(asked, logits.argmax(dim=-1), strict=True):
            branches[row] = torch.cat([branches[row], token[None]])
        return [branches[row][-1:].tolist() for row in asked]

    last = check(extend_branches(llava, cache, [5, 1], [branches[row].tolist() for row in (5, 1)]), [5, 1])
    new = [branches[row].tolist() for row in (4, 0)]
    last = check(extend_branches(llava, cache, [4, 0, 5, 1], [*new, *last]), [4, 0, 5, 1])
    last = check(extend_branches(llava, cache, [4, 5], [last[0], last[2]]), [4, 5])  # trunk 0's are left alone
    branches[1], cache.lengths[1] = make_prompt("t" * (BRANCH_SLOTS + 9), seed=8), 0
    new = [branches[1].tolist()]
    check(extend_branches(llava, cache, [1, 4, 5], [*new, *last]), [1, 4, 5])
    assert cache.lengths == [3, BRANCH_SLOTS + 9, 0, 0, 9, 7]
    for keys, kept_keys in zip(cache.trunk_keys, kept, strict=True):
        assert torch.equal(keys, kept_keys)


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


def test_row_may_end_before_eos(counter: Llava) -> None:
    """As where its text has come to a stop string: the token that ended it stays, and each row is asked by itself."""
    asked: list[list[int]] = []

    def has_ended(answer: list[int]) -> bool:
        asked.append(list(answer))
        return answer[-1] in (4, 8)

    prompts = [torch.tensor([2]), torch.tensor([5]), torch.tensor([7])]
    answers = generate(counter, prompts, None, EOS_TOKEN_ID, max_new_tokens=12, has_ended=has_ended)
    assert answers == [[3, 4], [6, 7, 8], [8]]
    assert asked == [[3], [6], [8], [3, 4], [6, 7], [6, 7, 8]]


def test_reader_may_stop_reading(counter: Llava) -> None:
    read = []
    for tokens in generate_stream(counter, [torch.tensor([1])], None, EOS_TOKEN_ID, max_new_tokens=9):
        read.append(int(tokens))
        if read[-1] == 4:
            break
    assert read == [2, 3, 4]


def test_answer_may_fill_the_model_to_its_last_position(counter: Llava) -> None:
    """20 positions: 17 and 3 fit, 17 and 4 do not."""
    prompt = torch.ones(17, dtype=torch.long)
    assert generate(counter, [prompt], None, EOS_TOKEN_ID, max_new_tokens=3) == [[2, 3, 4]]
    message = "a prompt of 17 tokens and an answer of 4 exceed the model's 20 positions: shorten one of them"
    with pytest.raises(ValueError, match=message):
        generate(counter, [prompt[:2], prompt], None, EOS_TOKEN_ID, max_new_tokens=4)


def test_full_cache_says_so(llava: Llava) -> None:
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5: shorten the prompt or answer"):
        prefill(
            llava,
            KVCache(llava.language_model, 2, capacity=5),
            [make_prompt("ttt", seed=1), make_prompt("t" * 6, seed=2)],
        )
    cache = KVCache(llava.language_model, 1, capacity=5)
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


@pytest.fixture
def fresh_compiler() -> Any:
    """Forget what was compiled, and that it failed."""
    torch._dynamo.reset()
    compile_step.cache_clear()
    yield
    torch._dynamo.reset()
    compile_step.cache_clear()


def test_compiled_steps_look_at_few_numbers_of_slots(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph is recorded for each."""
    monkeypatch.setattr(model.generate, "COMPILED_SLOTS", 4)
    cache = KVCache(llava.language_model, 1, capacity=10)
    prefill(llava, cache, [make_prompt("ttt", seed=1)])
    one = torch.ones(1, dtype=torch.long)
    assert [cache.advance(one, 1, fixed_shapes=True).num_slots for _ in range(7)] == [4, 8, 8, 8, 8, 10, 10]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_answers_are_the_same(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is compiled twice: not for another token, more slots, another number of rows or another cache."""
    monkeypatch.setattr(model.generate, "COMPILED_SLOTS", 8)
    torch._dynamo.utils.counters.clear()
    for layouts, max_new_tokens in [(["ttt", "tItt"], 30), (["t" * 12, "tt", "ttttt"], 50), (["tttt", "tttt"], 20)]:
        prompts = [make_prompt(layout, seed=index) for index, layout in enumerate(layouts)]
        pixel_values = make_pixels(1) if "I" in "".join(layouts) else None
        for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2)):
            run = functools.partial(generate, llava, prompts, pixel_values, NO_TOKEN_ID, max_new_tokens, sampling)
            assert run(compile=True) == run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("fresh_compiler")
def test_failed_compilation_says_so_once_and_goes_on(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even when the step had been running for a while: what it stored is stored again."""
    num_calls = 0

    def fail_at_third_step(*args: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        logits = step(*args)
        if num_calls == 3:
            raise RuntimeError("no compiler found\nand many more lines")
        return logits

    def compile_badly(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        assert function is step
        return fail_at_third_step

    monkeypatch.setattr(torch, "compile", compile_badly)
    prompts = [make_prompt("ttt", seed=1), make_prompt("ttttt", seed=2)]
    expected = generate(llava, prompts, None, NO_TOKEN_ID, max_new_tokens=12)
    for _ in range(2):
        assert generate(llava, prompts, None, NO_TOKEN_ID, max_new_tokens=12, compile=True) == expected
    assert num_calls == 3
    message = "warning: torch.compile failed, generating without it: no compiler found\n"
    assert capsys.readouterr().err == message
