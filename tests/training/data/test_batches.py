"""Every row once per epoch, and an exact continuation from any point."""

from __future__ import annotations

import pytest
import torch

from training.data.batches import Batches


def batches(seed: int = 0, rows: int = 23, batch_size: int = 5, **options: bool) -> Batches:
    return Batches(torch.zeros(rows, 4, dtype=torch.uint8), batch_size, torch.Generator().manual_seed(seed), **options)


def epochs(source: Batches, count: int) -> list[list[int]]:
    return [index.tolist() for _ in range(count) for index in source]


def test_an_epoch_hands_out_every_row_once() -> None:
    source = batches()
    handed_out = epochs(source, 1)
    assert [len(index) for index in handed_out] == [5, 5, 5, 5, 3]
    assert len(source) == 5
    assert sorted(row for index in handed_out for row in index) == list(range(23))


def test_epochs_differ_and_seeds_differ_and_the_same_seed_does_not() -> None:
    first, second = epochs(batches(), 2)[:5], epochs(batches(), 2)[5:]
    assert first != second
    assert epochs(batches(), 2) == first + second
    assert epochs(batches(seed=1), 1) != first


def test_an_incomplete_last_batch_can_be_left_out() -> None:
    source = batches(drop_last=True)
    assert [len(index) for index in epochs(source, 1)] == [5, 5, 5, 5]
    assert len(source) == 4


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("taken", range(13))
def test_a_saved_position_continues_exactly(taken: int, drop_last: bool) -> None:
    """Three epochs without interruption, against the same cut after any batch and continued in a fresh object."""
    whole = epochs(batches(drop_last=drop_last), 3)
    source = batches(drop_last=drop_last)
    before, state = [], source.state_dict()
    while len(before) < taken:
        for index in source:
            before.append(index.tolist())
            state = source.state_dict()
            if len(before) == taken:
                break
    resumed = batches(seed=99, drop_last=drop_last)
    resumed.load_state_dict(state)
    after: list[list[int]] = []
    while resumed.epoch < 3:
        after += epochs(resumed, 1)
    assert before + after == whole


def test_a_state_survives_a_file(tmp_path) -> None:
    source = batches()
    next(iter(source))
    torch.save(source.state_dict(), tmp_path / "state.pt")
    resumed = batches(seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert epochs(resumed, 2) == epochs(source, 2)


def test_a_state_is_a_copy_that_later_batches_leave_alone() -> None:
    source = batches()
    next(iter(source))
    state = source.state_dict()
    rest = epochs(source, 2)
    resumed = batches(seed=99)
    resumed.load_state_dict(state)
    assert epochs(resumed, 2) == rest


def test_position_counts_the_batches_of_the_current_epoch() -> None:
    source = batches()
    positions = [(source.epoch, source.position) for _ in source]
    assert positions == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
    assert (source.epoch, source.position) == (1, 0)


def test_a_state_over_another_number_of_rows_is_refused() -> None:
    source = batches()
    next(iter(source))
    with pytest.raises(ValueError, match="23 rows, the data has 22"):
        batches(rows=22).load_state_dict(source.state_dict())


@pytest.mark.parametrize("batch_size", [0, 24])
def test_a_batch_size_that_cannot_be_filled_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 23 rows"):
        batches(batch_size=batch_size)


@pytest.mark.gpu
def test_the_order_does_not_depend_on_the_device_of_the_data() -> None:
    on_gpu = Batches(torch.zeros(23, 4, dtype=torch.uint8, device="cuda"), 5, torch.Generator().manual_seed(0))
    assert epochs(on_gpu, 2) == epochs(batches(), 2)
    assert next(iter(on_gpu)).is_cuda
