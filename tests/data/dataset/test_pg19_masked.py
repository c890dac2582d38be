"""PG19 for an encoder: some ids are hidden, which the mask says and the labels keep."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mblm.data.dataset.pg19 import PG19
from mblm.data.dataset.pg19_masked import PG19Masked
from mblm.data.types import ModelMode
from tests.data.entry import entry_config

ALONE = {"worker_id": 0, "num_workers": 1}


@pytest.fixture
def books(tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.txt").write_bytes(bytes(range(256)) * 40)
    return tmp_path


def test_hidden_ids_are_those_under_the_mask(books: Path) -> None:
    data = PG19Masked(books, ModelMode.TRAIN, 257, 0.3, padding_token_id=256, seq_len=5000, **ALONE)
    ids, mask, labels = data[1]
    assert (ids.dtype, mask.dtype, labels.dtype) == (torch.int64, torch.bool, torch.int64)
    assert torch.equal(labels, PG19(books, ModelMode.TRAIN, seq_len=5000, **ALONE)[1][0])
    assert torch.equal(ids == 257, mask)
    assert torch.equal(ids[~mask], labels[~mask])
    assert 0.25 < mask.float().mean() < 0.35


@pytest.mark.parametrize(("share", "hidden"), [(0.0, 0), (1.0, 100)])
def test_all_or_nothing_can_be_hidden(books: Path, share: float, hidden: int) -> None:
    data = PG19Masked(books, ModelMode.TRAIN, masking_proba=share, seq_len=100, **ALONE)
    ids, mask, _ = data[0]
    assert int(mask.sum()) == int((ids == -100).sum()) == hidden


def test_the_same_seed_hides_the_same(books: Path) -> None:
    data = PG19Masked(books, ModelMode.TRAIN, seq_len=100, **ALONE)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(data[0][1])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_sample_over_the_end_is_padded_and_padding_is_not_hidden(books: Path) -> None:
    data = PG19Masked(books, ModelMode.TRAIN, masking_proba=1.0, seq_len=10, **ALONE)
    ids, mask, labels = data.get_sample(len(data.data) - 4)
    assert ids.tolist() == [-100] * 4 + [-101] * 6
    assert mask.tolist() == [True] * 4 + [False] * 6
    assert labels.tolist() == [252, 253, 254, 255] + [-101] * 6
    left = len(data.data) % 10
    assert all(row.shape == (10,) for row in data[len(data)])
    assert data[len(data)][0].tolist() == [-100] * left + [-101] * (10 - left)


def test_from_a_training_configuration(books: Path) -> None:
    hierarchy = SimpleNamespace(pad_token_id=301)
    params = {"input_seq_len": 64, "mask_token_id": 300, "mblm_config": hierarchy}
    config = entry_config(books, None, {"masking_proba": 0.5}, **params)
    data = PG19Masked.from_train_entry_config(config, ModelMode.TRAIN, worker_id=0, num_workers=2)
    assert (data.masked_token_id, data.padding_token_id, data.masking_proba) == (300, 301, 0.5)
    assert len(data) == 80
    assert PG19Masked.supports_test_mode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masked_token_id": 5, "padding_token_id": 5}, "another id than padding_token_id, got 5"),
        ({"masking_proba": 1.5}, r"masking_proba: expected a share in \[0, 1\], got 1\.5"),
        ({"masking_proba": -0.1}, r"masking_proba: expected a share in \[0, 1\], got -0\.1"),
    ],
)
def test_wrong_arguments_are_refused(
    books: Path, arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PG19Masked(books, ModelMode.TRAIN, seq_len=10, **ALONE, **arguments)
