"""What a stage minimises. An objective is the root module that is sharded: batch in, sum of losses out.

Both objectives also answer the batch, so that one exact-match score serves all stages.
Shapes: T tokens of a packed row, A supervised tokens, N images, C captions, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from data.conversation import IGNORE_INDEX
from data.packing import Batch
from model.attention import PackedAttention
from model.llava import Llava
from model.vision import VisionTower
from train.parallel import Block

# Logits are the largest tensors of a step (V floats a token); this many tokens of them exist at a time.
LOGITS_CHUNK_TOKENS = 2048
MAX_CAPTIONS = 4096


class NextToken(nn.Module):
    """Predict every supervised token from those before it: LLaVA's loss in all its stages."""

    def __init__(self, llava: Llava, reads: str = "pixels") -> None:
        """Args:
        reads: what stands for pictures in the batches: "pixels", "features" of the vision tower, which the model then
            does without, or "text" if there are none.
        """
        super().__init__()
        assert reads in ("pixels", "features", "text")
        self.llava = llava
        self.token_loss = TokenLoss(llava.language_model.lm_head)
        self.reads = reads

    def blocks(self) -> list[Block]:
        """Return what a forward pass runs, part by part, for sharding.

        Gradients pass through the LLaMA's layers; the others take part in backward only if they are trained.
        """
        llama = self.llava.language_model
        layers = list(llama.layers)
        parts: list[nn.Module] = []
        if self.reads == "pixels":
            parts += self.llava.vision_tower.layers[: self.llava.vision_tower.num_used_layers]
        parts += [llama.embed_tokens, *layers, self.token_loss]
        return [Block(part, part in layers or any(p.requires_grad for p in part.parameters())) for part in parts]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses, and the likeliest token at each supervised position (A,).

        Only supervised positions meet `lm_head`: the others' logits, most of them, are never made.
        """
        attend = UncompiledAttention(batch.cu_seqlens, batch.branch_ids)
        features = self._encode(batch) if self.reads != "text" else None
        hidden_states = self.llava(batch.input_ids[None], batch.position_ids[None], attend, features)[0]  # (T, D)
        # The position before a token predicts it. (A, D)
        return self.token_loss(hidden_states[batch.supervised - 1], batch.labels[batch.supervised])

    def _encode(self, batch: Batch) -> Tensor:
        # Without a picture a blank one is encoded, of which no patch is used: another rank may have pictures, and
        # every rank must run tower and projector, or their collectives never meet. It gives zero gradients.
        vision, projector = self.llava.config.vision, self.llava.projector
        blank = batch.input_ids.new_zeros
        if self.reads == "features":
            given, size = batch.patch_features, (vision.num_patches, vision.hidden_size)
            features = blank(1, *size) if given is None else given
            encoded = projector(features.to(projector.linear_1.weight))
        else:
            given, size = batch.pixel_values, (vision.image_size, vision.image_size)
            encoded = self.llava.encode_images(blank(1, 3, *size) if given is None else given)
        return encoded if given is not None else encoded[:0]


class UncompiledAttention(PackedAttention):
    """Stays outside of what `torch.compile` makes of a layer, which would be new code for every batch's lengths."""

    @torch.compiler.disable
    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().__call__(layer_index, q, k, v)


class TokenLoss(nn.Module):
    """`lm_head` and cross entropy in one, a chunk of tokens at a time: the logits never exist together.

    A module of its own so that sharding can gather `lm_head`, which the model owns, just around it.
    """

    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, hidden_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses in fp32, and the likeliest tokens (A,). Shapes: (A, D), (A,)."""
        loss_sum = hidden_states.new_zeros((), dtype=torch.float32)
        predicted = [targets[:0]]
        for hidden, target in zip(
            hidden_states.split(LOGITS_CHUNK_TOKENS), targets.split(LOGITS_CHUNK_TOKENS), strict=True
        ):
            loss, answer = self._chunk_loss(hidden, target)
            loss_sum = loss_sum + loss
            predicted.append(answer)
        return loss_sum, torch.cat(predicted)

    def _chunk_loss(self, hidden_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return self._trained_loss(hidden_states, targets)
        if self.lm_head.weight.requires_grad:
            return checkpoint(self._trained_loss, hidden_states, targets, use_reentrant=False)
        return _FrozenHeadLoss.apply(hidden_states, self.lm_head.weight, targets)

    def _trained_loss(self, hidden_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden_states).float()  # (A, D) -> (A, V)
        return F.cross_entropy(logits, targets, reduction="sum"), logits.detach().argmax(dim=-1)


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss over frozen `lm_head` weights. Its gradient is made at once: backward needs neither logits nor weights.

    Source: the idea of Hsu et al. 2024, "Liger Kernel": the loss is a scalar, so its gradient can only be scaled later.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden_states, weight).float()  # (A, D) -> (A, V)
        answer = logits.argmax(dim=-1)
        log_total = logits.logsumexp(dim=-1)
        loss = (log_total - logits.gather(1, targets[:, None]).squeeze(1)).sum()
        # d loss / d logits = probabilities - 1 at the target, made in the logits' own memory
        gradient = logits.sub_(log_total[:, None]).exp_()
        gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
        ctx.save_for_backward(gradient.to(weight.dtype) @ weight)  # (A, D)
        ctx.mark_non_differentiable(answer)
        return loss, answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (hidden_gradient,) = ctx.saved_tensors
        return gradient.to(hidden_gradient.dtype) * hidden_gradient, None, None


class CaptionMatching(nn.Module):
    """Find a picture's caption among all captions: CLIP's training for the vision tower.

    Source: Radford et al. 2021, with three changes. The picture's vector is the strongest response of any patch, in
    the layer LLaVA will read, and not a class token: what a picture shows must then be told by its patches, which are
    all that the projector will see, and it is learned in half the steps. Captions are few and short, so the text
    tower is a sum of word vectors, and a picture is compared with every distinct caption of the file, not with those
    of the batch. That makes the loss a plain sum over pictures, the same for any number of ranks.
    """

    def __init__(self, vision_tower: VisionTower, captions: Sequence[tuple[int, ...]], vocab_size: int) -> None:
        """Args:
        captions: the distinct captions' token ids.
        Raises: ValueError when they are too many to compare with all.
        """
        super().__init__()
        if len(captions) > MAX_CAPTIONS:
            raise ValueError(f"{len(captions)} distinct captions, train = 'vision' takes at most {MAX_CAPTIONS}")
        size = vision_tower.config.hidden_size
        self.vision_tower = vision_tower
        self.visual_projection = nn.Linear(size, size, bias=False)
        self.word_embedding = nn.Embedding(vocab_size, size)
        self.logit_scale = nn.Parameter(torch.tensor([10.0]))
        self.captions = list(captions)
        self.index_of = {caption: index for index, caption in enumerate(self.captions)}

    def blocks(self) -> list[Block]:
        """Return the layers that a forward pass runs one after another, for sharding."""
        return [
            Block(layer, in_backward=True) for layer in self.vision_tower.layers[: self.vision_tower.num_used_layers]
        ]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses, and the chosen captions' tokens at the supervised positions (A,)."""
        device = batch.labels.device
        documents = batch.labels.split(batch.lengths)
        answers = [tuple(labels[labels != IGNORE_INDEX].tolist()) for labels in documents]
        unknown = [row for row, answer in zip(batch.rows, answers, strict=True) if answer not in self.index_of]
        if unknown or batch.pixel_values is None or len(batch.pixel_values) != len(answers):
            raise ValueError(
                f"rows {unknown or batch.rows}: train = 'vision' takes one picture and one caption a row, and held-out "
                "captions that occur in the training file"
            )
        targets = torch.tensor([self.index_of[answer] for answer in answers], device=device)
        features = self.vision_tower(batch.pixel_values.to(self.visual_projection.weight))  # (N, P, D)
        pictures = F.normalize(self.visual_projection(features.amax(dim=1)), dim=-1)
        words = [torch.tensor(caption, device=device) for caption in self.captions]
        texts = F.normalize(torch.stack([self.word_embedding(ids).sum(dim=0) for ids in words]), dim=-1)
        logits = (self.logit_scale * pictures @ texts.T).float()  # (N, D), (C, D) -> (N, C)
        chosen = [self.captions[index] for index in logits.argmax(dim=-1).tolist()]
        # Cut or filled to the true caption's length, so that token by token comparison tells the two apart.
        fitted = [(*choice, *[-1] * len(answer))[: len(answer)] for choice, answer in zip(chosen, answers, strict=True)]
        predicted = torch.tensor([token for choice in fitted for token in choice], device=device)
        return F.cross_entropy(logits, targets, reduction="sum"), predicted


def split_answers(labels: Tensor, predicted: Tensor) -> list[tuple[list[int], list[int]]]:
    """Return (true, predicted) tokens of every answer: an unbroken stretch of supervised tokens.

    When each token is the likeliest after the true ones before it, greedy decoding gives the true answer; when one is
    not, it does not. So comparing the two is exact match without generating.
    Shapes: labels (T,), predicted (A,).
    """
    positions = (labels != IGNORE_INDEX).nonzero().squeeze(1).tolist()
    answers: list[tuple[list[int], list[int]]] = []
    previous = -2
    for position, true, guess in zip(positions, labels[positions].tolist(), predicted.tolist(), strict=True):
        if position != previous + 1:
            answers.append(([], []))
        answers[-1][0].append(true)
        answers[-1][1].append(guess)
        previous = position
    return answers
