"""The fast loss is the plain one, and a batch without pictures still runs every module."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train.loss
from data.conversation import IGNORE_INDEX, Turn, render_conversation
from data.packing import Batch, pack
from data.tokenizer import Tokenizer
from model.attention import PackedAttention
from model.llava import Llava
from train.loss import CaptionMatching, NextToken, split_answers

TOKENIZER = Tokenizer(Path(__file__).resolve().parents[2] / "data/tiny/tokenizer.model")


def make_batch(with_image: bool) -> Batch:
    first = [Turn("human", "what is this?", with_image), Turn("gpt", "a red circle.")]
    second = [Turn("human", "is it red?"), Turn("gpt", "yes"), Turn("human", "a box?"), Turn("gpt", "no")]
    pixels = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)) if with_image else None
    texts = [render_conversation(turns, TOKENIZER, 64) for turns in (first, second)]
    return pack([(0, texts[0], pixels), (1, texts[1], None)])


@pytest.mark.parametrize("chunk", [1, 3, 4096])
def test_loss_equals_full_logits_in_any_chunks(llava: Llava, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.loss, "LOGITS_CHUNK_TOKENS", chunk)
    batch = make_batch(with_image=True)
    assert batch.pixel_values is not None
    loss, predicted = NextToken(llava)(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None}
    llava.zero_grad()
    attend = PackedAttention(batch.cu_seqlens)
    hidden = llava(batch.input_ids[None], batch.position_ids[None], attend, llava.encode_images(batch.pixel_values))
    logits = llava.language_model.lm_head(hidden)[0]
    plain = F.cross_entropy(logits[:-1], batch.labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert predicted.tolist() == logits[:-1].argmax(-1)[batch.labels[1:] != IGNORE_INDEX].tolist()
    assert gradients.keys() == {name for name, p in llava.named_parameters() if p.grad is not None}
    for name, p in llava.named_parameters():
        if p.grad is not None:
            # The absolute part is for key biases, whose true gradient is zero: a softmax does not see them.
            torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=2e-6 * p.grad.abs().max().item() + 1e-7)


def test_batch_without_pictures_gives_the_projector_zero_gradients(llava: Llava) -> None:
    """Not no gradients: other ranks may have pictures, and every rank must take part in the same sums."""
    loss, _ = NextToken(llava)(make_batch(with_image=False))
    loss.backward()
    for name, parameter in llava.projector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_made_ahead_give_the_loss_of_pixels(llava: Llava, dtype: torch.dtype) -> None:
    """To the last bit where they are stored in the type of computing; in fp32 the tower's features are rounded."""
    llava.to(dtype)
    batch = make_batch(with_image=True)
    assert batch.pixel_values is not None
    features = llava.vision_tower(batch.pixel_values.to(dtype)).bfloat16()
    ahead = replace(batch, pixel_values=None, patch_features=features)
    gradients = []
    for reads, given in (("pixels", batch), ("features", ahead)):
        llava.zero_grad()
        loss, _ = NextToken(llava, reads)(given)
        loss.backward()
        gradient = llava.projector.linear_1.weight.grad
        assert gradient is not None
        gradients.append((loss.detach(), gradient.clone()))
    (loss, gradient), (loss_ahead, gradient_ahead) = gradients
    rounding = 0.0 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(loss_ahead, loss, rtol=rounding, atol=0)
    torch.testing.assert_close(gradient_ahead, gradient, rtol=0, atol=50 * rounding * gradient.abs().max().item())


def test_features_without_pictures_give_the_projector_zero_gradients(llava: Llava) -> None:
    loss, _ = NextToken(llava, "features")(make_batch(with_image=False))
    loss.backward()
    for name, parameter in llava.projector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_language_objective_leaves_tower_and_projector_alone(llava: Llava) -> None:
    loss, _ = NextToken(llava, reads="text")(make_batch(with_image=False))
    loss.backward()
    assert all(parameter.grad is None for parameter in llava.projector.parameters())


def test_split_answers() -> None:
    no = IGNORE_INDEX
    labels = torch.tensor([no, 5, 6, no, no, 7, no, 8, 9])
    predicted = torch.tensor([5, 1, 7, 8, 9])
    assert split_answers(labels, predicted) == [([5, 6], [5, 1]), ([7], [7]), ([8, 9], [8, 9])]


def make_captions(captions: list[str]) -> Batch:
    turns = [[Turn("human", "", True), Turn("gpt", caption)] for caption in captions]
    pixels = torch.randn(len(captions), 3, 64, 64, generator=torch.Generator().manual_seed(1))
    texts = [render_conversation(turn, TOKENIZER, 64, "plain") for turn in turns]
    return pack([(row, text, pixels[row]) for row, text in enumerate(texts)])


def test_caption_matching_is_a_softmax_over_all_captions(llava: Llava) -> None:
    batch = make_captions(["a red circle.", "a blue box"])
    known = [tuple(TOKENIZER.encode(text + "\n")) for text in ("a red circle.", "no", "a blue box")]
    objective = CaptionMatching(llava.vision_tower, known, TOKENIZER.vocab_size)
    loss, predicted = objective(batch)
    features = llava.vision_tower(batch.pixel_values)
    pictures = F.normalize(objective.visual_projection(features.amax(1)), dim=-1)
    texts = [objective.word_embedding(torch.tensor(ids)).sum(0) for ids in known]
    logits = 10.0 * pictures @ F.normalize(torch.stack(texts), dim=-1).T
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([0, 2]), reduction="sum"))
    answers = split_answers(batch.labels, predicted)
    right = [true == guess for true, guess in answers]
    assert right == (logits.argmax(-1) == torch.tensor([0, 2])).tolist()


def test_caption_matching_refuses_unknown_captions(llava: Llava) -> None:
    objective = CaptionMatching(llava.vision_tower, [(1, 2)], TOKENIZER.vocab_size)
    with pytest.raises(ValueError, match=r"rows \[0\]: train = 'vision' takes one picture and one caption"):
        objective(make_captions(["a red circle."]))
