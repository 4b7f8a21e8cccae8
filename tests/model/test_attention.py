"""Packed rows: documents that lie side by side in a row, and branches of one document, do not know of each other.

"Bit-identical" is meant literally: what is not attended to is not multiplied by a small number, it is not there.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.attention import (
    BranchedAttention,
    CausalAttention,
    PackedAttention,
    RecordingAttention,
    TrunkAttention,
)
from model.llama import Llama
from tests.model.small_llava import (
    FIRST_WORD_ID,
    LAST_WORD_ID,
    make_llava,
    make_prompt,
    read_gradients,
    relative_difference,
)

TOLERANCE = 2e-6  # of logits and gradients, by the largest: a longer row is summed in another order
LENGTHS = [5, 8, 3]  # documents of a row

# A document of a trunk and three branches, and how long each is.
TRUNK, BRANCHES = 6, [4, 7, 2]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return make_llava(seed=1).language_model


def change_words(input_ids: Tensor) -> Tensor:
    """Replace every word by another one."""
    return FIRST_WORD_ID + (input_ids - FIRST_WORD_ID + 17) % (LAST_WORD_ID - FIRST_WORD_ID + 1)


def run_row(
    llama: Llama, documents: Sequence[Tensor], positions: Sequence[Tensor], branch_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the embeddings (T, D) and logits (T, V) of one packed row."""
    borders = [0, *torch.tensor([len(document) for document in documents]).cumsum(0).tolist()]
    embeddings = llama.embed_tokens(torch.cat(list(documents)))
    embeddings.retain_grad()
    hidden_states = llama(embeddings[None], torch.cat(list(positions))[None], PackedAttention(borders, branch_ids))
    return embeddings, llama.lm_head(hidden_states)[0]


def run_alone(llama: Llama, input_ids: Tensor) -> Tensor:
    """Return the logits (T, V) of one document in a row of its own."""
    embeddings = llama.embed_tokens(input_ids)[None]
    return llama.lm_head(llama(embeddings, torch.arange(len(input_ids))[None], CausalAttention()))[0]


def weigh(logits: Tensor) -> Tensor:
    """Return a loss in which every logit counts differently."""
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def make_documents() -> list[Tensor]:
    return [make_prompt("t" * length, seed=index) for index, length in enumerate(LENGTHS)]


def lay_out_branches(trunk: Tensor, branches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, positions and branch ids (T,): every branch's positions go on where the trunk's end."""
    positions = [torch.arange(len(trunk)), *[len(trunk) + torch.arange(len(branch)) for branch in branches]]
    branch_ids = [torch.full((len(part),), index) for index, part in enumerate([trunk, *branches])]
    return torch.cat([trunk, *branches]), torch.cat(positions), torch.cat(branch_ids)


def make_branched() -> tuple[Tensor, list[Tensor]]:
    branches = [make_prompt("t" * length, seed=30 + index) for index, length in enumerate(BRANCHES)]
    return make_prompt("t" * TRUNK, seed=29), branches


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_other_documents_do_not_notice_a_change(llama: Llama, changed: int) -> None:
    """The loss is the other documents' alone, so even the weights' gradients must not move by a bit."""
    documents = make_documents()
    positions = [torch.arange(length) for length in LENGTHS]
    is_other = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)) != changed
    results = []
    for words in (documents[changed], change_words(documents[changed])):
        llama.zero_grad()
        row = [words if index == changed else document for index, document in enumerate(documents)]
        embeddings, logits = run_row(llama, row, positions)
        weigh(logits[is_other]).backward()
        assert embeddings.grad is not None
        assert not embeddings.grad[~is_other].any()
        results.append((logits, embeddings.grad, read_gradients(llama)))
    (logits, gradient, gradients), (new_logits, new_gradient, new_gradients) = results

    assert not torch.equal(logits[~is_other], new_logits[~is_other])  # there was something to notice
    assert torch.equal(logits[is_other], new_logits[is_other])
    assert torch.equal(gradient, new_gradient)
    assert gradients.keys() == new_gradients.keys() == dict(llama.named_parameters()).keys()
    for name, tensor in gradients.items():
        assert torch.equal(tensor, new_gradients[name]), name


def test_packed_equals_one_by_one(llama: Llama) -> None:
    """Logits, and the gradients of the summed losses."""
    documents = make_documents()
    llama.zero_grad()
    _, logits = run_row(llama, documents, [torch.arange(length) for length in LENGTHS])
    torch.stack([weigh(part) for part in logits.split(LENGTHS)]).sum().backward()
    packed = read_gradients(llama)
    llama.zero_grad()
    for document, part in zip(documents, logits.split(LENGTHS), strict=True):
        alone = run_alone(llama, document)
        assert relative_difference(part, alone) < TOLERANCE
        weigh(alone).backward()
    one_by_one = read_gradients(llama)
    assert packed.keys() == one_by_one.keys() == dict(llama.named_parameters()).keys()
    for name, gradient in packed.items():
        assert relative_difference(gradient, one_by_one[name]) < TOLERANCE, name


def test_branch_equals_the_document_without_the_others(llama: Llama) -> None:
    """Between two plain documents, so that masks and borders must fit each other."""
    before, _, behind = make_documents()
    trunk, branches = make_branched()
    input_ids, positions, branch_ids = lay_out_branches(trunk, branches)
    _, logits = run_row(
        llama,
        [before, input_ids, behind],
        [torch.arange(len(before)), positions, torch.arange(len(behind))],
        torch.cat([torch.zeros_like(before), branch_ids, torch.zeros_like(behind)]),
    )
    before_logits, document_logits, behind_logits = logits.split([len(before), len(input_ids), len(behind)])
    assert relative_difference(before_logits, run_alone(llama, before)) < TOLERANCE
    assert relative_difference(behind_logits, run_alone(llama, behind)) < TOLERANCE
    for index, branch in enumerate(branches, start=1):
        alone = run_alone(llama, torch.cat([trunk, branch]))
        assert relative_difference(document_logits[branch_ids == 0], alone[: len(trunk)]) < TOLERANCE
        assert relative_difference(document_logits[branch_ids == index], alone[len(trunk) :]) < TOLERANCE


@pytest.mark.parametrize("changed", range(1, len(BRANCHES) + 1))
def test_trunk_and_other_branches_do_not_notice_a_change(llama: Llama, changed: int) -> None:
    input_ids, positions, branch_ids = lay_out_branches(*make_branched())
    is_other = branch_ids != changed
    results = []
    for words in (input_ids, torch.where(is_other, input_ids, change_words(input_ids))):
        embeddings, logits = run_row(llama, [words], [positions], branch_ids)
        weigh(logits[is_other]).backward()
        assert embeddings.grad is not None
        assert not embeddings.grad[~is_other].any()
        results.append((logits[is_other], embeddings.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_trunks_and_branches_attend_as_whole_rows_do(num_groups: int, dtype: torch.dtype) -> None:
    """3 trunks with 2 branches each, of which 4 get new tokens, unequally many, behind unequally many."""
    generator = torch.Generator().manual_seed(1)
    rows, starts, counts = [1, 3, 2, 4], [0, 3, 1, 2], [3, 1, 2, 4]
    lengths = [TRUNK + start + count for start, count in zip(starts, counts, strict=True)]

    def draw(num_heads: int, num_tokens: int) -> Tensor:
        return torch.randn(1, num_heads, num_tokens, 4, generator=generator).to(dtype)

    trunks = [[draw(heads, TRUNK) for heads in (6, num_groups, num_groups)] for _ in range(3)]
    branches = [
        [torch.cat([part, draw(part.shape[1], length - TRUNK)], dim=2) for part in trunks[row // 2]]
        for row, length in zip(rows, lengths, strict=True)
    ]
    trunk_keys, trunk_values = (torch.zeros(3, num_groups, TRUNK, 4, dtype=dtype) for _ in range(2))
    keys, values = (torch.zeros(3, 2, num_groups, 8, 4, dtype=dtype) for _ in range(2))
    causal, tolerance = CausalAttention(), 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps

    attend_trunks = TrunkAttention([trunk_keys], [trunk_values], torch.tensor([2, 0, 1]))
    q, k, v = (torch.cat([trunks[trunk][kind] for trunk in (2, 0, 1)]) for kind in range(3))
    torch.testing.assert_close(attend_trunks(0, q, k, v), causal(0, q, k, v))

    for row, start, (_, k, v) in zip(rows, starts, branches, strict=True):
        keys[row // 2, row % 2, :, :start] = k[0, :, TRUNK : TRUNK + start]
        values[row // 2, row % 2, :, :start] = v[0, :, TRUNK : TRUNK + start]
    attend = BranchedAttention(([trunk_keys], [trunk_values]), ([keys], [values]), rows, starts, counts)
    q, k, v = (
        torch.cat([branch[kind][:, :, -count:] for branch, count in zip(branches, counts, strict=True)], dim=2)
        for kind in range(3)
    )
    expected = [causal(0, *branch)[:, :, -count:] for branch, count in zip(branches, counts, strict=True)]
    out = attend(0, q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.cat(expected, dim=2), rtol=tolerance, atol=tolerance)
    positions = [range(length - count, length) for length, count in zip(lengths, counts, strict=True)]
    assert attend.position_ids.tolist() == [[position for piece in positions for position in piece]]


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_weights_are_those_the_output_is_made_of(num_groups: int, dtype: torch.dtype) -> None:
    """2 rows of 7 tokens, 3 of which are watched: the output is the plain one, and weights x values give it."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, 7, 4, generator=generator).to(dtype) for heads in (6, num_groups, num_groups))
    watched, targets, others = torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4, 6])
    some, rest, every = (
        RecordingAttention(watched, seen, torch.float32) for seen in (targets, others, torch.arange(7))
    )
    expected = CausalAttention()(0, q, k, v)
    for attend in (some, rest, every):
        assert torch.equal(attend(0, q, k, v), expected)

    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    rebuilt = every.weights[0] @ v.float().repeat_interleave(6 // num_groups, dim=1)
    torch.testing.assert_close(rebuilt, expected[:, :, watched].float(), rtol=tolerance, atol=tolerance)
    assert torch.equal(some.weights[0], every.weights[0][..., targets])
    torch.testing.assert_close(some.shares[0], some.weights[0].sum(-1))
    torch.testing.assert_close(some.shares[0] + rest.shares[0], torch.ones(2, 6, 3))
    assert not some.weights[0][:, :, 0, 1:].any()  # token 1 sees none of those behind it
