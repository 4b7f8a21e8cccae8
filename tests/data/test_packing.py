"""Steps: dealt without waiting ranks, the same for any number of ranks and workers, no row lost or read twice."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.conversation import IGNORE_INDEX, Rendered
from data.dataset import ConversationDataset
from data.packing import Batch, Step, StepDataset, deal, held_out_steps, measure_waste, pack
from tests.data.conftest import MakeDataset

NUM_ROWS = 11
BUDGET = 400  # tokens of a micro-batch: some steps of the eleven rows need one, some two or more
RANK_COUNTS = (1, 2, 3, 8)

Document = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], bytes]


@pytest.fixture
def dataset(make_dataset: MakeDataset, eleven_rows: list[dict]) -> ConversationDataset:
    """Eleven rows, eight with a picture, augmented so that a wrong seed shows."""
    return make_dataset(eleven_rows, augment_pixels=3)


def make_steps(
    dataset: ConversationDataset, batch_size: int, rank: int = 0, num_ranks: int = 1, seed: int = 5
) -> StepDataset:
    """Return one rank's steps."""
    return StepDataset(dataset, batch_size, BUDGET, seed, rank, num_ranks)


def list_documents(dataset: ConversationDataset, batch: Batch) -> list[Document]:
    """Take a batch apart again: row, ids, labels, positions and pixels of each document."""
    documents = []
    pictures: Iterator[Tensor] = iter([] if batch.pixel_values is None else batch.pixel_values)
    for row, (start, end) in zip(batch.rows, itertools.pairwise(batch.cu_seqlens), strict=True):
        ids, labels, positions = (
            tuple(column[start:end].tolist()) for column in (batch.input_ids, batch.labels, batch.position_ids)
        )
        pixels = b"" if dataset.image(row) is None else next(pictures).numpy().tobytes()
        documents.append((row, ids, labels, positions, pixels))
    assert next(pictures, None) is None
    return documents


def list_all(dataset: ConversationDataset, steps: Sequence[Step]) -> Counter[Document]:
    """Return the documents of all ranks' shares."""
    return Counter(
        document for step in steps for batch in step.micro_batches for document in list_documents(dataset, batch)
    )


def assert_same(first: Step, second: Step) -> None:
    """Compare two steps to the last bit."""
    assert (first.num_supervised, first.num_tokens, first.num_documents, first.rows_without_labels) == (
        *(second.num_supervised, second.num_tokens, second.num_documents, second.rows_without_labels),
    )
    for one, other in zip(first.micro_batches, second.micro_batches, strict=True):
        for (name, value), expected in zip(vars(one).items(), vars(other).values(), strict=True):
            same = torch.equal(value, expected) if isinstance(value, Tensor) else value == expected
            assert same, name


def test_pinned_steps_are_the_same_steps(dataset: ConversationDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader pins every tensor of a step, and nothing else of it changes; here a copy stands for pinned memory."""
    pinned: list[Tensor] = []

    def copy_tensor(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", copy_tensor)
    step = make_steps(dataset, batch_size=11)[0]
    copy = step.pin_memory()
    assert_same(copy, step)
    places = {tensor.data_ptr() for tensor in pinned}
    tensors = [value for batch in copy.micro_batches for value in vars(batch).values() if isinstance(value, Tensor)]
    assert len(tensors) == 5 * len(step.micro_batches)  # ids, labels, their places, positions, pixels
    assert {tensor.data_ptr() for tensor in tensors} == places


def test_deal_keeps_its_promises() -> None:
    """Each document once, within the budget, no share empty, as many micro-batches on each rank."""
    source = random.Random(0)
    for _ in range(500):
        num_ranks, budget = source.randint(1, 9), source.randint(50, 200)
        lengths = [source.randint(1, 50) for _ in range(source.randint(2 * num_ranks, 60))]
        shares = deal(lengths, num_ranks, budget)
        assert len(shares) == num_ranks
        assert len({len(share) for share in shares}) == 1
        micro_batches = [micro_batch for share in shares for micro_batch in share]
        assert sorted(index for micro_batch in micro_batches for index in micro_batch) == list(range(len(lengths)))
        assert all(micro_batch and micro_batch == sorted(micro_batch) for micro_batch in micro_batches)
        assert max(sum(lengths[index] for index in micro_batch) for micro_batch in micro_batches) <= budget
        assert shares == deal(lengths, num_ranks, budget)


def test_deal_balances() -> None:
    """All ranks wait for the slowest. Longest first: shares differ by no more than one document."""
    source = random.Random(1)
    for _ in range(300):
        num_ranks = source.randint(2, 8)
        lengths = [source.randint(1, 99) for _ in range(source.randint(num_ranks, 70))]
        shares = deal(lengths, num_ranks, 9999)
        loads = [sum(lengths[index] for micro_batch in share for index in micro_batch) for share in shares]
        assert max(loads) - min(loads) <= max(lengths)
    lengths = [3, 3, 4, 4, 10]  # in the order of the file, one rank would get 17 and the other 7
    assert sorted(sum(lengths[i] for i in share[0]) for share in deal(lengths, 2, 99)) == [11, 13]


def test_hardly_a_token_is_waited_for() -> None:
    """Lengths like LLaVA's, 16 documents for each of 8 ranks: far below 2 % of the ranks' time is lost."""
    source = random.Random(2)
    for max_tokens, num_micro_batches in ((99_999, 1), (8192, 2)):
        wastes = []
        for _ in range(50):
            lengths = [576 + int(source.lognormvariate(4.7, 0.83)) for _ in range(128)]
            shares = deal(lengths, 8, max_tokens)
            assert len(shares[0]) == num_micro_batches
            wastes.append(measure_waste(shares, lengths))
        assert 0 < sum(wastes) / len(wastes) < 0.002
    assert measure_waste([[[0], [1]], [[2], [3]]], [10, 5, 6, 5]) == pytest.approx(1 - 26 / 30)


def test_documents_that_are_cut_are_counted(make_dataset: MakeDataset, eleven_rows: list[dict]) -> None:
    """A document far longer than a row loses its end, as officially, and the step says how many did."""
    rows = [
        *eleven_rows,
        {"conversations": [{"from": "human", "value": "why? " * 5000}, eleven_rows[0]["conversations"][1]]},
    ]
    whole, cut = (make_dataset(rows, name, max_tokens=limit) for name, limit in (("a.json", 99_999), ("b.json", 60)))
    lengths = [len(whole.render(index)) for index in range(12)]
    assert max(lengths) > 5000
    step = make_steps(cut, 12)[0]
    assert step.num_cut == sum(length > 60 for length in lengths)
    assert max(length for batch in step.micro_batches for length in batch.lengths) == 60
    for index, length in enumerate(lengths):
        assert cut.render(index).num_cut == max(0, length - 60)


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "max_tokens", "num_micro_batches"),
    [
        ([9, 9, 9, 9], 1, 36, 1),
        ([9, 9, 9, 9], 1, 35, 2),
        ([9, 9, 9, 9], 2, 18, 1),
        ([9, 9, 9, 9], 2, 17, 2),
        ([9, 9, 9, 9], 4, 9, 1),
        ([7, 6, 5], 1, 9, 3),
        ([8, 8, 8, 1], 1, 12, 3),
    ],
)
def test_deal_makes_few_micro_batches(
    lengths: list[int], num_ranks: int, max_tokens: int, num_micro_batches: int
) -> None:
    """Each micro-batch gathers the weights of a sharded model once more."""
    assert {len(share) for share in deal(lengths, num_ranks, max_tokens)} == {num_micro_batches}


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "max_tokens", "message"),
    [
        ([5, 5], 3, 99, "2 samples cannot be shared by 3 ranks: raise batch_size"),
        ([], 1, 99, "0 samples cannot be shared by 1 ranks"),
        ([5, 8, 3], 1, 7, "3 documents of up to 8 tokens cannot be dealt to 1 ranks .* at most 7 tokens"),
        ([5, 5, 5], 2, 9, "3 documents of up to 5 tokens cannot be dealt to 2 ranks .*: raise micro_batch_tokens"),
    ],
)
def test_deal_says_what_is_impossible(lengths: list[int], num_ranks: int, max_tokens: int, message: str) -> None:
    """A rank without work would leave the others waiting for ever."""
    with pytest.raises(ValueError, match=message):
        deal(lengths, num_ranks, max_tokens)


def make_text(ids: list[int], branch_ids: list[int] | None = None, num_images: int = 0) -> Rendered:
    """Return a document whose last token alone is learned."""
    labels = [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:]
    return Rendered(ids, labels, list(range(len(ids))), branch_ids or [0] * len(ids), num_images)


def test_pack_lays_documents_end_to_end() -> None:
    """Borders, restarted positions, and pictures in the order in which their placeholders are read."""
    first, second = torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), 2.0)
    documents = [
        (7, make_text([1, 5, 2], num_images=1), first),
        (3, make_text([1, 2]), None),
        (9, make_text([1, 6, 8, 2], num_images=1), second),
    ]
    batch = pack(documents)
    assert batch.input_ids.tolist() == [1, 5, 2, 1, 2, 1, 6, 8, 2]
    assert batch.labels.tolist() == [-100, -100, 2, -100, 2, -100, -100, -100, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.cu_seqlens == [0, 3, 5, 9]
    assert batch.rows == [7, 3, 9]
    assert batch.branch_ids is None
    assert batch.pixel_values is not None
    assert torch.equal(batch.pixel_values, torch.stack([first, second]))
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}


def test_pack_without_pictures_and_with_branches() -> None:
    """None says that there is nothing: no empty tensors that a model would have to look into."""
    branches = [0, 1, 1, 2]
    batch = pack([(0, make_text([1, 2]), None), (1, make_text([1, 4, 5, 6], branches), None)])
    assert batch.pixel_values is None
    assert batch.branch_ids is not None
    assert batch.branch_ids.tolist() == [0, 0, *branches]


def test_supervised_positions_are_those_with_labels() -> None:
    batch = pack([(4, make_text([1, 3, 2], [0, 1, 2], 1), None), (5, make_text([1, 7], [0, 1], 1), None)])
    assert batch.supervised.tolist() == [place for place, label in enumerate(batch.labels) if label != IGNORE_INDEX]
    assert len(batch.supervised) > 0


def test_batch_moves_as_a_whole() -> None:
    """A tensor left behind would only be noticed on a GPU; the meta device notices it here."""
    pixels = torch.zeros(3, 4, 4)
    batch = pack([(4, make_text([1, 3, 2], [0, 1, 2], 1), pixels)]).to(torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    assert len(tensors) == 6
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (batch.cu_seqlens, batch.rows) == ([0, 3], [4])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_do_not_change_the_stream(dataset: ConversationDataset, num_workers: int) -> None:
    """Steps depend on their number alone, whoever makes them and whenever."""
    steps = make_steps(dataset, 4, rank=1, num_ranks=2)
    loader = DataLoader(steps, batch_size=None, sampler=range(7), num_workers=num_workers)
    expected = make_steps(dataset, 4, rank=1, num_ranks=2)
    made = list(loader)
    assert len(made) == 7
    for number in reversed(range(7)):
        assert_same(made[number], expected[number])


def test_resuming_continues_the_stream(dataset: ConversationDataset) -> None:
    """A run that starts at step n sees what the uninterrupted one saw from there."""
    uninterrupted = [make_steps(dataset, 4)[number] for number in range(8)]
    for start in (1, 3, 6):
        resumed = make_steps(dataset, 4)
        for number in range(start, 8):
            assert_same(resumed[number], uninterrupted[number])


def test_seed_decides_the_stream(dataset: ConversationDataset) -> None:
    """Another seed, another order; the same seed, the same."""
    orders = [[make_steps(dataset, 1, seed=seed)[i].micro_batches[0].rows[0] for i in range(11)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(NUM_ROWS))


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_ranks_share_the_same_step(dataset: ConversationDataset, num_ranks: int) -> None:
    """Two cards or eight train on the same documents and pixels; only who reads what differs."""
    for number in range(4):
        whole = make_steps(dataset, 9)[number]
        shares = [make_steps(dataset, 9, rank, num_ranks)[number] for rank in range(num_ranks)]
        assert list_all(dataset, shares) == list_all(dataset, [whole])
        assert len({len(share.micro_batches) for share in shares}) == 1
        batches = [batch for share in shares for batch in share.micro_batches]
        assert all(0 < len(batch.input_ids) <= BUDGET for batch in batches)
        for share in shares:
            assert share.num_documents == sum(len(batch.rows) for batch in batches) == 9
            assert share.num_tokens == sum(len(batch.input_ids) for batch in batches)
            assert share.num_supervised == sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches) > 0
            assert share.rows_without_labels == []


def test_documents_are_those_of_the_file(dataset: ConversationDataset) -> None:
    """Packed, a row is what it is alone, with the picture of its own row and the seed of its own draw."""
    step = make_steps(dataset, NUM_ROWS)[0]
    for batch in step.micro_batches:
        for row, ids, labels, positions, pixels in list_documents(dataset, batch):
            text = dataset.render(row)
            assert (list(ids), list(labels), list(positions)) == (text.input_ids, text.labels, text.position_ids)
            variants = [dataset.load_picture(row, (5, draw)) for draw in range(NUM_ROWS)]
            assert pixels in [b"" if variant is None else variant.numpy().tobytes() for variant in variants]


def test_augmentation_changes_from_epoch_to_epoch(dataset: ConversationDataset) -> None:
    """The seed belongs to the draw, not to the row."""
    seen: Counter[bytes] = Counter()
    for number in range(6):
        for _, _, _, _, pixels in list_all(dataset, [make_steps(dataset, NUM_ROWS)[number]]):
            seen[pixels] += 1
    assert seen.pop(b"") == 6 * 3  # three rows without a picture
    assert len(seen) > 40  # of 6 epochs x 8 pictures


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 25])
def test_each_epoch_visits_every_row_once(dataset: ConversationDataset, batch_size: int) -> None:
    """Also where a step lies across the border of two epochs."""
    steps = make_steps(dataset, batch_size)
    visits: Counter[int] = Counter()
    for number in range(5 * NUM_ROWS // batch_size):
        before = (number * batch_size) // NUM_ROWS
        visits.update(row for batch in steps[number].micro_batches for row in batch.rows)
        after = -(-(number + 1) * batch_size // NUM_ROWS)
        counts = [visits[row] for row in range(NUM_ROWS)]
        assert before <= min(counts)
        assert max(counts) <= after
        assert sum(counts) == (number + 1) * batch_size


def test_epochs_have_orders_of_their_own(dataset: ConversationDataset) -> None:
    """Otherwise the same documents would meet in a step again and again."""
    steps = make_steps(dataset, 1)
    order = [steps[number].micro_batches[0].rows[0] for number in range(3 * NUM_ROWS)]
    epochs = [order[start : start + NUM_ROWS] for start in range(0, 3 * NUM_ROWS, NUM_ROWS)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)


def test_rows_without_labels_are_reported(make_dataset: MakeDataset, eleven_rows: list[dict]) -> None:
    """A question longer than the limit leaves no answer to learn; every rank hears of it, nothing is ignored."""
    dataset = make_dataset(eleven_rows, max_tokens=70)
    silent = {row for row in range(NUM_ROWS) if dataset.render(row).num_supervised == 0}
    assert 0 < len(silent) < NUM_ROWS
    for rank in range(2):
        step = make_steps(dataset, NUM_ROWS, rank, 2)[0]
        assert sorted(step.rows_without_labels) == sorted(silent)
        assert step.num_documents == NUM_ROWS


def test_more_ranks_than_rows(dataset: ConversationDataset) -> None:
    """Refused before the run starts, with the file's name."""
    with pytest.raises(ValueError, match=r"rows\.json has 11 samples for 12 ranks: use at most 11 ranks"):
        make_steps(dataset, 12, 0, 12)
    with pytest.raises(ValueError, match="batch_size = 2 samples cannot be shared by 3 ranks"):
        make_steps(dataset, 2, 0, 3)


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 11, 30])
def test_held_out_steps_visit_every_row_once(dataset: ConversationDataset, batch_size: int, num_ranks: int) -> None:
    """A remainder too small for all ranks must neither be dropped nor hang them; nothing is augmented."""
    if batch_size < num_ranks:
        with pytest.raises(ValueError, match="cannot be shared"):
            make_steps(dataset, batch_size, 0, num_ranks)
        return
    for num_rows in (num_ranks, 8, 9, 10, 11, 99):
        datasets = [make_steps(dataset, batch_size, rank, num_ranks) for rank in range(num_ranks)]
        every_rank = [list(held_out_steps(steps, num_rows)) for steps in datasets]
        documents: Counter[Document] = Counter()
        for shares in zip(*every_rank, strict=True):
            documents += list_all(dataset, shares)
            labels = [batch.labels for share in shares for batch in share.micro_batches]
            supervised = sum(int((label != IGNORE_INDEX).sum()) for label in labels)
            assert {share.num_supervised for share in shares} == {supervised}
            assert len({len(share.micro_batches) for share in shares}) == 1
        assert sorted(row for row, *_ in documents.elements()) == list(range(min(num_rows, NUM_ROWS)))
        for row, _, _, _, pixels in documents:
            plain = dataset.load_picture(row)
            assert pixels == (b"" if plain is None else plain.numpy().tobytes())
