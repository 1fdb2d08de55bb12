"""Every frame in its place, every sequence once per epoch, and an exact continuation from any point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from training.data.ragged import Ragged
from training.data.sequence_batches import ResidentSequences, SequenceBatch, SequenceBatches, evaluation_batches
from training.data.sequence_plan import IDLE, Carried, Crops, Order, Whole

LENGTHS = [5, 17, 1, 30, 8, 8, 12, 3, 25, 40, 2]
ORDERS: list[Order] = [Whole(), Whole(pool=1, drop_last=True), Crops(6), Crops(6, cover=True), Crops(6, drop_last=True), Carried(6)]


def ragged(lengths: list[int] = LENGTHS) -> Ragged:
    """Frames whose two entries are the number of the sequence and that of the frame, from 1."""
    return Ragged.of(
        np.stack([np.full(length, row + 1), np.arange(1, length + 1)], 1).astype(np.uint8) for row, length in enumerate(lengths)
    )


def batches(order: Order, batch_size: int = 3, seed: int = 0, lengths: list[int] = LENGTHS) -> SequenceBatches:
    resident = ResidentSequences.of(ragged(lengths))
    return SequenceBatches(resident, batch_size, torch.Generator().manual_seed(seed), order)


def key(batch: SequenceBatch) -> tuple[object, ...]:
    return tuple(part.tolist() for part in batch)


def epochs(source: SequenceBatches, count: int) -> list[tuple[object, ...]]:
    return [key(batch) for _ in range(count) for batch in source]


def check_frames(batch: SequenceBatch) -> None:
    """x, by a slow loop over the original sequences."""
    whole = ragged()
    assert batch.x.shape[:2] == batch.mask.shape
    for row, (sequence, start) in enumerate(zip(batch.sequence.tolist(), batch.start.tolist(), strict=True)):
        expected = whole[sequence][start : start + batch.x.shape[1]] if sequence != IDLE else whole[0][:0]
        assert batch.lengths[row] == len(expected) == batch.mask[row].sum()
        np.testing.assert_array_equal(batch.x[row, : len(expected)], expected)
        assert not batch.x[row, len(expected) :].any()
        assert not batch.mask[row, len(expected) :].any()


@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_every_row_holds_the_frames_it_names_and_is_masked_after_them(order: Order) -> None:
    for batch in batches(order):
        assert batch.x.dtype == batch.mask.dtype == torch.float32
        check_frames(batch)


@pytest.mark.parametrize("order", ORDERS, ids=repr)
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4, 7, 9])
def test_a_saved_position_continues_exactly(order: Order, taken: int, tmp_path: Path) -> None:
    """Three epochs without interruption, against the same cut after any batch and continued in a fresh object."""
    whole = epochs(batches(order), 3)
    source = batches(order)
    before, state = [], source.state_dict()
    while len(before) < taken:
        for batch in source:
            before.append(key(batch))
            state = source.state_dict()
            if len(before) == taken:
                break
    torch.save(state, tmp_path / "state.pt")
    resumed = batches(order, seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    after: list[tuple[object, ...]] = []
    while resumed.epoch < 3:
        after += epochs(resumed, 1)
    assert before + after == whole


@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_a_state_is_a_copy_that_later_batches_leave_alone(order: Order) -> None:
    source = batches(order)
    next(iter(source))
    state = source.state_dict()
    rest = epochs(source, 2)
    resumed = batches(order, seed=99)
    resumed.load_state_dict(state)
    assert epochs(resumed, 2) == rest


@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_epochs_differ_and_seeds_differ_and_the_same_seed_does_not(order: Order) -> None:
    source = batches(order)
    length = len(source)
    first = epochs(source, 1)
    assert len(first) == length
    assert (source.epoch, source.position) == (1, 0)
    assert epochs(source, 1) != first
    assert epochs(batches(order), 1) == first
    assert epochs(batches(order, seed=1), 1) != first


def test_whole_sequences_come_once_each_beside_others_of_similar_length() -> None:
    source = list(batches(Whole()))
    assert sorted(row for batch in source for row in batch.sequence.tolist()) == list(range(len(LENGTHS)))
    assert all(batch.restart.all() and not batch.start.any() for batch in source)
    assert all(batch.x.shape[1] == batch.lengths.max() for batch in source)
    widths = sorted(sorted(batch.lengths.tolist()) for batch in source)
    assert sorted(length for batch in widths for length in batch) == sorted(LENGTHS)
    assert [length for batch in widths for length in batch] == sorted(LENGTHS)  # with one pool the batches do not interleave


def test_a_small_pool_mixes_more_than_a_large_one() -> None:
    lengths = list(range(1, 65))

    def padding(pool: int) -> int:
        return sum(int((batch.mask == 0).sum()) for batch in batches(Whole(pool), 4, lengths=lengths))

    assert padding(16) < padding(4) < padding(1)


def test_batches_of_whole_sequences_come_in_a_shuffled_order() -> None:
    widths = [batch.x.shape[1] for batch in batches(Whole(), 2, lengths=list(range(1, 33)))]
    assert widths != sorted(widths)
    assert sorted(widths) == list(range(2, 33, 2))


def test_crops_have_one_length_and_begin_anywhere() -> None:
    source = batches(Crops(6), 1)
    starts = {row: set() for row in range(len(LENGTHS))}
    for _ in range(300):
        for batch in source:
            assert batch.x.shape == (1, 6, 2)
            assert batch.restart.all()
            starts[batch.sequence.item()].add(batch.start.item())
    for row, length in enumerate(LENGTHS):
        assert starts[row] == set(range(max(1, length - 5)))


def test_covering_crops_take_as_many_of_each_sequence_as_it_has_chunks() -> None:
    drawn = [row for batch in batches(Crops(6, cover=True)) for row in batch.sequence.tolist()]
    assert [drawn.count(row) for row in range(len(LENGTHS))] == [-(-length // 6) for length in LENGTHS]


@pytest.mark.parametrize("batch_size", [1, 3, 11])
@pytest.mark.parametrize("frames", [1, 6, 100])
def test_carried_chunks_play_every_sequence_to_its_end_and_restart_between(frames: int, batch_size: int) -> None:
    rows: list[list[int]] = [[] for _ in range(batch_size)]
    seen: dict[int, int] = {}  # sequence -> frames seen so far
    playing = [IDLE] * batch_size
    for batch in batches(Carried(frames), batch_size):
        assert batch.x.shape[:2] == (batch_size, frames)
        for row, (sequence, start, restart) in enumerate(
            zip(batch.sequence.tolist(), batch.start.tolist(), batch.restart.tolist(), strict=True)
        ):
            if sequence == IDLE:
                assert not batch.mask[row].any()
                continue
            assert start == seen.get(sequence, 0)
            assert restart == (start == 0)
            assert restart or playing[row] == sequence
            playing[row] = sequence
            seen[sequence] = start + int(batch.lengths[row])
            rows[row].append(sequence)
    assert [seen[row] for row in range(len(LENGTHS))] == LENGTHS


def test_carried_rows_are_idle_only_when_nothing_is_left() -> None:
    for row in torch.stack([batch.sequence for batch in batches(Carried(6))]).unbind(1):
        idle = (row == IDLE).tolist()
        assert idle == sorted(idle)


def test_carried_state_gives_what_the_whole_sequence_gives() -> None:
    """A running sum as the recurrent state: after the last chunk it is the sum over the sequence."""
    total = torch.zeros(3)
    last: dict[int, float] = {}
    for batch in batches(Carried(6)):
        total = torch.where(batch.restart, 0, total) + batch.x[..., 1].sum(1)
        last |= dict(zip(batch.sequence.tolist(), total.tolist(), strict=True))
    assert [last[row] for row in range(len(LENGTHS))] == [length * (length + 1) / 2 for length in LENGTHS]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_evaluation_takes_every_sequence_whole_longest_first(batch_size: int) -> None:
    source = list(evaluation_batches(ResidentSequences.of(ragged()), batch_size))
    lengths = [length for batch in source for length in batch.lengths.tolist()]
    assert lengths == sorted(LENGTHS, reverse=True)
    assert sorted(row for batch in source for row in batch.sequence.tolist()) == list(range(len(LENGTHS)))
    for batch in source:
        check_frames(batch)


def test_the_last_batch_is_short_or_left_out() -> None:
    assert sorted(len(batch.sequence) for batch in batches(Whole(), 4)) == [3, 4, 4]
    assert [len(batch.sequence) for batch in batches(Crops(6), 4)] == [4, 4, 3]
    assert [len(batch.sequence) for batch in batches(Crops(6, drop_last=True), 4)] == [4, 4]
    assert [len(batch.sequence) for batch in batches(Whole(drop_last=True), 4)] == [4, 4]


@pytest.mark.parametrize("order", [Whole(), Crops(6), Carried(6)], ids=repr)
@pytest.mark.parametrize("batch_size", [0, 12])
def test_a_batch_size_that_cannot_be_filled_is_refused(order: Order, batch_size: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 11 rows"):
        batches(order, batch_size)


@pytest.mark.parametrize(("order", "field"), [(Whole, "pool"), (Crops, "frames"), (Carried, "frames")])
def test_a_pool_crop_or_chunk_has_at_least_one(order: Callable[[int], Order], field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        order(0)


def test_a_state_over_other_sequences_is_refused() -> None:
    state = batches(Carried(6)).state_dict()
    for other in (batches(Carried(6), 4), batches(Carried(6), lengths=LENGTHS[:-1]), batches(Carried(6), lengths=[5] * 11)):
        with pytest.raises(ValueError, match="does not fit"):
            other.load_state_dict(state)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_the_batches_do_not_depend_on_the_device_of_the_data(order: Order) -> None:
    on_gpu = SequenceBatches(ResidentSequences.of(ragged(), "cuda"), 3, torch.Generator().manual_seed(0), order)
    for batch, expected in zip(on_gpu, batches(order), strict=True):
        assert batch.x.is_cuda
        assert key(batch) == key(expected)
