"""Workers share the data: every one its own part, nothing twice, nothing lost but a remainder."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.data.datasets import DistributedDataset, DistributedDatasetConfig


class Numbers(DistributedDataset[torch.Tensor]):
    """The numbers from 0, as a sequence or one by one."""

    def __init__(self, size: int, sequential: bool = True, **config: Any) -> None:
        self.size = size
        super().__init__(data_size=size, is_sequential=sequential, **config)

    def get_sample(self, from_idx: int) -> torch.Tensor:
        until = from_idx + (self.seq_len if self.is_sequential else 1)
        return torch.arange(self.size)[from_idx:until]


def numbers_of(dataset: Numbers) -> list[int]:
    return [number for sample in dataset for number in sample.tolist()]  # type: ignore[attr-defined]


def test_a_worker_owns_its_part_and_cuts_it_into_samples() -> None:
    second = Numbers(23, seq_len=3, worker_id=1, num_workers=2)
    assert len(second) == 3
    assert [sample.tolist() for sample in second] == [  # type: ignore[attr-defined]
        [11, 12, 13],
        [14, 15, 16],
        [17, 18, 19],
    ]


def test_an_offset_shifts_every_sample_and_wraps_at_the_sample_length() -> None:
    data = Numbers(10, seq_len=4, worker_id=0, num_workers=1)
    assert data.offset_one() is data
    assert data[0].tolist() == [1, 2, 3, 4]
    assert (len(data), data.offset_to(3).sample_offset, len(data)) == (2, 3, 1)
    assert data.offset_one().sample_offset == 0
    assert data.offset_to(11).sample_offset == 3


def test_offsets_do_nothing_to_single_elements() -> None:
    data = Numbers(5, sequential=False, seq_len=100, worker_id=1, num_workers=2)
    assert data.offset_to(3).offset_one().sample_offset == 0
    assert numbers_of(data) == [2, 3]


@settings(deadline=None, max_examples=60)
@given(
    seq_len=st.integers(1, 9),
    workers=st.integers(1, 6),
    extra=st.integers(0, 60),
    epoch=st.integers(0, 30),
    sequential=st.booleans(),
)
def test_workers_are_disjoint_and_together_complete_up_to_the_remainder(
    seq_len: int, workers: int, extra: int, epoch: int, sequential: bool
) -> None:
    size = seq_len * workers + extra
    parts = [
        Numbers(size, sequential, seq_len=seq_len, worker_id=worker, num_workers=workers)
        for worker in range(workers)
    ]
    seen = [numbers_of(part.offset_to(epoch)) for part in parts]
    together = [number for part in seen for number in part]
    assert len(set(together)) == len(together)
    assert len({len(part) for part in seen}) == 1, "all workers do equally many samples"
    each = size // workers
    for worker, part in enumerate(seen):
        start = worker * each + (epoch % seq_len if sequential else 0)
        left_out = (worker + 1) * each - (start + len(part))
        assert part == list(range(start, start + len(part)))
        assert 0 <= left_out < (seq_len if sequential else 1)


def test_the_length_is_ignored_where_a_sample_is_one_element() -> None:
    for seq_len in (-1, 0):
        data = Numbers(5, sequential=False, seq_len=seq_len, worker_id=1, num_workers=2)
        assert data.seq_len == seq_len and numbers_of(data) == [2, 3]


def test_what_follows_the_last_sample_can_be_asked_for() -> None:
    data = Numbers(11, seq_len=4, worker_id=0, num_workers=1)
    assert data[len(data)].tolist() == [8, 9, 10]
    assert numbers_of(data) == list(range(8)), "it is none of the samples"


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=rf"sample {index} of a dataset with 2"):
        Numbers(11, seq_len=4, worker_id=0, num_workers=1)[index]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_workers": 0}, "num_workers: expected a number >= 1, got 0"),
        ({"worker_id": 2}, r"worker_id: expected one in \[0, 2\), got 2"),
        ({"worker_id": -1}, r"worker_id: expected one in \[0, 2\), got -1"),
        ({"seq_len": 0}, "seq_len: expected a number >= 1, got 0"),
        ({"seq_len": 6}, "data_size: 10 is too small .* at least 12"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changed: dict[str, int], message: str) -> None:
    config = DistributedDatasetConfig(seq_len=2, worker_id=0, num_workers=2)
    with pytest.raises(ValueError, match=message):
        Numbers(10, **{**config, **changed})


def test_numbers_must_be_integers() -> None:
    with pytest.raises(TypeError, match=r"seq_len: expected an integer, got 2\.5"):
        Numbers(10, seq_len=2.5, worker_id=0, num_workers=2)
