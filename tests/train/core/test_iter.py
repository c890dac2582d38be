"""epoch_cycler: where items are, where to start, when to end."""

import pytest

from mblm.train.core.iter import epoch_cycler


def places(seq, **kwargs):
    return [
        (i.epoch, i.batch, i.item, i.next_epoch, i.next_batch) for i in epoch_cycler(seq, **kwargs)
    ]


def test_goes_round_and_says_where_the_next_item_is():
    assert places("ab", max_iters=3) == [
        (0, 0, "a", 0, 1),
        (0, 1, "b", 1, 0),
        (1, 0, "a", 1, 1),
    ]


def test_starts_anywhere():
    assert places("abc", start_epoch=4, start_batch=2, max_iters=2) == [
        (4, 2, "c", 5, 0),
        (5, 0, "a", 5, 1),
    ]


def test_tells_before_an_epoch_starts():
    epochs = []
    list(epoch_cycler("ab", before_new_epoch=epochs.append, start_epoch=1, max_iters=4))
    assert epochs == [1, 2]


@pytest.mark.parametrize("seq", ["", "ab"])
def test_a_start_beyond_the_end_is_refused(seq):
    with pytest.raises(IndexError, match="start_batch: 2 is beyond"):
        next(epoch_cycler(seq, start_batch=2))


def test_none_at_all():
    assert places("ab", max_iters=0) == []


def test_a_sequence_may_grow_between_epochs():
    items = [1]
    assert places(items, before_new_epoch=items.append, max_iters=3, start_epoch=7) == [
        (7, 0, 1, 7, 1),
        (7, 1, 7, 8, 0),
        (8, 0, 1, 8, 1),
    ]


def test_an_epoch_without_items_is_passed_over():
    items = []

    def fill_every_other(epoch):
        items[:] = "ab" if epoch % 2 else ""

    assert places(items, before_new_epoch=fill_every_other, max_iters=3) == [
        (1, 0, "a", 1, 1),
        (1, 1, "b", 2, 0),
        (3, 0, "a", 3, 1),
    ]
